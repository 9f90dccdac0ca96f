"""`llava evaluate`: score prediction files, and write the scores and a report."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_simplified.evaluation.run_names import name_runs, sort_by_step
from llava_simplified.jobs import prepare_output_file
from llava_simplified.options import (
    CommandParser,
    add_image_folder_option,
    check_at_least,
    print_text,
)

if TYPE_CHECKING:
    from llava_simplified.evaluation.bootstrap import Scores
    from llava_simplified.evaluation.comparison import Comparison
    from llava_simplified.evaluation.evaluation_report import Run
    from llava_simplified.evaluation.metrics import Evaluation

logger = logging.getLogger(__name__)

_MAX_TRIAL_COLUMNS = 5


def build_parser() -> CommandParser:
    """Return the parser of `llava evaluate`."""
    parser = CommandParser("llava evaluate", "Score predictions against reference captions.")
    parser.add_argument(
        "predictions",
        nargs="+",
        type=Path,
        help="Prediction files (.json or .jsonl), or COCO results with --references; the first file is "
        "the baseline with which the others are compared",
    )
    parser.add_argument(
        "--references",
        type=Path,
        help="COCO caption file or records with the references (default: gt_caption of the "
        "predictions)",
    )
    parser.add_argument(
        "--instances",
        type=Path,
        action="append",
        default=[],
        help="COCO instance annotations (instances_val2014.json), for CHAIR, the fraction of mentioned objects that "
        "are not in the image; repeat the option to pass several files",
    )
    parser.add_argument(
        "--train-captions",
        type=Path,
        help="Training records, to count the captions and references that do not occur in them",
    )
    add_image_folder_option(parser, default="the current folder")
    parser.add_argument("--output", type=Path, help="Output file (JSON) for the scores")
    parser.add_argument("--report", type=Path, help="Output file (HTML) for a report")
    parser.add_argument(
        "--log",
        type=Path,
        help="Training log (trainer_log.jsonl), for the curves in the report (default: the log in "
        "--model-path)",
    )
    parser.add_argument(
        "--model-path",
        type=Path,
        help="Checkpoint that generated the predictions, for its settings and curves in the report",
    )
    parser.add_argument(
        "--title",
        default="Caption evaluation",
        help="Title of the report (default: %(default)s)",
    )
    add_scoring_options(parser)
    return parser


def add_scoring_options(parser: CommandParser) -> None:
    """Add the scoring options that `llava evaluate` and `llava benchmark` share."""
    parser.add_argument(
        "--clip",
        type=Path,
        metavar="FOLDER",
        help="Folder of a CLIP model, for CLIPScore and RefCLIPScore",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        help="Number of bootstrap resamples for the intervals; 0: no intervals (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Random seed of the bootstrap and the shuffled captions (default: %(default)s)",
    )
    parser.add_argument(
        "--no-java",
        action="store_true",
        help="Skip METEOR and SPICE, which require Java",
    )


def check_scoring_options(args: argparse.Namespace) -> None:
    """Raise ValueError if a number among the options of `add_scoring_options` is out of range."""
    check_at_least(0, resamples=args.resamples, seed=args.seed)


def main(argv: list[str] | None = None) -> int:
    """Run `llava evaluate`: print the scores, and write the output files."""
    args = build_parser().parse_args(argv)
    check_scoring_options(args)
    paths = sort_by_step(args.predictions)
    _check_files(args)
    for output in (args.output, args.report):
        if output:
            prepare_output_file(output)

    # Import this only now, so that `--help` does not wait for numpy and Transformers.
    from llava_simplified.evaluation.predictions import read_train_captions

    # Read what the report shows first: scoring can take minutes.
    settings = _report_settings(args, paths)
    log = _training_log(args)
    train_captions = read_train_captions(args.train_captions) if args.train_captions else None
    # Score all files before writing anything, so that an error in the second file leaves no partial report.
    runs = _evaluate_files(paths, args, train_captions)
    comparisons = _compare_with_first(runs)

    if args.output:
        scores = {run.name: to_json(run.result) for run in runs}
        for name, comparison in comparisons.items():
            scores[name]["compared with"] = comparison_to_json(runs[0], comparison)
        # Do not escape characters of other languages, so that people can read the file.
        text = json.dumps(scores, indent=1, ensure_ascii=False)
        args.output.write_text(replace_surrogates(text), encoding="utf-8")
        logger.info("Scores written to %s", args.output)
    if args.report:
        from llava_simplified.evaluation.evaluation_report import write_report

        write_report(
            args.report,
            title=args.title,
            runs=runs,
            comparisons=comparisons,
            image_folder=Path(args.image_folder or "."),
            settings=settings,
            log=log,
            train_captions=train_captions,
        )
        logger.info("Report written to %s", args.report)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Raise ValueError if a prediction file is given twice, or if an output would replace another file of this command."""
    # `resolve` makes different spellings of a path equal.
    used: dict[Path, str] = {}
    for path in args.predictions:
        if path.resolve() in used:
            raise ValueError(f"{path} is given twice. Pass each prediction file once.")
        used[path.resolve()] = "the predictions"
    inputs = {
        "--references": [args.references],
        "--instances": args.instances,
        "--train-captions": [args.train_captions],
        "--log": [args.log],
    }
    for option, paths in inputs.items():
        for path in paths:
            if path:
                used[path.resolve()] = option
    for option, path in (("--output", args.output), ("--report", args.report)):
        if not path:
            continue
        other = used.get(path.resolve())
        if other:
            raise ValueError(
                f"{option} {path} would replace a file of {other}. Choose another file."
            )
        used[path.resolve()] = option


def _evaluate_files(
    paths: Sequence[Path], args: argparse.Namespace, train_captions: set[str] | None
) -> list[Run]:
    """Score all files. Later files are put into the image order of the first one, if they have the same images."""
    from llava_simplified.evaluation.chair import annotated_objects, read_instances
    from llava_simplified.evaluation.comparison import align_samples
    from llava_simplified.evaluation.evaluation_report import Run
    from llava_simplified.evaluation.metrics import evaluate
    from llava_simplified.evaluation.predictions import read_predictions, read_sample_images
    from llava_simplified.evaluation.references import read_references

    # Read these once for all files.
    references = read_references(args.references) if args.references else None
    instances = read_instances(args.instances) if args.instances else None
    image_folder = Path(args.image_folder or ".")
    runs: list[Run] = []
    for path, name in zip(paths, name_runs(paths)):
        predictions = read_predictions(path, references)
        samples = predictions.samples
        if runs:
            # The paired bootstrap identifies an image by its position, so all runs must have the same order.
            # A file with other images keeps its order; it is scored, but not compared.
            samples = align_samples(samples, runs[0].samples) or samples
        images: list[bytes] = []
        if args.clip:  # only CLIPScore needs the images
            images = read_sample_images(samples, image_folder)
        annotated = None
        if instances is not None:
            annotated = annotated_objects([sample.image for sample in samples], instances)
        result = evaluate(
            samples,
            train_captions=train_captions,
            clip=args.clip,
            images=images,
            annotated=annotated,
            java=not args.no_java,
            resamples=args.resamples,
            seed=args.seed,
        )
        # Put the notes about the files before those about the metrics.
        result.notes[:0] = predictions.notes
        result.counts = predictions.counts
        runs.append(Run(name, samples, result))
        print_text(f"{name}: {format_table(result)}")
    return runs


def _compare_with_first(runs: Sequence[Run]) -> dict[str, Comparison]:
    """Compare each run with the first one, and print the differences.

    Returns:
        The comparisons by the name of the later run. A run on other images or references has no comparison.
    """
    from llava_simplified.evaluation.comparison import (
        align_samples,
        compare_runs,
        format_comparison,
    )

    # The first file is the baseline. A series of checkpoints is compared with its first checkpoint.
    first = runs[0]
    comparisons = {}
    for run in runs[1:]:
        if align_samples(run.samples, first.samples) is None:
            text = f"{run.name} and {first.name} contain different images or references, so they are not compared.\n"
        else:
            comparison = compare_runs(first.samples, first.result, run.samples, run.result)
            comparisons[run.name] = comparison
            text = format_comparison(first.name, run.name, len(run.samples), comparison)
        print_text(text)
    return comparisons


def _report_settings(args: argparse.Namespace, paths: Sequence[Path]) -> dict[str, str]:
    """Return the settings that the report shows."""
    settings = {
        "predictions": ", ".join(map(str, paths)),
        "references": str(args.references or "gt_caption of the predictions"),
        "training captions": str(args.train_captions or "not given"),
        "bootstrap": f"{args.resamples} resamples, seed {args.seed}",
    }
    if args.model_path:  # add the training settings
        settings |= _checkpoint_settings(args.model_path)
    return settings


def _checkpoint_settings(folder: Path) -> dict[str, str]:
    """Return the settings of a checkpoint: its architecture and training options."""
    from llava_simplified.model.config import read_checkpoint_config

    config = read_checkpoint_config(folder)
    settings = {}
    for name, value in {**config["architecture"], **config["training"]}.items():
        if isinstance(value, dict):  # skip the digests of the weights, which are not informative
            continue
        settings[name] = str(value)
    return settings


def _training_log(args: argparse.Namespace) -> Path | None:
    """Return the log for the curves in the report: `--log`, or the log of the checkpoint, or None.

    Raises:
        ValueError: `--log` is not a training log.
    """
    if args.log:
        from llava_simplified.evaluation.training_curves import read_training_log

        read_training_log(args.log)
        return args.log
    if args.model_path:
        log = args.model_path / "trainer_log.jsonl"
        if log.is_file():  # a checkpoint from `llava import` has no log
            return log
    return None


# ---- output ----


def format_table(result: Evaluation) -> str:
    """Return the scores as text, with one line for each metric."""
    from llava_simplified.evaluation.comparison import align_columns
    from llava_simplified.evaluation.metrics import METRIC_NAMES

    columns = _extra_columns(result)
    header = ["metric", "score", "95 % interval"]
    if len(result.trials) > 1:
        header[1] = "mean"
    for title, _ in columns:
        header.append(title)
    lines = [header]
    for name in METRIC_NAMES:
        # Metrics that were not computed, such as CLIPScore without --clip, have no line.
        if name not in result.mean:
            continue
        value, low, high = result.mean[name]
        interval = ""
        if not math.isnan(low):
            interval = f"{low:.4f} to {high:.4f}"
        cells = [name, f"{value:.4f}", interval]
        for _, scores in columns:
            # Leave the cell empty for CLIPScore, CHAIR and the Java metrics, which are not computed for shuffled
            # captions and for unseen images.
            cell = ""
            if name in scores:
                cell = f"{scores[name].value:.4f}"
            cells.append(cell)
        lines.append(cells)

    rows = [f"{result.num_images} images"]
    rows += align_columns(lines)
    for name, value in result.shares.items():
        rows.append(f"{name}: {100 * value:.1f} %")
    rows += _format_text_statistics(result)
    for note in result.notes:
        rows.append(f"note: {note}")
    return "\n".join(rows) + "\n"


def _extra_columns(result: Evaluation) -> list[tuple[str, Scores]]:
    """Return the columns after the mean and its interval, with their titles."""
    columns: list[tuple[str, Scores]] = []
    if len(result.trials) > 1:
        # The scores of more trials would not fit on a line; `--output` has them.
        if len(result.trials) <= _MAX_TRIAL_COLUMNS:
            for number, scores in enumerate(result.trials, 1):
                columns.append((f"trial {number}", scores))
        columns.append(("best of trials", result.best))
    if result.shuffled:
        columns.append(("shuffled", result.shuffled))
    if result.unseen:
        columns.append(("unseen only", result.unseen))
    return columns


def _format_text_statistics(result: Evaluation) -> list[str]:
    """Return length, variety and repetition as lines of text, each with the value of the references."""
    rows = []
    for name, value in result.text.items():
        reference_value = result.reference_text[name]
        rows.append(f"{name}: {value:.4g} (references: {reference_value:.4g})")
    return rows


def to_json(result: Evaluation) -> dict[str, object]:
    """Return the corpus scores as JSON values, without the scores per image.

    A score is a list [value, low, high]. Numbers that were not computed are null.
    """
    return {
        "images": result.num_images,
        "shares": result.shares,
        "notes": result.notes,
        "counts": result.counts,
        "text": {"captions": result.text, "references": result.reference_text},
        "mean": _scores_to_json(result.mean),
        "best": _scores_to_json(result.best),
        "shuffled": _scores_to_json(result.shuffled),
        "unseen": _scores_to_json(result.unseen),
        "trials": list(map(_scores_to_json, result.trials)),
    }


def _scores_to_json(scores: Scores) -> dict[str, list[float | None]]:
    """Return each score as [value, low, high]."""
    converted: dict[str, list[float | None]] = {}
    for name, score in scores.items():
        # Replace NaN (an interval that was not computed) with null, because JSON does not support NaN.
        converted[name] = [None if math.isnan(number) else number for number in score]
    return converted


def comparison_to_json(first: Run, comparison: Comparison) -> dict[str, object]:
    """Return a comparison with the first run as JSON values, with every image whose captions changed."""
    differences = {}
    for name, difference in comparison.differences.items():
        differences[name] = {
            "difference": _scores_to_json({name: difference.score})[name],
            "better": difference.num_better,
            "worse": difference.num_worse,
            "equal": difference.num_equal,
        }
    changed = []
    for image in comparison.changed:
        sample = first.samples[image.position]
        row = {"index": sample.index, "image": sample.image, "differences": image.differences}
        changed.append(row)
    return {"run": first.name, "differences": differences, "changed images": changed}


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates with "?". File names can contain them, but UTF-8 cannot encode them."""
    return text.encode("utf-8", "replace").decode("utf-8")
