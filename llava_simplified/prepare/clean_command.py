"""The command `llava clean`."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from llava_simplified.extras import require_extra
from llava_simplified.options import CommandParser, add_worker_options, print_text
from llava_simplified.prepare.clean_rules import Rules

logger = logging.getLogger(__name__)


def build_parser() -> CommandParser:
    """Return the parser of `llava clean`."""
    parser = CommandParser("llava clean", "Keep the records that training can use.")
    rules = Rules()
    parser.add_argument(
        "records",
        type=Path,
        help="Output folder of `llava download`, or file of records: .json, .jsonl or .parquet",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="Output file for the usable records: .json, .jsonl or .parquet",
    )
    parser.add_argument(
        "--image-folder", type=Path, help="Image folder (default: the folder of the records)"
    )
    parser.add_argument(
        "--vision-tower",
        default="",
        help="Vision tower whose preprocessing every image must support (default: no check)",
    )
    parser.add_argument(
        "--image-aspect-ratio",
        choices=["crop", "pad"],
        default="crop",
        help="Images that are not square: crop, or pad to a square (default: %(default)s)",
    )
    parser.add_argument(
        "--min-side",
        type=int,
        default=rules.min_side,
        help="Minimum length of an image's shorter side in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--max-aspect",
        type=float,
        default=rules.max_aspect,
        help="Maximum ratio of the longer side to the shorter side (default: %(default)s)",
    )
    parser.add_argument(
        "--max-caption",
        type=int,
        default=rules.max_caption,
        help="Maximum length of a caption in characters (default: %(default)s)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=rules.max_pixels,
        help="Maximum number of pixels of an image (default: %(default)s)",
    )
    parser.add_argument(
        "--dedupe",
        choices=["exact", "perceptual"],
        default="",
        help="Keep only the first of equal files (exact), or of similar images (perceptual)",
    )
    parser.add_argument(
        "--compact",
        type=Path,
        metavar="FOLDER",
        help="Also write the images of the usable records, shrunk, to shards in this folder",
    )
    parser.add_argument(
        "--compact-size",
        default="224",
        help="Shorter side of the images of --compact in pixels, or `exact` to copy them unchanged (default: %(default)s)",
    )
    add_worker_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava clean` and return the exit status: 1 if no record is usable."""
    args = build_parser().parse_args(argv)
    if args.compact_size != "exact" and not args.compact_size.isdecimal():
        raise ValueError(
            f"--compact-size {args.compact_size}: expected a number of pixels, or the word exact"
        )
    require_extra("download", "pyarrow", purpose="llava clean")

    from llava_simplified.prepare.clean import clean
    from llava_simplified.workers import check_workers

    check_workers(args.workers)
    rules = Rules(
        min_side=args.min_side,
        max_aspect=args.max_aspect,
        max_caption=args.max_caption,
        max_pixels=args.max_pixels,
        perceptual=args.dedupe == "perceptual",
    )
    counts = clean(
        args.records,
        args.output,
        image_folder=args.image_folder,
        vision_tower=args.vision_tower,
        image_aspect_ratio=args.image_aspect_ratio,
        rules=rules,
        dedupe=args.dedupe,
        compact=args.compact,
        compact_size=0 if args.compact_size == "exact" else int(args.compact_size),
        engine=args.engine,
        workers=args.workers,
        shards=args.shards,
        progress=logger.isEnabledFor(logging.INFO),
    )
    for reason, count in Counter(counts).most_common():
        print_text(f"{count:>9,} {reason or 'ok'}")
    # A slice writes no output. The last call, without --shards, writes it.
    if args.shards:
        return 0
    num_kept = counts.get("ok", 0)
    print_text(f"{num_kept:>9,} records -> {args.output}")
    if num_kept:
        return 0
    logger.error(
        "No record is usable. The counts above show the reasons; %s_quarantine.jsonl lists each record with its reason.",
        args.output.with_suffix(""),
    )
    return 1
