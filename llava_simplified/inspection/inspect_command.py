"""`llava inspect`: show training samples token by token, and the totals of a data file.

Run it before training to see all tokens, which of them are trained, and where the image features are. It uses the same
`Prompt` and `Record` as training, so what it shows is what the model is trained on.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from llava_simplified.options import (
    CommandParser,
    add_image_folder_option,
    add_trust_option,
    escape_control_characters,
)
from llava_simplified.prepare.convert_command import add_sidecar_option

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerFast

    from llava_simplified.data.records import Records
    from llava_simplified.inspection.data_totals import DataTotals
    from llava_simplified.inspection.token_table import SampleView
    from llava_simplified.prompt import Prompt

MAX_PRINTED_PROBLEMS = 10  # further problems are only counted


def build_parser() -> CommandParser:
    """Return the parser of `llava inspect`."""
    parser = CommandParser(
        "llava inspect",
        "Show training samples token by token, and the totals of a data file.",
    )
    parser.add_argument(
        "--data", required=True, help="Records, or any source that `llava convert` reads"
    )
    add_sidecar_option(parser)
    parser.add_argument(
        "--model_name_or_path",
        required=True,
        help="Language model or checkpoint whose tokenizer is used",
    )
    add_trust_option(parser)
    add_image_folder_option(parser, default="images are not opened")
    parser.add_argument(
        "--vision_tower",
        help="Vision tower, for the number of tokens per image (default: an image counts as one token)",
    )
    parser.add_argument(
        "--mm_vision_select_layer",
        type=int,
        nargs="+",
        default=[-2],
        help="Hidden states of the vision tower to use as image features, as in training (default: -2)",
    )
    parser.add_argument(
        "--mm_vision_select_feature",
        default="patch",
        choices=["patch", "cls_patch"],
        help="Features of the vision tower, as in training (default: %(default)s)",
    )
    parser.add_argument(
        "--mm_token_pool",
        type=int,
        default=0,
        help="Average the patch features to a grid with this number of rows and columns, as in training; 0 keeps all "
        "patches (default: %(default)s)",
    )
    parser.add_argument(
        "--image_aspect_ratio",
        default="crop",
        choices=["crop", "pad"],
        help="What to do with images that are not square: crop, or pad to a square (default: %(default)s)",
    )
    parser.add_argument(
        "--template",
        default="auto",
        choices=["auto", "chat", "plain", "bare"],
        help="Prompt template, as in training (default: %(default)s)",
    )
    parser.add_argument(
        "--model_max_length",
        type=int,
        help="Count the examples that are longer than this number of tokens",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=3,
        help="Number of samples to show (default: %(default)s)",
    )
    parser.add_argument(
        "--scan",
        type=int,
        default=20_000,
        help="Number of rows to read for the totals, evenly spread over the file; 0 means all (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `llava inspect`, and return the exit status: 1 if any problem was found, else 0."""
    args = build_parser().parse_args(argv)

    # Import these only now, so that `--help` does not wait for torch and Transformers.
    from rich.console import Console

    from llava_simplified.data.records import Records
    from llava_simplified.data.rows import open_rows
    from llava_simplified.inspection.data_totals import DataTotals, totals_table
    from llava_simplified.inspection.token_table import SampleView
    from llava_simplified.model.build import load_tokenizer
    from llava_simplified.prepare.data_cache import prepare_data
    from llava_simplified.prompt import Prompt

    # Convert the source to records first, as `llava train --data` does.
    data = prepare_data(args.data, args.image_folder, args.sidecar)
    records = Records(open_rows(data.records))
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    prompt = Prompt(tokenizer, args.template)
    vocabulary_problems = _vocabulary_problems(prompt, args.model_name_or_path)
    tokens_per_image = _tokens_per_image(args)

    # Pass highlight=False, because rich would color the numbers and paths in captions.
    console = Console(highlight=False)
    # This cast is safe: `Prompt` has checked that the tokenizer is a fast one.
    fast_tokenizer = cast("PreTrainedTokenizerFast", tokenizer)
    # Without a vision tower, the number of tokens per image is unknown, and the totals count one token per image.
    view = SampleView(fast_tokenizer, prompt, tokens_per_image)
    shown = DataTotals(prompt, tokens_per_image or 1, args.model_max_length)
    scanned = DataTotals(prompt, tokens_per_image or 1, args.model_max_length)
    _show_samples(console, records, view, shown, args)
    _scan(records, scanned, args.scan)
    # Print the totals of the shown samples separately, so that users can compare them with the samples above.
    table = totals_table(
        shown,
        scanned,
        num_rows=len(records),
        model_max_length=args.model_max_length,
    )
    console.print(table)
    # Remove duplicates: a shown row with a problem is usually scanned as well.
    problems = list(dict.fromkeys([*vocabulary_problems, *shown.problems, *scanned.problems]))
    _print_problems(console, problems)
    return 1 if problems else 0


def _vocabulary_problems(prompt: Prompt, name_or_path: str) -> list[str]:
    """Return a list with a message if the embedding table of the model has too few rows for the tokenizer.

    The list is empty if there is no such problem, or if the config of the model is not available.
    """
    from llava_simplified.model.build import check_vocabulary, find_language_model_config

    config = find_language_model_config(name_or_path)
    try:
        check_vocabulary(prompt, config, name_or_path)
    except ValueError as error:
        return [str(error)]
    return []


def _tokens_per_image(args: argparse.Namespace) -> int | None:
    """Return the number of tokens per image of the vision tower; None if no tower is given."""
    if not args.vision_tower:
        return None

    from llava_simplified.model.build import build_vision_tower
    from llava_simplified.model.config import LlavaConfig

    # The name of the language model is required here, but the vision tower does not depend on it.
    config = LlavaConfig(
        args.model_name_or_path,
        args.vision_tower,
        mm_vision_select_layer=tuple(args.mm_vision_select_layer),
        mm_vision_select_feature=args.mm_vision_select_feature,
        mm_token_pool=args.mm_token_pool,
        image_aspect_ratio=args.image_aspect_ratio,
    )
    # Build the tower on the device "meta": from its config only, without reading its weights.
    tower = build_vision_tower(config, device="meta")
    return tower.num_tokens


def _show_samples(
    console: Console,
    records: Records,
    view: SampleView,
    totals: DataTotals,
    args: argparse.Namespace,
) -> None:
    """Print the first samples, and the sizes of their images if there is an image folder."""
    for index in range(min(args.count, len(records))):
        record = totals.add(records, index)
        # `totals` has recorded the problem of an invalid row. It is printed at the end.
        if record is None:
            continue
        console.print(*view.render(record), sep="\n")
        if args.image_folder:
            lines, problems = view.describe_images(record, args.image_folder)
            # Training could not read these images either.
            totals.problems += problems
            # Pass soft_wrap, so that long file names are not broken into two lines.
            console.print(*lines, "", sep="\n", soft_wrap=True)


def _scan(records: Records, totals: DataTotals, max_rows: int) -> None:
    """Add rows to the totals: at most `max_rows`, evenly spread over the file; all rows if `max_rows` is 0.

    The rows are spread because data files are often sorted.
    """
    # Do not round the stride: to get 20,000 of 30,000 rows, use every 1.5th row.
    stride = 1.0
    if max_rows:
        stride = max(1.0, len(records) / max_rows)
    for number in range(round(len(records) / stride)):
        totals.add(records, int(number * stride))


def _print_problems(console: Console, problems: list[str]) -> None:
    """Print the first problems, and the number of the others."""
    from rich.text import Text

    # Print Text instead of str, because rich would interpret "[red]" in a caption as markup.
    for problem in problems[:MAX_PRINTED_PROBLEMS]:
        console.print(Text(escape_control_characters(problem), "red"), soft_wrap=True)
    num_others = len(problems) - MAX_PRINTED_PROBLEMS
    if num_others > 0:
        console.print(Text(f"... and {num_others:,} more problems", "red"))
