"""The commands `llava convert` and `llava reduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_simplified.options import CommandParser, print_text
from llava_simplified.prepare.record_writer import INSTRUCTION
from llava_simplified.prepare.source_rows import Columns


def add_column_options(parser: Any) -> None:
    """Add `--url-column`, `--image-column` and `--caption-column`, for sources with unusual column names."""
    for column in Columns._fields:
        parser.add_argument(
            f"--{column}-column",
            default="",
            metavar="NAME",
            help=f"Name of the {column} column (default: detected by the usual names)",
        )


def add_sidecar_option(parser: Any) -> None:
    """Add `--sidecar`; see `SidecarOptions.parse`."""
    parser.add_argument(
        "--sidecar",
        default="",
        help="Suffix of the caption files beside images: txt or caption (default: both). Add `lines` if each line is a "
        "separate caption, as in caption,lines",
    )


def build_parser() -> CommandParser:
    """Return the parser of `llava convert`."""
    parser = CommandParser("llava convert", "Convert any source of captions to records.")
    parser.add_argument(
        "source",
        help="TSV, CSV, JSON, JSON Lines, Parquet or tar file, a folder of these files, a folder of images with caption "
        "files (a.txt beside a.jpg), a glob pattern, or a URL",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="Output file of records: .json, .jsonl or .parquet",
    )
    parser.add_argument(
        "--image-folder", type=Path, help="Keep only rows whose image is in this folder"
    )
    parser.add_argument(
        "--instruction",
        help="Instruction (user message) for every record except conversations, or a .txt file with one instruction "
        f'template per line (default: "{INSTRUCTION}" for captions; instructions in the source are kept)',
    )
    parser.add_argument(
        "--split",
        default="",
        help="Write several files: val=0.01 moves 1%% of the images to OUTPUT_val, `source` uses the column or "
        "key `split` of the source",
    )
    add_column_options(parser)
    add_sidecar_option(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava convert` and return the exit status."""
    args = build_parser().parse_args(argv)

    from llava_simplified.prepare.convert import convert

    counts, issues = convert(
        args.source,
        args.output,
        image_folder=args.image_folder,
        instruction=args.instruction,
        split=args.split,
        columns=Columns(args.url_column, args.image_column, args.caption_column),
        sidecar=args.sidecar,
    )
    for path, count in counts.items():
        print_text(f"{count:>9,} records -> {path}")
    for line in issues.lines():
        print_text(line)
    return 0


def build_reduce_parser() -> CommandParser:
    """Return the parser of `llava reduce`."""
    parser = CommandParser("llava reduce", "Draw a random sample from a file of records.")
    parser.add_argument("records", type=Path, help="File of records: .json, .jsonl or .parquet")
    parser.add_argument("--count", type=int, required=True, help="Number of records to draw")
    parser.add_argument("--seed", type=int, default=0, help="Random seed (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        help="Output file (default: the name of the input with _COUNT added)",
    )
    return parser


def reduce_main(argv: list[str] | None = None) -> int:
    """Run `llava reduce` and return the exit status."""
    args = build_reduce_parser().parse_args(argv)

    from llava_simplified.prepare.convert import reduce

    records: Path = args.records
    output = args.output or records.with_name(f"{records.stem}_{args.count}{records.suffix}")
    count = reduce(records, output, args.count, args.seed)
    print_text(f"{count:>9,} records -> {output}")
    return 0
