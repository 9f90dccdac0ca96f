"""`--data` of `llava train`, `encode` and `plan`: records from any source, and defaults if no model is named."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llava_simplified.small_models import small_models

logger = logging.getLogger(__name__)

# Used if neither a model nor a recipe is named.
SMALL_RECIPE = "small_folder"
_MODEL_OPTIONS = ("model_name_or_path", "vision_tower", "init_from")
# Number of samples that a run on a small folder sees, for 40 to 400 records: some minutes on two CPU cores.
_SAMPLES = 1200
_EPOCHS = (3, 30)


class DataOptions(NamedTuple):
    """The options that follow from `--data`.

    Attributes:
        recipe: A recipe of the package, which has the lowest precedence; "" for none.
        options: Option names and values.
    """

    recipe: str
    options: dict[str, str]


def options_from_data(given: Mapping[str, list[str]]) -> DataOptions:
    """Return the options that follow from `--data`, without those that were given.

    Args:
        given: All options of the command line and of its `--config`, with their values.

    Raises:
        ValueError: `--data` and `--train_data_path` are both given, the source cannot be read, or no model is named
            and the small models do not exist.
    """
    source = " ".join(given.get("data", []))
    if not source:
        return DataOptions("", {})
    if given.keys() & {"train_data_path", "data_path"}:
        raise ValueError("--data and --train_data_path both name the training data. Pass only one.")
    is_small = not given.keys() & {*_MODEL_OPTIONS, "config"}
    # Before the source is read, which may take minutes.
    options = _small_model_options() if is_small else {}

    from llava_simplified.prepare.data_cache import prepare_data

    folder = given.get("train_image_folder") or given.get("image_folder")
    sidecar = ",".join(given.get("sidecar", []))
    data = prepare_data(source, folder[0] if folder else None, sidecar)
    options["train_data_path"] = str(data.records)
    options["train_image_folder"] = str(data.image_folder)
    if is_small:
        options["num_train_epochs"] = str(_choose_epochs(data.num_records))
        options["output_dir"] = str(Path("output") / _name_of(source))
    options = {name: value for name, value in options.items() if name not in given}
    if is_small:
        if "max_steps" in given:
            options.pop("num_train_epochs", None)
        chosen = " ".join(f"--{name} {value}" for name, value in options.items())
        logger.info(
            "No model is named, so the run starts from the small models of `llava demo`, with the recipe %s and %s",
            SMALL_RECIPE,
            chosen,
        )
    return DataOptions(SMALL_RECIPE if is_small else "", options)


def _small_model_options() -> dict[str, str]:
    models = small_models()
    if not all(folder.is_dir() for folder in models):
        raise ValueError(
            "--data without --model_name_or_path starts from the small models of `llava demo`, which are not on this "
            f"machine ({models.language_model.parent}). Download them with `llava demo --download-only`, or name a model "
            "with --model_name_or_path and --vision_tower."
        )
    return {
        "model_name_or_path": str(models.language_model),
        "vision_tower": str(models.vision_tower),
    }


def _choose_epochs(num_records: int) -> int:
    """Return the number of epochs: many for few records, because the projector starts from random weights."""
    fewest, most = _EPOCHS
    return max(fewest, min(most, round(_SAMPLES / max(1, num_records))))


def _name_of(source: str) -> str:
    """Return a name for the output folder: that of the folder or file, without suffixes and wildcards."""
    path = Path(source.partition("?")[0]) if "://" in source else Path(source).absolute()
    name = path.name if path.is_dir() else path.name.partition(".")[0]
    return name.replace("*", "").strip() or "model"
