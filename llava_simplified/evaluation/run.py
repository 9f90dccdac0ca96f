"""`llava evaluate`: prediction files and references in, scores and a report out."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_simplified.data.images import read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.data.rows import open_rows
from llava_simplified.evaluation.metrics import HEADLINES, Evaluation, Sample, Scores, evaluate, plain
from llava_simplified.evaluation.report import Run, write_report


def read_predictions(path: Path, references: Mapping[str, Sequence[str]] | None = None) -> list[Sample]:
    """The rows of a prediction file, one a trial, gathered by picture (`index` and `image`).

    Args:
        references: base name, stem or number of a picture -> captions (see `read_references`), in place of
            the rows' own `gt_caption` (a text or a list of texts).

    Raises:
        ValueError: names the file, the row and what is wrong with it.
    """
    rows = open_rows(path)
    found: dict[tuple[str, str], Sample] = {}
    for number in range(len(rows)):
        row, where = rows[number], f"{path} row {number}"
        image, written = (_text(row, key, where) for key in ("image", "pred_output"))
        true = _own_references(row, where) if references is None else _references_of(image, references, where)
        key = (str(row.get("index", image)), image)
        old = found.get(key)
        if old and old.references != tuple(true):
            raise ValueError(f"{where}: other references than in an earlier row of index {key[0]}, {image!r}")
        captions = (*old.captions, written) if old else (written,)
        found[key] = Sample(key[0], image, str(row.get("instruction", "")), tuple(true), captions)
    return list(found.values())


def _text(row: object, key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a prediction is a JSON object, this is {type(row).__name__}")
    if not isinstance(row.get(key), str):
        raise ValueError(f"{where}: {key!r} must be a text, got {row.get(key)!r}; its keys are {sorted(row)}")
    return row[key]


def _own_references(row: dict[str, Any], where: str) -> list[str]:
    value = row.get("gt_caption")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(
            f"{where}: 'gt_caption' must be a caption or a list of captions, got {value!r}; see --references"
        )
    return texts


def _references_of(image: str, references: Mapping[str, Sequence[str]], where: str) -> Sequence[str]:
    name, stem = Path(image).name, Path(image).stem
    # in other names it may count anything, and the number of a shard is no picture's
    number = None if "#" in name else re.fullmatch(r"(?:COCO_\w+_)?0*(\d+)", stem)
    for key in (name, stem, number[1] if number else ""):
        if key in references:
            return references[key]
    raise ValueError(f"{where}: the references hold no caption of {name!r}, neither by name nor by number")


def read_references(path: Path) -> dict[str, list[str]]:
    """Captions by file name and by image id, of a COCO caption file `{"images", "annotations"}`.

    Raises:
        ValueError: the file is not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        by_id: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            by_id.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
        names = {Path(image["file_name"]).name: str(image["id"]) for image in content.get("images", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a COCO caption file ({type(error).__name__}: {error}); it needs "
            '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
        ) from None
    return by_id | {name: by_id[key] for name, key in names.items() if key in by_id}


def read_train_captions(path: Path) -> set[str]:
    """All answers of a training file, in any form the trainer reads."""
    return {plain(response) for record in open_records(path) for response in record.responses}


def table(result: Evaluation) -> str:
    """The scores as text, a metric a line."""
    several = len(result.trials) > 1
    columns: list[tuple[str, Scores]] = [(f"trial {n}", scores) for n, scores in enumerate(result.trials, 1)]
    columns = [*columns, ("best of trials", result.best)] if several else []
    columns += [("shuffled", result.shuffled), ("unseen only", result.unseen)]
    columns = [(title, scores) for title, scores in columns if scores]
    lines = [["metric", "mean" if several else "score", "95 % interval", *(title for title, _ in columns)]]
    for name in (name for name in HEADLINES if name in result.mean):
        value, low, high = result.mean[name]
        interval = "" if math.isnan(low) else f"{low:.4f} to {high:.4f}"
        others = [f"{scores[name].value:.4f}" if name in scores else "" for _, scores in columns]
        lines.append([name, f"{value:.4f}", interval, *others])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    rows += [f"{name}: {100 * value:.1f} %" for name, value in result.shares.items()]
    rows += [f"note: {note}" for note in result.notes]
    return "\n".join([f"{result.pictures} pictures", *rows, ""])


def as_json(result: Evaluation) -> dict[str, object]:
    """The scores for a file, without those of single pictures: metric -> [value, low, high]."""

    def numbers(scores: Scores) -> dict[str, list[float | None]]:
        return {name: [None if math.isnan(x) else x for x in score] for name, score in scores.items()}

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
    from llava_simplified.model.checkpoint import read_manifest  # brings torch: only where it is asked for

    manifest = read_manifest(folder)
    parts = {key: value for key, value in manifest["architecture"].items() if key != "fingerprints"}
    return {key: str(value) for key, value in {**parts, **manifest["training"]}.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llava evaluate", description="Score predictions against references.")
    add = parser.add_argument
    add("predictions", nargs="+", type=Path, help="predictions.json or .jsonl; several files are compared")
    add("--references", type=Path, help="COCO caption JSON, in place of the rows' gt_caption")
    add("--train-captions", type=Path, help="the training records: how much is novel, how much was never seen")
    add("--image-folder", type=Path, default=Path(), help="where the pictures are")
    add("--clip", type=Path, metavar="FOLDER", help="a CLIP model's folder: adds CLIPScore")
    add("--output", type=Path, help="write the scores as JSON")
    add("--report", type=Path, help="write one self-contained HTML file")
    add("--log", type=Path, help="trainer_log.jsonl, whose curves the report shows")
    add("--model-path", type=Path, help="the checkpoint that wrote them: its settings and its log go into the report")
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
    if all(path.stem[-1:].isdigit() for path in options.predictions):  # a shell puts step-1000 before step-500
        options.predictions.sort(key=lambda path: int(re.findall(r"\d+", path.stem)[-1]))
    runs = []
    for path, name in zip(options.predictions, run_names(options.predictions)):
        samples = read_predictions(path, references)
        images = [read_image_bytes(s.image, options.image_folder) for s in samples] if options.clip else []
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
        options.output.write_text(json.dumps(scores, indent=1, ensure_ascii=False), encoding="utf-8")
    if options.report:
        settings = {
            "predictions": ", ".join(map(str, options.predictions)),
            "references": str(options.references or "gt_caption of the rows"),
            "training captions": str(options.train_captions or "not given"),
            "bootstrap": f"{options.resamples} resamples, seed {options.seed}",
            **(_model_settings(options.model_path) if options.model_path else {}),
        }
        log = options.log or (options.model_path / "trainer_log.jsonl" if options.model_path else None)
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
