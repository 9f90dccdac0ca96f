"""The model card (`README.md`) of an exported checkpoint.

A card has YAML front matter for the Hugging Face hub, and sections for readers: how to load the model,
license, training (trained parts, data, options), scores, and limitations.

An export is meant to be published, so the card contains nothing about the machine: only the last part of
local paths, and no options that concern the machine or the display.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_simplified.model.config import LlavaConfig, read_checkpoint_config

# Names of options that are not listed in the card, because they concern the machine or the display, or are
# shown elsewhere in the card (data, models, number of steps). "token$" is the most important pattern:
# hub_token is a secret.
_MACHINE_OPTIONS = re.compile(
    r"dir$|^config|token$|tqdm|pin_memory|unused|use_cpu|resume|^do_|hub|report_to|log|save"
    r"|checkpointing|workers|accelerator_config|cache|^steps|^epochs|_data_path|_image_folder"
    r"|^model_name|^vision_tower|deepspeed|endpoint$|^local_rank|^trackio"
)
# Value of `llava export --format` -> how to load the exported folder.
_HOW_TO_LOAD = {
    "hf": "Adapters are merged into the weights. Load the model with `AutoModelForImageTextToText` and `AutoProcessor`.",
    "peft": (
        "Load `base/` with `AutoModelForImageTextToText`, and `adapter/` on top of it with "
        "`PeftModel`."
    ),
    "gguf": (
        "For llama.cpp (`llama-server -m model.gguf --mmproj mmproj.gguf`) and Ollama (`ollama "
        "create NAME -f Modelfile`)."
    ),
}
# Entry "trained" of `llava.json` -> the trained parts.
_TRAINED = {
    "adapter": "the projector and LoRA on the language model",
    "language_model": "the projector and the whole language model",
    "projector": "the projector",
}


def write_model_card(
    checkpoint: str | Path,
    folder: Path,
    export_format: str,
    scores: Mapping[str, Sequence[float | None]] | None = None,
) -> None:
    """Write `README.md` into an exported folder, and `training.png` if the checkpoint has one.

    Args:
        checkpoint: The checkpoint that was exported.
        folder: The exported folder.
        export_format: "hf", "peft" or "gguf".
        scores: Result of `read_scores`, or None.
    """
    config = read_checkpoint_config(checkpoint)
    sections = [
        _metadata(config),
        _introduction(config, export_format),
        _training_section(config),
    ]
    if scores is not None:
        sections.append(_scores_section(scores))
    plot = Path(checkpoint) / "training.png"
    if plot.is_file():
        shutil.copy(plot, folder)
        sections.append("![Training loss](training.png)")
    sections.append(_limitations_section(has_scores=scores is not None))
    card = "\n\n".join(sections) + "\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


# ---- sections ----


def _metadata(config: Mapping[str, Any]) -> str:
    """Return the YAML front matter, which the hub reads."""
    language_model = config["architecture"]["language_model"]
    lines = [
        "---",
        f"license: {read_license(language_model) or 'other'}",
        "pipeline_tag: image-text-to-text",
        "library_name: transformers",
    ]
    # Name the base model only if it is on the hub, because the hub links to it.
    if public_name(language_model) == language_model:
        lines.append(f"base_model: {language_model}")
    lines.append("---")
    return "\n".join(lines)


def _introduction(config: Mapping[str, Any], export_format: str) -> str:
    """Return title, description, how to load the model, and the license."""
    # The config has defaults for entries that are missing in the file.
    architecture = LlavaConfig.from_dict(config["architecture"])
    language_model = public_name(architecture.language_model)
    vision_tower = public_name(architecture.vision_tower)
    projector = architecture.mm_projector_type
    instruction = architecture.instruction
    license_name = read_license(architecture.language_model)
    license_text = license_name or "not stated in its folder; see its own model card"
    return "\n\n".join(
        [
            f"# LLaVA: {language_model} with {vision_tower}",
            f"A LLaVA model: the vision encoder {vision_tower}, the projector {projector} and the "
            f"language model {language_model}. Trained to follow the instruction `{instruction}`.",
            _HOW_TO_LOAD[export_format],
            f"License of the language model: {license_text}. The vision encoder and the training "
            "data have their own licenses.",
        ]
    )


def _training_section(config: Mapping[str, Any]) -> str:
    """Return the section about trained parts, data and options."""
    training = config["training"]
    trained = f"Trained: {_TRAINED[config['trained']]}"
    if config.get("trained_tower", "off") != "off":
        trained += ", and the vision encoder"
    trained += "."
    if "epochs" in training:
        trained += f" {training['steps']:,} steps, {training['epochs']:.2f} epochs."

    lines = ["## Training", "", trained, ""]
    for label, key in (("data", "train_data_path"), ("validation data", "eval_data_path")):
        if training.get(key):
            lines.append(f"- {label}: `{public_name(training[key])}`")
    for key, value in training.items():
        if isinstance(value, (str, int, float)) and not _MACHINE_OPTIONS.search(key):
            lines.append(f"- {key}: `{public_name(value)}`")
    versions = [f"{name} {version}" for name, version in config["versions"].items()]
    if versions:
        lines.append(f"- versions: {', '.join(versions)}")
    return "\n".join(lines)


def read_scores(path: Path) -> dict[str, list[float | None]]:
    """Read the scores of the first run in a `scores.json` of `llava evaluate` or `llava benchmark`.

    Returns:
        [score, low, high] by metric. The interval may be None.

    Raises:
        ValueError: The file does not exist, or has another form.
    """
    if not path.is_file():
        raise ValueError(
            f"--scores {path}: no such file. Pass the scores.json of `llava evaluate`."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--scores {path}: not a JSON file: {error}") from None
    # evaluate:  {"predictions": {"mean": {"CIDEr-D": [0.91, 0.87, 0.95], ...}, "shuffled": ...}, ...}
    # benchmark: {"settings": {...}, "runs": {"greedy": {"mean": ..., ...}, ...}}
    try:
        runs = content["runs"] if content.keys() == {"settings", "runs"} else content
        first_run = next(iter(runs.values()))
        return {name: _score_and_interval(*numbers) for name, numbers in first_run["mean"].items()}
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"--scores {path}: this is not a scores.json. Pass the file that `llava evaluate --output` or `llava benchmark` "
            "has written."
        ) from None


def _score_and_interval(
    value: float | None, low: float | None = None, high: float | None = None
) -> list[float | None]:
    """Return [score, low, high]; raise ValueError or TypeError if one is not a number."""
    return [None if number is None else float(number) for number in (value, low, high)]


def _scores_section(scores: Mapping[str, Sequence[float | None]]) -> str:
    """Return the table of scores."""
    lines = ["## Scores", "", "| score | value | 95 % interval |", "|---|---|---|"]
    for name, numbers in scores.items():
        lines.append(_score_row(name, *numbers))
    return "\n".join(lines)


def _score_row(
    name: str, value: float | None, low: float | None = None, high: float | None = None
) -> str:
    """Return one row of the table; the score, or only its interval, may be missing."""
    value_text = "" if value is None else f"{value:.4f}"
    interval = ""
    if low is not None and high is not None:
        interval = f"{low:.4f} to {high:.4f}"
    return f"| {name} | {value_text} | {interval} |"


def _limitations_section(*, has_scores: bool) -> str:
    """Return the section about the limitations of the model."""
    tested = "the scores above" if has_scores else "its loss in training"
    return (
        "## Limitations\n\n"
        "The model imitates its training captions, with their language and their mistakes. It can invent "
        f"details that are not in the image. It was not tested for anything beyond {tested}."
    )


# ---- names ----


def public_name(value: object) -> str:
    """Return the value of a setting without local paths.

    A path in the hub's cache is replaced by the name of the model, any other local path by its last part.
    """
    text = str(value)
    # ~/.cache/huggingface/hub/models--openai--clip-vit-base-patch16/snapshots/...
    match = re.search(r"models--([^/]+)--([^/]+)", text)
    if match:
        return f"{match[1]}/{match[2]}"
    path = Path(text)
    is_local = path.is_absolute() or path.parts[:1] in (("..",), ("~",)) or path.is_dir()
    return path.name if is_local else text


def read_license(model: str) -> str | None:
    """Return the license in the model card of a local model folder, or None."""
    card = Path(model) / "README.md"
    if not card.is_file():
        return None
    # The YAML front matter is between two lines "---" at the beginning.
    metadata = card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
    match = re.search(r"^license: *(\S+)$", metadata, re.MULTILINE)
    return match[1] if match else None
