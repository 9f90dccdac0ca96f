"""`llava export`, `llava merge` and `llava push`: a checkpoint leaves the house, with a card that says what it is."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from llava_simplified.export.merge import merge
from llava_simplified.export.model_card import write_card
from llava_simplified.model.config import CONFIG_NAME, read_checkpoint_config


def export_main(argv: list[str] | None = None) -> int:
    """The command line of `llava export`."""
    parser = argparse.ArgumentParser(
        "llava export", description="Write a checkpoint in a form that other tools load."
    )
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--format",
        choices=["hf", "peft", "gguf"],
        default="hf",
        help="stock LLaVA, merged; or with a PEFT adapter; or files for llama.cpp and Ollama",
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="as trained where not given"
    )
    parser.add_argument(
        "--images", nargs="*", default=[], help="pictures to compare the two models on (else noise)"
    )
    parser.add_argument(
        "--model-base", help="the language model, if it is not where it was at training"
    )
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    parser.add_argument(
        "--scores", type=Path, help="scores.json of `llava evaluate`, for the model card"
    )
    args = parser.parse_args(argv)
    if args.scores and not args.scores.is_file():
        raise ValueError(f"--scores {args.scores}: no such file")
    where = {"model_base": args.model_base, "vision_tower": args.vision_tower}
    if args.format == "gguf":
        from llava_simplified.export.gguf import export_gguf

        compared = export_gguf(args.checkpoint, args.output, args.dtype, **where)
    else:
        from llava_simplified.export.stock import export_stock

        adapter = args.format == "peft"
        compared = export_stock(
            args.checkpoint, args.output, args.dtype, args.images, adapter, **where
        )
    write_card(args.checkpoint, args.output, args.format, args.scores)
    print(
        f"{args.output}: loaded back and compared: "
        + ", ".join(f"{k} {v:.3g}" for k, v in compared.items())
    )
    return 0


def merge_main(argv: list[str] | None = None) -> int:
    """The command line of `llava merge`."""
    parser = argparse.ArgumentParser(
        "llava merge", description="Put a checkpoint's adapter into its weights."
    )
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--output", required=True, type=Path, help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--model-base", help="the language model, if it is not where it was at training"
    )
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    args = parser.parse_args(argv)
    merge(**vars(args))
    print(f"{args.output}: of the base models, only those are needed that were not trained")
    return 0


def push_main(argv: list[str] | None = None) -> int:
    """The command line of `llava push`."""
    parser = argparse.ArgumentParser(
        "llava push", description="Upload an exported folder or a checkpoint to the hub."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--private", action="store_true")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be uploaded; needs no network"
    )
    args = parser.parse_args(argv)
    left_out = ["trainer_state/*", "checkpoint-*"]
    if not args.folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        raise ValueError(
            f"a folder and owner/name are needed, not {args.folder} and {args.repository}"
        )
    if (
        args.folder / CONFIG_NAME
    ).is_file():  # a checkpoint as it was trained, which remembers where
        manifest = read_checkpoint_config(args.folder)
        values = map(str, [*manifest["architecture"].values(), *manifest["training"].values()])
        if named := sorted({value for value in values if Path(value).is_absolute()}):
            print(
                f"warning: this tells of your machine {', '.join(named)}; an export does not",
                file=sys.stderr,
            )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of httpx, or what took its place
    from huggingface_hub.utils import filter_repo_objects

    if args.dry_run:
        names = sorted(
            p.relative_to(args.folder).as_posix() for p in args.folder.rglob("*") if p.is_file()
        )
        sizes = {
            name: (args.folder / name).stat().st_size
            for name in filter_repo_objects(names, ignore_patterns=left_out)
        }
        for name, size in sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{sum(sizes.values()):>14,}  bytes to {args.repository}; nothing was sent")
        return 0
    try:
        api = HfApi()
        api.create_repo(args.repository, private=args.private, exist_ok=True)
        print(
            api.upload_folder(
                repo_id=args.repository, folder_path=args.folder, ignore_patterns=left_out
            )
        )
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"the hub did not take {args.folder}: {error}. `hf auth login` stores a token"
        ) from error
    return 0
