"""`llava pairs`: make preference pairs from sampled captions, by reward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from llava_simplified.jobs import prepare_output_file
from llava_simplified.options import CommandParser, add_image_folder_option, print_text
from llava_simplified.training_options import TrainingDefaults

if TYPE_CHECKING:
    from llava_simplified.data.records import Records


def build_parser() -> CommandParser:
    """Return the parser of `llava pairs`."""
    parser = CommandParser(
        "llava pairs",
        "Make preference pairs from sampled captions: of two captions of an image, the one with the higher reward is "
        "chosen, and the other one is rejected.",
    )
    parser.add_argument(
        "predictions",
        type=Path,
        help="Prediction file of `llava predict --trials N --temperature 1`",
    )
    parser.add_argument(
        "--data-path",
        type=Path,
        required=True,
        help="The records that were captioned, with their references",
    )
    add_image_folder_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="Output file of pairs, .json or .jsonl, for `llava train --objective dpo`",
    )
    parser.add_argument(
        "--reward",
        default="cider",
        help="Rewards with weights, as for `llava train`, such as cider=1.0,length=0.1 (default: %(default)s)",
    )
    parser.add_argument(
        "--pairing",
        choices=("best_worst", "ranked"),
        default="best_worst",
        help="Which captions of an image are compared. best_worst: those with the highest and the lowest reward. ranked: "
        "also the second highest with the second lowest, and so on (default: %(default)s)",
    )
    parser.add_argument(
        "--min-difference",
        type=float,
        default=0.0,
        help="Minimum difference between the rewards of the chosen and the rejected caption (default: %(default)s)",
    )
    _add_reward_options(parser)
    return parser


def _add_reward_options(parser: CommandParser) -> None:
    """Add those options of `llava train` that only some rewards need."""
    group = parser.add_argument_group("options of particular rewards")
    for option in fields(TrainingDefaults):
        if option.name.startswith("reward_"):
            shown_default = " (default: %(default)s)" if option.default else ""
            group.add_argument(
                f"--{option.name.replace('_', '-')}",
                type=type(option.default),
                default=option.default,
                help=option.metadata["help"] + shown_default,
            )


def _references(records: Records) -> Iterator[tuple[str, ...]]:
    """Yield the references of all good records. `cider` counts n-grams in all of them, not only in those with samples."""
    # Import this only now, because most rewards do not need it, and it imports torch.
    from llava_simplified.data.dataset import drop_bad_records
    from llava_simplified.data.records import ALL_RECORDS

    for record in drop_bad_records(records, ALL_RECORDS):
        yield record.responses


def main(argv: list[str] | None = None) -> int:
    """Run `llava pairs`: write the pairs, and print what became of the records."""
    args = build_parser().parse_args(argv)

    # Import these only now, so that `--help` does not wait for numpy and Transformers.
    from llava_simplified.data.records import ALL_RECORDS, open_records
    from llava_simplified.training.make_pairs import SUFFIXES, read_samples, write_pairs
    from llava_simplified.training.rewards import Reward, RewardOptions

    if args.output.suffix not in SUFFIXES:
        raise ValueError(f"--output {args.output}: unsupported suffix; use .json or .jsonl")
    prepare_output_file(args.output)
    if not args.min_difference >= 0:  # written this way, because a NaN must fail too
        raise ValueError(f"--min-difference {args.min_difference:g}: expected 0 or more.")
    # `llava predict` leaves out bad records, so there are no predictions for them. They must stay in the file: without
    # them, the predictions would have the wrong indices.
    records = open_records(args.data_path, max_bad_records=ALL_RECORDS)
    samples = read_samples(args.predictions, records)
    reward = Reward(args.reward, _references(records), RewardOptions.from_arguments(args))
    data_path: Path = args.data_path
    folder_of_records = data_path if data_path.is_dir() else data_path.parent
    image_folder = Path(args.image_folder or folder_of_records)
    counts = write_pairs(
        samples,
        records,
        reward,
        args.output,
        image_folder=image_folder,
        pairing=args.pairing,
        min_difference=args.min_difference,
    )
    num_pairs = counts.pop("pairs")
    print_text(f"{num_pairs:>9,} pairs -> {args.output}")
    for reason, count in counts.items():
        print_text(f"{count:>9,} records {reason}, without a pair")
    return 0
