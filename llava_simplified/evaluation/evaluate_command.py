"""`llava evaluate`: prediction files and references in, scores and a report out."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_simplified.data.images import read_image_bytes
from llava_simplified.evaluation.evaluation_report import Run, write_report
from llava_simplified.evaluation.metrics import HEADLINES, Evaluation, Scores, evaluate
from llava_simplified.evaluation.predictions import (
    read_predictions,
    read_references,
    read_train_captions,
)


def table(result: Evaluation) -> str:
    """The scores as text, a metric a line."""
    several = len(result.trials) > 1
    columns: list[tuple[str, Scores]] = [
        (f"trial {n}", scores) for n, scores in enumerate(result.trials, 1)
    ]
    columns = [*columns, ("best of trials", result.best)] if several else []
    columns += [("shuffled", result.shuffled), ("unseen only", result.unseen)]
    columns = [(title, scores) for title, scores in columns if scores]
    lines = [
        [
            "metric",
            "mean" if several else "score",
            "95 % interval",
            *(title for title, _ in columns),
        ]
    ]
    for name in (name for name in HEADLINES if name in result.mean):
        value, low, high = result.mean[name]
        interval = "" if math.isnan(low) else f"{low:.4f} to {high:.4f}"
        others = [f"{scores[name].value:.4f}" if name in scores else "" for _, scores in columns]
        lines.append([name, f"{value:.4f}", interval, *others])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    ]
    rows += [f"{name}: {100 * value:.1f} %" for name, value in result.shares.items()]
    rows += [f"note: {note}" for note in result.notes]
    return "\n".join([f"{result.pictures} pictures", *rows, ""])


def as_json(result: Evaluation) -> dict[str, object]:
    """The scores for a file, without those of single pictures: metric -> [value, low, high]."""

    def numbers(scores: Scores) -> dict[str, list[float | None]]:
        return {
            name: [None if math.isnan(x) else x for x in score] for name, score in scores.items()
        }

    parts = {key: numbers(getattr(result, key)) for key in ("mean", "best", "shuffled", "unseen")}
    trials = [numbers(scores) for scores in result.trials]
    counts = {"pictures": result.pictures, "shares": result.shares, "notes": result.notes}
    return {**counts, **parts, "trials": trials}


def run_names(paths: Sequence[Path]) -> list[str]:
    """What to call the runs: the files' stems or, where these are the same, their folders' names."""
    for names in ([path.stem for path in paths], [path.resolve().parent.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _model_settings(folder: Path) -> dict[str, str]:
    """What the checkpoint says of its parts and of its training, for the report."""
    from llava_simplified.model.config import read_checkpoint_config

    manifest = read_checkpoint_config(folder)
    parts = {
        key: value for key, value in manifest["architecture"].items() if key != "weights_digests"
    }
    return {key: str(value) for key, value in {**parts, **manifest["training"]}.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava evaluate", description="Score predictions against references."
    )
    add = parser.add_argument
    add(
        "predictions",
        nargs="+",
        type=Path,
        help="predictions.json or .jsonl; several files are compared",
    )
    add("--references", type=Path, help="COCO caption JSON, in place of the rows' gt_caption")
    add(
        "--train-captions",
        type=Path,
        help="the training records: how much is novel, how much was never seen",
    )
    add("--image-folder", type=Path, default=Path(), help="where the pictures are")
    add("--clip", type=Path, metavar="FOLDER", help="a CLIP model's folder: adds CLIPScore")
    add("--output", type=Path, help="write the scores as JSON")
    add("--report", type=Path, help="write one self-contained HTML file")
    add("--log", type=Path, help="trainer_log.jsonl, whose curves the report shows")
    add(
        "--model-path",
        type=Path,
        help="the checkpoint that wrote them: its settings and its log go into the report",
    )
    add("--title", default="Captions, scored", help="of the report")
    add("--resamples", type=int, default=1000, help="of the bootstrap; 0 for no intervals")
    add("--seed", type=int, default=0, help="of the bootstrap and of the shuffled pictures")
    add("--no-java", action="store_true", help="leave METEOR and SPICE out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """`llava evaluate`: print the scores of prediction files; write them and an HTML report."""
    options = _parser().parse_args(argv)
    references = read_references(options.references) if options.references else None
    known = read_train_captions(options.train_captions) if options.train_captions else None
    if all(
        path.stem[-1:].isdigit() for path in options.predictions
    ):  # a shell puts step-1000 before step-500
        options.predictions.sort(key=lambda path: int(re.findall(r"\d+", path.stem)[-1]))
    runs = []
    for path, name in zip(options.predictions, run_names(options.predictions)):
        samples = read_predictions(path, references)
        images = (
            [read_image_bytes(s.image, options.image_folder) for s in samples]
            if options.clip
            else []
        )
        result = evaluate(
            samples,
            train_captions=known,
            clip=options.clip,
            images=images,
            java=not options.no_java,
            resamples=options.resamples,
            seed=options.seed,
        )
        runs.append(Run(name, samples, result))
        sys.stdout.write(f"{name}: {table(result)}\n")
    if options.output:
        scores = {run.name: as_json(run.result) for run in runs}
        options.output.write_text(
            json.dumps(scores, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    if options.report:
        settings = {
            "predictions": ", ".join(map(str, options.predictions)),
            "references": str(options.references or "gt_caption of the rows"),
            "training captions": str(options.train_captions or "not given"),
            "bootstrap": f"{options.resamples} resamples, seed {options.seed}",
            **(_model_settings(options.model_path) if options.model_path else {}),
        }
        log = options.log or (
            options.model_path / "trainer_log.jsonl" if options.model_path else None
        )
        write_report(
            options.report,
            title=options.title,
            runs=runs,
            image_folder=options.image_folder,
            settings=settings,
            log=log,
            train_captions=known,
        )
        sys.stdout.write(f"report: {options.report}\n")
    return 0
