"""`llava import`: convert a LLaVA checkpoint of another code base."""

from __future__ import annotations

from pathlib import Path

from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.options import CommandParser, print_text


def build_parser() -> CommandParser:
    """Return the parser of `llava import`."""
    parser = CommandParser(
        "llava import",
        "Convert a LLaVA checkpoint of another code base. For a Hugging Face LLaVA folder, the result is "
        "compared with the source in Transformers, and is kept only if both produce the same outputs.",
    )
    parser.add_argument(
        "source", type=Path, help="Folder of the checkpoint, or an mm_projector.bin file"
    )
    parser.add_argument("--output", required=True, type=Path, help="Folder to create")
    parser.add_argument(
        "--model-base", help="Base language model of a LoRA adapter or a single projector"
    )
    parser.add_argument(
        "--vision-tower",
        help="Vision tower that the model was trained from (default: the path or name in the checkpoint)",
    )
    parser.add_argument(
        "--template",
        choices=["auto", "chat", "plain", "bare"],
        default="auto",
        help="Prompt template used in training; auto: the tokenizer's chat template if it has one, "
        "else plain (default: %(default)s)",
    )
    parser.add_argument(
        "--instruction",
        default=DEFAULT_INSTRUCTION,
        help="Default instruction of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--image-aspect-ratio",
        choices=["crop", "pad"],
        help="Images that are not square: crop, or pad to a square (default: the setting of the source)",
    )
    parser.add_argument(
        "--check-images",
        type=Path,
        metavar="DIR",
        help="Folder with images for the comparison with Transformers (default: two generated images)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava import`."""
    options = vars(build_parser().parse_args(argv))
    from llava_simplified.export.import_checkpoint import import_checkpoint

    for line in import_checkpoint(**options):
        print_text(line)
    print_text(f"-> {options['output']}")
    return 0
