"""`llava export`, `llava merge` and `llava push`: write a checkpoint for other tools, and publish it."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

from llava_simplified.model.config import CONFIG_NAME, read_checkpoint_config
from llava_simplified.options import (
    CommandParser,
    add_base_model_options,
    add_trust_option,
    print_text,
)

logger = logging.getLogger(__name__)

# Files of a checkpoint that are only for resuming a run.
_NOT_PUSHED = ["trainer_state/*", "checkpoint-*"]


# ---- llava export ----


def build_export_parser() -> CommandParser:
    """Return the parser of `llava export`."""
    parser = CommandParser(
        "llava export", "Convert a checkpoint to a format that other tools load."
    )
    parser.add_argument("checkpoint", help="Checkpoint folder, as written by `llava train`")
    parser.add_argument("--output", required=True, type=Path, help="Folder to create")
    parser.add_argument(
        "--format",
        choices=["hf", "peft", "gguf"],
        default="hf",
        help="hf: Hugging Face LLaVA (LlavaForConditionalGeneration) with merged adapters; peft: the same "
        "with a separate PEFT adapter; gguf: files for llama.cpp and Ollama (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="Data type of the weights (default: as trained)",
    )
    parser.add_argument(
        "--images",
        nargs="*",
        default=[],
        help="Images for comparing the export with the checkpoint (default: two training images, or "
        "random noise); not for --format gguf, which compares tensors",
    )
    add_base_model_options(parser)
    parser.add_argument(
        "--scores",
        type=Path,
        help="scores.json of `llava evaluate` or `llava benchmark`, for the model card",
    )
    return parser


def export_main(argv: list[str] | None = None) -> int:
    """Run `llava export`."""
    args = build_export_parser().parse_args(argv)
    if args.images and args.format == "gguf":
        raise ValueError(
            "--images: --format gguf compares tensors and needs no images. Leave out the option."
        )
    from llava_simplified.export.model_card import read_scores, write_model_card

    # Read the scores before the conversion, which takes minutes.
    scores = read_scores(args.scores) if args.scores else None
    # Write the card after the export is complete, so that an error in the card does not undo the export.
    result = _export(args)
    write_model_card(args.checkpoint, args.output, args.format, scores)
    print_text(f"{args.output}: exported, loaded again and compared with the checkpoint ({result})")
    return 0


def _export(args: argparse.Namespace) -> str:
    """Write the exported folder; return the result of the comparison with the checkpoint, as text."""
    if args.format == "gguf":
        from llava_simplified.export.gguf_export import export_gguf

        num_tensors = export_gguf(
            args.checkpoint,
            args.output,
            dtype=args.dtype,
            model_base=args.model_base,
            vision_tower=args.vision_tower,
        )
        return f"{num_tensors} tensors are equal"
    from llava_simplified.export.stock import export_stock

    comparison = export_stock(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        images=args.images,
        adapter=args.format == "peft",
        model_base=args.model_base,
        vision_tower=args.vision_tower,
    )
    return str(comparison)


# ---- llava merge ----


def build_merge_parser() -> CommandParser:
    """Return the parser of `llava merge`."""
    parser = CommandParser("llava merge", "Merge the adapters of a checkpoint into its weights.")
    parser.add_argument("checkpoint", help="Checkpoint folder, as written by `llava train`")
    parser.add_argument("--output", required=True, type=Path, help="Folder to create")
    add_base_model_options(parser)
    add_trust_option(parser)
    return parser


def merge_main(argv: list[str] | None = None) -> int:
    """Run `llava merge`."""
    args = build_merge_parser().parse_args(argv)
    from llava_simplified.export.merge import merge_checkpoint

    merge_checkpoint(
        args.checkpoint,
        args.output,
        model_base=args.model_base,
        vision_tower=args.vision_tower,
        trust_remote_code=args.trust_remote_code,
    )
    print_text(
        f"{args.output}: merged. Loading it requires only the base models that were not trained."
    )
    return 0


# ---- llava push ----


def build_push_parser() -> CommandParser:
    """Return the parser of `llava push`."""
    parser = CommandParser(
        "llava push", "Upload an exported folder or a checkpoint to the Hugging Face hub."
    )
    parser.add_argument("folder", type=Path, help="Exported folder, or checkpoint")
    parser.add_argument("repository", help="Repository on the hub: owner/name")
    parser.add_argument("--private", action="store_true", help="Create a private repository")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="List the files that would be uploaded; requires no network",
    )
    return parser


def push_main(argv: list[str] | None = None) -> int:
    """Run `llava push`."""
    args = build_push_parser().parse_args(argv)
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder. Pass an exported folder or a checkpoint.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        raise ValueError(
            f"{args.repository}: not a repository of the hub. Pass its owner and name as owner/name."
        )
    _warn_of_local_paths(args.folder)
    if args.dry_run:
        _list_files(args.folder, args.repository)
        return 0

    from huggingface_hub import HfApi

    # HTTPError is a class of httpx; in older versions of huggingface_hub, it is a class of requests.
    from huggingface_hub.errors import HTTPError

    # Pass exist_ok, so that a second push to the same repository creates a new commit.
    try:
        api = HfApi()
        api.create_repo(args.repository, private=args.private, exist_ok=True)
        # The hub does not change a repository that exists already.
        if args.private and not api.model_info(args.repository).private:
            raise ValueError(
                f"--private: {args.repository} exists already, and is public. Nothing was uploaded. Make it private in its "
                "settings on the hub, or pass another name."
            )
        commit = api.upload_folder(
            repo_id=args.repository, folder_path=args.folder, ignore_patterns=_NOT_PUSHED
        )
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"The upload of {args.folder} failed. If you are not logged in, run `hf auth login`, and push again. "
            f"The error: {error}"
        ) from error
    print_text(str(commit))
    return 0


def _warn_of_local_paths(folder: Path) -> None:
    """Warn if `llava.json` contains local paths or addresses, as in a checkpoint (but not in an exported folder)."""
    if not (folder / CONFIG_NAME).is_file():
        return
    config = read_checkpoint_config(folder)
    # Look for absolute paths, which excludes hub names ("openai/clip-vit-base-patch16") and numbers.
    values = [*config["architecture"].values(), *config["training"].values()]
    texts = {str(value) for value in values}
    found = {text for text in texts if Path(text).is_absolute() or "://" in text}
    if found:
        logger.warning(
            "%s contains local paths or addresses: %s. To publish without them, push an exported folder.",
            CONFIG_NAME,
            ", ".join(sorted(found)),
        )


def _list_files(folder: Path, repository: str) -> None:
    """Print the files that would be uploaded, with their sizes."""
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    # Apply the same filter as `upload_folder`, which never uploads `.git`.
    ignored = [*_NOT_PUSHED, *DEFAULT_IGNORE_PATTERNS]
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    total = 0
    for name in sorted(filter_repo_objects(names, ignore_patterns=ignored)):
        size = (folder / name).stat().st_size
        total += size
        print_text(f"{size:>14,}  {name}")
    print_text(f"{total:>14,}  bytes would be uploaded to {repository}")
