"""The commands `llava download` and `llava merge-manifests`."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import fields
from typing import Any

from llava_simplified.extras import require_extra
from llava_simplified.options import CommandParser, add_limit_option, add_worker_options, print_text
from llava_simplified.prepare.convert_command import add_column_options
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prepare.source_rows import Columns

logger = logging.getLogger(__name__)

_MODULES = ("aiohttp", "aiodns", "fsspec", "pyarrow")  # installed by the extra "download"


def build_parser() -> CommandParser:
    """Return the parser of `llava download`."""
    parser = CommandParser("llava download", "Download the images of a list of URLs.")
    parser.add_argument(
        "source",
        help="TSV, CSV, JSON, JSON Lines, Parquet, a folder of these files, or a glob pattern",
    )
    parser.add_argument(
        "--output", required=True, help="Output folder, or a URL that fsspec can write to"
    )
    parser.add_argument(
        "--output-format",
        choices=["shards", "files"],
        default="shards",
        help="`shards` writes tar shards with manifests, `files` a folder of plain images (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size", type=int, default=10_000, help="Rows per shard (default: %(default)s)"
    )
    add_limit_option(parser, "rows")
    parser.add_argument(
        "--retry",
        default="",
        metavar="KINDS",
        help="Fetch failed URLs of earlier runs again: `all`, or kinds of failures such as timeout,5xx,dns",
    )
    _add_fetch_options(parser)
    add_column_options(parser)
    add_worker_options(parser)
    return parser


def _add_fetch_options(parser: CommandParser) -> None:
    """Add the options that become `FetchOptions`."""
    group = parser.add_argument_group("requests")
    defaults = FetchOptions()
    group.add_argument(
        "--concurrency",
        type=int,
        default=defaults.concurrency,
        help="Maximum number of requests in flight per shard (default: %(default)s)",
    )
    group.add_argument(
        "--per-host",
        type=int,
        default=defaults.per_host,
        help="Maximum number of requests in flight per host, for each shard (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout,
        help="Maximum time per image in seconds, including redirects (default: %(default)s)",
    )
    group.add_argument(
        "--retries",
        type=int,
        default=defaults.retries,
        help="Number of retries in the same run after a connection reset, 429 or 5xx (default: %(default)s)",
    )
    group.add_argument(
        "--max-bytes",
        type=int,
        default=defaults.max_bytes,
        help="Maximum size of an image file in bytes (default: %(default)s)",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=defaults.max_pixels,
        help="Maximum number of pixels of an image (default: %(default)s)",
    )
    group.add_argument(
        "--resize",
        type=int,
        default=defaults.resize,
        help="Shrink images to this length of the shorter side in pixels; 0 stores the files unchanged"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--user-agent-contact",
        dest="contact",
        default=defaults.contact,
        help="Your URL or email address, sent to the servers in the User-Agent header",
    )
    group.add_argument("--robots", action="store_true", help="Obey each host's robots.txt")
    group.add_argument(
        "--allow-private",
        action="store_true",
        help="Allow requests to private addresses, for example to your own mirror",
    )


def main(argv: list[str] | None = None) -> int:
    """Run `llava download` and return the exit status: 1 if no image was downloaded, although there were rows."""
    args = build_parser().parse_args(argv)
    require_extra("download", *_MODULES, purpose="llava download")

    from llava_simplified.prepare.download import download
    from llava_simplified.prepare.download_progress import failure_advice

    output = args.output.rstrip("/")
    report = download(
        args.source,
        output,
        FetchOptions(**{field.name: getattr(args, field.name) for field in fields(FetchOptions)}),
        columns=Columns(args.url_column, args.image_column, args.caption_column),
        files=args.output_format == "files",
        shard_size=args.shard_size,
        limit=args.limit or 0,
        retry=tuple(kind for kind in args.retry.split(",") if kind),
        engine=args.engine,
        workers=args.workers,
        shards=args.shards,
        progress=logger.isEnabledFor(logging.INFO),
    )
    _print_report(report, output)
    outcomes = report["outcomes"]
    if not outcomes or outcomes.get("ok"):  # a slice may have no shards
        return 0
    # Print advice about the most frequent failure only.
    most_frequent = max(outcomes, key=lambda kind: outcomes[kind])
    advice = failure_advice(most_frequent, "Look up the details in the Parquet manifests.")
    print_text(f"No image was downloaded. {advice}", file=sys.stderr)
    return 1


def build_merge_parser() -> CommandParser:
    """Return the parser of `llava merge-manifests`."""
    parser = CommandParser(
        "llava merge-manifests",
        "Write the manifest, records and report of a download whose shards were fetched by several jobs.",
    )
    parser.add_argument(
        "output", help="Folder that the `llava download` jobs wrote: their --output"
    )
    return parser


def merge_main(argv: list[str] | None = None) -> int:
    """Run `llava merge-manifests` and return the exit status: 1 if shards are unfinished."""
    args = build_merge_parser().parse_args(argv)
    require_extra("download", *_MODULES, purpose="llava merge-manifests")

    from llava_simplified.prepare.download import merge_manifests

    output = args.output.rstrip("/")
    report = merge_manifests(output)
    _print_report(report, output)
    return 1 if "missing_shards" in report else 0


def _print_report(report: dict[str, Any], output: str) -> None:
    """Print the number of rows by outcome, the issues of the source, and the number of unfinished shards."""
    outcomes = report["outcomes"]
    for kind, count in Counter(outcomes).most_common():
        print_text(f"{count:>9,} {kind}")
    print_text(f"{sum(outcomes.values()):>9,} rows -> {output}")
    # Print the issues of the source. The report of a slice has no settings, and therefore no issues.
    for line in report.get("settings", {}).get("oddities", ()):
        print_text(line)
    missing = report.get("missing_shards")
    if missing:
        print_text(f"{missing:>9,} shards are not finished yet")
