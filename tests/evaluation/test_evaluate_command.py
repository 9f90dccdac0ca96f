"""Tests of `llava evaluate`: prediction files and references are read, scores and a report are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.cli import main as llava
from llava_simplified.evaluation.evaluate_command import main, name_runs, sort_by_step
from llava_simplified.evaluation.predictions import read_predictions, read_references


def make_rows(*captions: str, **changes: Any) -> list[dict[str, Any]]:
    """Return a prediction row for each caption of one image, with some of its keys changed."""
    row = {
        "index": 0,
        "image": "val/000000000042.jpg",
        "instruction": "Describe.",
        "gt_caption": "a cat",
        **changes,
    }
    return [{**row, "pred_output": caption} for caption in captions]


def write_rows(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        text = json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


# ---- reading ----


@pytest.mark.parametrize("name", ["predictions.json", "predictions.jsonl"])
def test_read_predictions_collects_the_trials_of_an_image(tmp_path: Path, name: str) -> None:
    rows = [
        *make_rows("a dog", "a cat"),
        *make_rows("the sea", "sky", index=1, gt_caption=["the sea", "waves"]),
    ]
    first, second = read_predictions(write_rows(tmp_path / name, rows))
    assert first.captions == ("a dog", "a cat")
    assert first.references == ("a cat",)
    assert second.references == ("the sea", "waves")


def test_read_predictions_keeps_line_separators_within_a_caption(tmp_path: Path) -> None:
    """JSON allows U+2028 in a text; it does not end a line of the file."""
    rows = make_rows("a cat\u2028on a mat", "a\x85dog")
    (sample,) = read_predictions(write_rows(tmp_path / "predictions.jsonl", rows))
    assert sample.captions == ("a cat\u2028on a mat", "a\x85dog")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*make_rows("x"), {"image": "a.jpg"}],
            "row 1: 'pred_output' must be a string.* None.* keys",
        ),
        ([*make_rows("x"), "text"], "row 1: .*JSON object.* str"),
        (make_rows("x", image=None), "row 0: 'image' must be a string.* None"),
        (
            make_rows("x", gt_caption=None),
            "row 0: 'gt_caption' must be a caption or a list of captions.* None",
        ),
        (make_rows("x", gt_caption=[]), r"row 0: 'gt_caption' must be .* \[\]"),
        (make_rows("x", gt_caption=["a", 7]), r"row 0: 'gt_caption' must be .* \['a', 7\]"),
        (make_rows("x", gt_caption=" "), "row 0: 'gt_caption' must be"),
        (
            [*make_rows("x"), *make_rows("y", gt_caption="a dog")],
            "row 1: .*references.* earlier row",
        ),
    ],
)
def test_read_predictions_names_a_bad_row(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_predictions(write_rows(tmp_path / "predictions.json", rows))


def test_read_predictions_rejects_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json"):
        read_predictions(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('[{"index": 0, ')
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_predictions(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "image", ["x/COCO_val2014_000000000042.jpg", "000000000042.png", "photo.jpg"]
)
def test_read_references_finds_images_by_id_and_by_name(tmp_path: Path, image: str) -> None:
    coco = {
        "images": [{"id": 42, "file_name": "photo.jpg"}],
        "annotations": [
            {"image_id": 42, "caption": "a cat"},
            {"image_id": 42, "caption": "the cat"},
            {"image_id": 7, "caption": "x"},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    references = read_references(tmp_path / "coco.json")
    path = write_rows(tmp_path / "p.json", make_rows("a dog", image=image))
    (sample,) = read_predictions(path, references)
    assert sample.references == ("a cat", "the cat")


@pytest.mark.parametrize("image", ["000000000042.jpg", "photo_1.jpg", "00001.tar#000000001"])
def test_read_predictions_names_an_image_without_references(tmp_path: Path, image: str) -> None:
    """The number in another name, or of a shard, is no image id: there are references of image 1."""
    coco = tmp_path / "coco.json"
    coco.write_text('{"annotations": [{"image_id": 1, "caption": "a"}]}')
    references = read_references(coco)
    path = write_rows(tmp_path / "p.json", make_rows("a", image=image))
    with pytest.raises(ValueError, match=rf"row 0: --references .*'{image}'"):
        read_predictions(path, references)


def test_read_references_rejects_other_files(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('[{"image": "a.jpg"}]')
    with pytest.raises(ValueError, match=r"bad\.json is not a COCO caption file"):
        read_references(tmp_path / "bad.json")


# ---- the command ----


def test_name_runs_uses_folders_if_stems_are_equal() -> None:
    assert name_runs([Path("a.json"), Path("b.json")]) == ["a", "b"]
    paths = [Path("checkpoint-1/p.json"), Path("checkpoint-2/p.json")]
    assert name_runs(paths) == ["checkpoint-1", "checkpoint-2"]


def test_sort_by_step_sorts_numbered_files_only() -> None:
    paths = [Path("step-1000.json"), Path("step-500.json")]
    assert sort_by_step(paths) == [Path("step-500.json"), Path("step-1000.json")]
    paths = [Path("mine.json"), Path("baseline.json")]
    assert sort_by_step(paths) == paths


def test_evaluate_scores_several_files_and_writes_a_report(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = json.loads((data_folder / "train.json").read_text())
    val = json.loads((data_folder / "val.json").read_text())
    for step, num_right in ((100, 1), (1000, 3)):
        rows = []
        for index, record in enumerate(val):
            caption = record["response"] if index < num_right else "a red car"
            rows += make_rows(
                caption,
                index=index,
                image=f"/elsewhere/{record['image']}",
                instruction=record["instruction"],
                gt_caption=record["response"],
            )
        write_rows(tmp_path / f"checkpoint-{step}.json", rows)
    (tmp_path / "log.jsonl").write_text(
        '{"step": 10, "loss": 2.5, "epoch": 1}\n{"step": 10, "eval_loss": 2.25}\n'
    )
    arguments = [
        *(str(tmp_path / f"checkpoint-{step}.json") for step in (1000, 100)),
        *("--train-captions", str(data_folder / "train.json")),
        *("--image-folder", str(data_folder / "images")),
        *("--output", str(tmp_path / "scores.json")),
        *("--report", str(tmp_path / "report.html")),
        *("--log", str(tmp_path / "log.jsonl")),
        "--no-java",
        *("--resamples", "50"),
    ]
    assert main(arguments) == 0

    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["checkpoint-100"]["mean"]["exact match"][0] == 0.25
    assert scores["checkpoint-1000"]["mean"]["exact match"][0] == 0.75
    assert scores["checkpoint-1000"]["images"] == 4
    train_captions = {record["response"] for record in train}
    unseen = [record for record in val if record["response"] not in train_captions]
    assert scores["checkpoint-1000"]["shares"]["unseen references"] == len(unseen) / len(val)
    assert list(scores) == ["checkpoint-100", "checkpoint-1000"], "in the order of their steps"

    output = capsys.readouterr().out
    assert "CIDEr-D" in output
    assert "note: only 4 images" in output
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/webp;base64,") == 4
    assert "validation, last 2.250" in report
    assert "by checkpoint" in report


def test_evaluate_reports_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "p.json", make_rows("x", gt_caption=7))
    assert llava(["evaluate", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "module",
    [
        "llava_simplified.evaluation.evaluate_command",
        "llava_simplified.inspection.inspect_command",
    ],
)
def test_build_parser_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module} as command\n"
        "command.build_parser()\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'PIL', 'jinja2', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
