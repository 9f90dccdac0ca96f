"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from llava_simplified.model.config import read_checkpoint_config

# Of a run's settings, those that say where it ran and how it looked while it did: nothing that made the model.
_OF_THE_MACHINE = re.compile(
    r"dir$|^config|token$|tqdm|pin_memory|unused|use_cpu|resume|^do_|hub|report_to|log|save|checkpointing|workers|"
    r"accelerator_config|cache|^steps|^epochs|_data_path|_image_folder|^model_name|^vision_tower|deepspeed"
)


def write_card(checkpoint: str | Path, folder: Path, form: str, scores: Path | None = None) -> None:
    """README.md of an exported folder: what it was made of, how, how good it is, and where it ends."""
    manifest = read_checkpoint_config(checkpoint)
    parts, training = manifest["architecture"], dict(manifest["training"])
    text, tower = public_name(parts["language_model"]), public_name(parts["vision_tower"])
    licence = licence_of(parts["language_model"])
    made = {"adapter": "LoRA on the language model", "language_model": "the whole language model"}
    steps = (
        f" {training['steps']:,} steps, {training['epochs']:.2f} epochs."
        if "epochs" in training
        else ""
    )
    lines = [
        "---",
        f"license: {licence or 'other'}",
        "pipeline_tag: image-text-to-text",
        "library_name: transformers",
        *(f"base_model: {name}" for name in (text,) if name == parts["language_model"]),
        "---",
        f"# {text} that sees through {tower}",
        "",
        f"A LLaVA model: {tower}, a {parts['mm_projector_type']} projector and {text}, trained to answer "
        f"`{parts['instruction']}` about a picture.",
        "",
        {"hf": "Merged; loads with `AutoModelForImageTextToText` and `AutoProcessor`.",
         "peft": "`base/` loads with `AutoModelForImageTextToText`, `adapter/` on top of it with `PeftModel`.",
         "gguf": "For llama.cpp (`llama-server -m model.gguf --mmproj mmproj.gguf`) and Ollama (`ollama create`)."}[form],
        "",
        f"Licence of the language model: {licence or 'not stated in its folder; look at its own page'}. The vision tower "
        "and the training data have licences of their own.",
        "",
        "## Training",
        "",
        f"Trained were the projector{' and ' + made[manifest['trained']] if manifest['trained'] in made else ''}."
        f"{' The vision tower too.' if manifest.get('trained_tower', 'off') != 'off' else ''}{steps}",
        "",
        *(f"- {name}: `{public_name(training[key])}`"
          for name, key in (("data", "train_data_path"), ("validation data", "eval_data_path")) if training.get(key)),
        *(f"- {key}: `{public_name(value)}`" for key, value in training.items()
          if isinstance(value, (str, int, float)) and not _OF_THE_MACHINE.search(key)),
        f"- with {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}",
    ]  # fmt: skip
    if scores is not None:
        table = next(iter(json.loads(scores.read_text(encoding="utf-8")).values()))["mean"]
        lines += ["", "## Scores", "", "| score | value | 95 % interval |", "|---|---|---|"]
        lines += [f"| {name} | {' | '.join(_score(*value))} |" for name, value in table.items()]
    if (plot := Path(checkpoint) / "training.png").is_file():
        shutil.copy(plot, folder)
        lines += ["", "![loss](training.png)"]
    lines += [
        "",
        "## Limits",
        "",
        "It says what its training captions would say, in their language and with their mistakes; it invents what it can't "
        f"see, and was tested for nothing beyond {'the scores above' if scores else 'what its training measured'}.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def public_name(value: object) -> str:
    """A setting as others understand it: of a path on this machine the last part, of a hub's cache the model's name."""
    if match := re.search(r"models--([^/]+)--([^/]+)", str(value)):
        return f"{match[1]}/{match[2]}"
    path = Path(str(value))
    return (
        path.name
        if path.is_absolute() or path.parts[:1] in (("..",), ("~",)) or path.is_dir()
        else str(value)
    )


def _score(
    value: float | None, low: float | None = None, high: float | None = None
) -> tuple[str, str]:
    known = f"{low:.4f} to {high:.4f}" if low is not None and high is not None else ""
    return ("" if value is None else f"{value:.4f}"), known


def licence_of(model: str) -> str | None:
    """What a local model folder says in its model card, or None."""
    card = Path(model) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license: *(\S+)$", text.partition("\n---")[0], re.MULTILINE)
    return found[1] if found else None
