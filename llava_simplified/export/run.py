"""`llava export`, `llava merge` and `llava push`: a checkpoint leaves the house, with a card that says what it is."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from llava_simplified.model.checkpoint import MANIFEST, read_manifest


def export_main(argv: list[str] | None = None) -> int:
    """The command line of `llava export`."""
    parser = argparse.ArgumentParser("llava export", description="Write a checkpoint in a form that other tools load.")
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--format",
        choices=["hf", "peft", "gguf"],
        default="hf",
        help="stock LLaVA, merged; or with a PEFT adapter; or files for llama.cpp and Ollama",
    )
    parser.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="as trained where not given")
    parser.add_argument("--images", nargs="*", default=[], help="pictures to compare the two models on (else noise)")
    parser.add_argument("--model-base", help="the language model, if it is not where it was at training")
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    parser.add_argument("--scores", type=Path, help="scores.json of `llava evaluate`, for the model card")
    args = parser.parse_args(argv)
    if args.scores and not args.scores.is_file():
        raise ValueError(f"--scores {args.scores}: no such file")
    where = {"model_base": args.model_base, "vision_tower": args.vision_tower}
    if args.format == "gguf":
        from llava_simplified.export.llamacpp import export_gguf

        compared = export_gguf(args.checkpoint, args.output, args.dtype, **where)
    else:
        from llava_simplified.export.stock import export_stock

        adapter = args.format == "peft"
        compared = export_stock(args.checkpoint, args.output, args.dtype, args.images, adapter, **where)
    write_card(args.checkpoint, args.output, args.format, args.scores)
    print(f"{args.output}: loaded back and compared: " + ", ".join(f"{k} {v:.3g}" for k, v in compared.items()))
    return 0


def merge_main(argv: list[str] | None = None) -> int:
    """The command line of `llava merge`."""
    parser = argparse.ArgumentParser("llava merge", description="Put a checkpoint's adapter into its weights.")
    parser.add_argument("checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument("--model-base", help="the language model, if it is not where it was at training")
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    args = parser.parse_args(argv)
    merge(**vars(args))
    print(f"{args.output}: of the base models, only those are needed that were not trained")
    return 0


def merge(checkpoint: str | Path, output: Path, model_base: str | None = None, vision_tower: str | None = None) -> None:
    """Write a checkpoint of the same model without adapters: `language_model/`, `vision_tower/` in their place.

    Raises:
        ValueError: there is no adapter, or the folder exists.
    """
    from llava_simplified.model.checkpoint import Architecture, absolute, save_checkpoint
    from llava_simplified.model.llava import Llava

    manifest = read_manifest(checkpoint)
    text, tower = manifest["trained"], manifest.get("trained_tower", "off")
    if text != "adapter" and tower != "lora":
        raise ValueError(f"{checkpoint}: has no adapter to merge")
    if output.exists():
        raise ValueError(f"{output} exists: choose another --output")
    where = {"model_base": model_base, "vision_tower": vision_tower}
    model = Llava.from_pretrained(checkpoint, device="cpu", merge=True, **where)
    # trained whole, as far as saving goes
    model.language_model.requires_grad_(text != "projector")
    model.vision_tower.requires_grad_(tower != "off")
    parts = dict(manifest["architecture"])
    for name, moved in (("language_model", model_base), ("vision_tower", vision_tower)):
        parts[name] = absolute(moved or parts[name])
    if text != "projector":
        parts["bits"] = 16
    save_checkpoint(model, output, Architecture(**parts), manifest["training"])


def push_main(argv: list[str] | None = None) -> int:
    """The command line of `llava push`."""
    parser = argparse.ArgumentParser("llava push", description="Upload an exported folder or a checkpoint to the hub.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded; needs no network")
    args = parser.parse_args(argv)
    left_out = ["trainer_state/*", "checkpoint-*"]
    if not args.folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        raise ValueError(f"a folder and owner/name are needed, not {args.folder} and {args.repository}")
    if (args.folder / MANIFEST).is_file():  # a checkpoint as it was trained, which remembers where
        manifest = read_manifest(args.folder)
        values = map(str, [*manifest["architecture"].values(), *manifest["training"].values()])
        if named := sorted({value for value in values if Path(value).is_absolute()}):
            print(f"warning: this tells of your machine {', '.join(named)}; an export does not", file=sys.stderr)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of httpx, or what took its place
    from huggingface_hub.utils import filter_repo_objects

    if args.dry_run:
        names = sorted(p.relative_to(args.folder).as_posix() for p in args.folder.rglob("*") if p.is_file())
        sizes = {
            name: (args.folder / name).stat().st_size for name in filter_repo_objects(names, ignore_patterns=left_out)
        }
        for name, size in sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{sum(sizes.values()):>14,}  bytes to {args.repository}; nothing was sent")
        return 0
    try:
        api = HfApi()
        api.create_repo(args.repository, private=args.private, exist_ok=True)
        print(api.upload_folder(repo_id=args.repository, folder_path=args.folder, ignore_patterns=left_out))
    except (HTTPError, OSError) as error:
        raise ValueError(f"the hub did not take {args.folder}: {error}. `hf auth login` stores a token") from error
    return 0


# Of a run's settings, those that say where it ran and how it looked while it did: nothing that made the model.
_OF_THE_MACHINE = re.compile(
    r"dir$|^config|token$|tqdm|pin_memory|unused|use_cpu|resume|^do_|hub|report_to|log|save|checkpointing|workers|"
    r"accelerator_config|cache|^steps|^epochs|_data_path|_image_folder|^model_name|^vision_tower|deepspeed"
)


def write_card(checkpoint: str | Path, folder: Path, form: str, scores: Path | None = None) -> None:
    """README.md of an exported folder: what it was made of, how, how good it is, and where it ends."""
    manifest = read_manifest(checkpoint)
    parts, training = manifest["architecture"], dict(manifest["training"])
    text, tower = public_name(parts["language_model"]), public_name(parts["vision_tower"])
    licence = licence_of(parts["language_model"])
    made = {"adapter": "LoRA on the language model", "language_model": "the whole language model"}
    steps = f" {training['steps']:,} steps, {training['epochs']:.2f} epochs." if "epochs" in training else ""
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
    return path.name if path.is_absolute() or path.parts[:1] in (("..",), ("~",)) or path.is_dir() else str(value)


def _score(value: float | None, low: float | None = None, high: float | None = None) -> tuple[str, str]:
    known = f"{low:.4f} to {high:.4f}" if low is not None and high is not None else ""
    return ("" if value is None else f"{value:.4f}"), known


def licence_of(model: str) -> str | None:
    """What a local model folder says in its model card, or None."""
    card = Path(model) / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license: *(\S+)$", text.partition("\n---")[0], re.MULTILINE)
    return found[1] if found else None
