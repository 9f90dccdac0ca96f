"""`--data` of `llava train`, `encode` and `plan`: read any source, and choose defaults if no model is named.

Before the command parses its options, `--data` is replaced by other options:

    --data photos/                          -> --train_data_path, --train_image_folder
    --data photos/, but no model is named   -> also the small models of `llava demo`, the recipe `small_folder`, and a
                                               suitable number of epochs
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llava_simplified.small_models import small_models

logger = logging.getLogger(__name__)

# The recipe for runs that name neither a model nor a --config.
SMALL_RECIPE = "small_folder"
_MODEL_OPTIONS = ("model_name_or_path", "vision_tower", "init_from")
# Number of samples to train on in all epochs together, which takes some minutes on two CPU cores. The number of epochs
# follows from it, within these limits: a data set of fewer than 40 records is trained on fewer samples, and one of more
# than 400 records on more.
_SAMPLES = 1200
_MIN_EPOCHS = 3
_MAX_EPOCHS = 30


class DataOptions(NamedTuple):
    """The options that follow from `--data`.

    Attributes:
        recipe: Name of a recipe of the package, or "" for none. All other options override its values.
        options: Values by option name.
    """

    recipe: str
    options: dict[str, str]


def options_from_data(given: Mapping[str, list[str]]) -> DataOptions:
    """Return the options that follow from `--data`, except those that the user passed.

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
    # If the user names neither a model nor a config, train the small models of `llava demo`.
    uses_small_models = not given.keys() & {*_MODEL_OPTIONS, "config"}
    # Check that the models exist before the source is read, which may take minutes.
    options: dict[str, str] = {}
    if uses_small_models:
        options = _small_model_options()

    from llava_simplified.prepare.data_cache import prepare_data

    folder = None
    folders = given.get("train_image_folder") or given.get("image_folder")
    if folders:
        folder = folders[0]
    sidecar = ",".join(given.get("sidecar", []))
    data = prepare_data(source, folder, sidecar)
    options["train_data_path"] = str(data.records)
    options["train_image_folder"] = str(data.image_folder)
    if uses_small_models:
        options["num_train_epochs"] = str(_choose_epochs(data.num_records))
        options["output_dir"] = str(Path("output") / _name_of(source))
    # The user's options take precedence.
    for name in given:
        options.pop(name, None)
    if not uses_small_models:
        return DataOptions("", options)
    if "max_steps" in given:
        options.pop("num_train_epochs", None)
    chosen = " ".join(f"--{name} {value}" for name, value in options.items())
    logger.info(
        "No model was named, so the run starts from the small models of `llava demo`, with --config %s %s",
        SMALL_RECIPE,
        chosen,
    )
    return DataOptions(SMALL_RECIPE, options)


def _small_model_options() -> dict[str, str]:
    """Return the options that name the demo's models; raise ValueError if the models do not exist."""
    models = small_models()
    if not all(folder.is_dir() for folder in models):
        raise ValueError(
            "--data without --model_name_or_path starts from the small models of `llava demo`, but "
            f"{models.language_model.parent} does not contain them. Download them with `llava demo --download-only`, or "
            "choose a model with --model_name_or_path and --vision_tower."
        )
    return {
        "model_name_or_path": str(models.language_model),
        "vision_tower": str(models.vision_tower),
    }


def _choose_epochs(num_records: int) -> int:
    """Return the number of epochs. The fewer records there are, the more epochs are needed.

    The projector starts from random weights, so it needs a minimum number of steps even for few records.
    """
    epochs = round(_SAMPLES / max(1, num_records))
    return max(_MIN_EPOCHS, min(_MAX_EPOCHS, epochs))


def _name_of(source: str) -> str:
    """Return a name for the output folder: the name of the source, without suffixes and wildcards."""
    if "://" in source:
        # Remove the query of the URL.
        without_query, _, _ = source.partition("?")
        path = Path(without_query)
    else:
        path = Path(source).absolute()
    name = path.name
    if not path.is_dir():
        name = name.partition(".")[0]
    return name.replace("*", "").strip() or "model"
