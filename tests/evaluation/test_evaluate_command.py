"""Prediction files in, scores and a report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.cli import main as llava
from llava_simplified.evaluation.evaluate_command import main, run_names
from llava_simplified.evaluation.predictions import read_predictions, read_references


def _rows(*captions: str, **changes: Any) -> list[dict[str, Any]]:
    row = {
        "index": 0,
        "image": "val/000000000042.jpg",
        "instruction": "Describe.",
        "gt_caption": "a cat",
        **changes,
    }
    return [{**row, "pred_output": caption} for caption in captions]


def _write(path: Path, rows: list[Any]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text(
        "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("name", ["predictions.json", "predictions.jsonl"])
def test_trials_of_a_picture_are_gathered(tmp_path: Path, name: str) -> None:
    rows = [
        *_rows("a dog", "a cat"),
        *_rows("the sea", "sky", index=1, gt_caption=["the sea", "waves"]),
    ]
    first, second = read_predictions(_write(tmp_path / name, rows))
    assert first.captions == ("a dog", "a cat")
    assert first.references == ("a cat",)
    assert second.references == ("the sea", "waves")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*_rows("x"), {"image": "a.jpg"}],
            "row 1: 'pred_output' must be a text, got None; its keys are",
        ),
        ([*_rows("x"), "text"], "row 1: a prediction is a JSON object, this is str"),
        (_rows("x", image=None), "row 0: 'image' must be a text, got None"),
        (
            _rows("x", gt_caption=None),
            "row 0: 'gt_caption' must be a caption or a list of captions, got None",
        ),
        (_rows("x", gt_caption=[]), r"row 0: 'gt_caption' must be .* got \[\]"),
        (_rows("x", gt_caption=" "), "row 0: 'gt_caption' must be"),
        (
            [*_rows("x"), *_rows("y", gt_caption="a dog")],
            "row 1: other references than in an earlier row",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_predictions(_write(tmp_path / "predictions.json", rows))


def test_files_that_are_no_predictions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_predictions(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('[{"index": 0, ')
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_predictions(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "image", ["x/COCO_val2014_000000000042.jpg", "000000000042.png", "photo.jpg"]
)
def test_references_of_a_coco_file(tmp_path: Path, image: str) -> None:
    coco = {
        "images": [{"id": 42, "file_name": "photo.jpg"}],
        "annotations": [{"image_id": 42, "caption": c} for c in ("a cat", "the cat")]
        + [{"image_id": 7, "caption": "x"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    references = read_references(tmp_path / "coco.json")
    (sample,) = read_predictions(
        _write(tmp_path / "p.json", _rows("a dog", image=image)), references
    )
    assert sample.references == ("a cat", "the cat")


def test_references_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text('{"annotations": [{"image_id": 1, "caption": "a"}]}')
    references = read_references(tmp_path / "coco.json")
    for image in ("000000000042.jpg", "photo_1.jpg", "00001.tar#000000001"):
        with pytest.raises(
            ValueError, match=rf"row 0: the references hold no caption of '{image}'"
        ):
            read_predictions(_write(tmp_path / "p.json", _rows("a", image=image)), references)
    (tmp_path / "bad.json").write_text('[{"image": "a.jpg"}]')
    with pytest.raises(ValueError, match=r"bad\.json: not a COCO caption file"):
        read_references(tmp_path / "bad.json")


def test_runs_are_told_apart_by_their_names() -> None:
    assert run_names([Path("a.json"), Path("b.json")]) == ["a", "b"]
    assert run_names([Path("checkpoint-1/p.json"), Path("checkpoint-2/p.json")]) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


def test_the_command_scores_several_files_and_writes_a_report(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = (
        json.loads((data_folder / f"{name}.json").read_text()) for name in ("train", "val")
    )
    for step, right in ((100, 1), (1000, 3)):
        rows = [
            {"index": i, "image": f"/elsewhere/{row['image']}", "instruction": row["instruction"],
             "gt_caption": row["response"], "pred_output": row["response"] if i < right else "a red car"}
            for i, row in enumerate(val)
        ]  # fmt: skip
        _write(tmp_path / f"checkpoint-{step}.json", rows)
    (tmp_path / "log.jsonl").write_text(
        '{"step": 10, "loss": 2.5, "epoch": 1}\n{"step": 10, "eval_loss": 2.25}\n'
    )
    files = [str(tmp_path / f"checkpoint-{step}.json") for step in (1000, 100)]
    extra = [
        "--train-captions",
        str(data_folder / "train.json"),
        "--image-folder",
        str(data_folder / "images"),
    ]
    wanted = ["--output", str(tmp_path / "scores.json"), "--report", str(tmp_path / "report.html")]
    assert (
        main(
            [
                *files,
                *extra,
                *wanted,
                "--log",
                str(tmp_path / "log.jsonl"),
                "--no-java",
                "--resamples",
                "50",
            ]
        )
        == 0
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["checkpoint-100"]["mean"]["exact match"][0] == 0.25
    assert scores["checkpoint-1000"]["mean"]["exact match"][0] == 0.75
    known = {row["response"] for row in train}
    unseen = sum(row["response"] not in known for row in val) / len(val)
    assert scores["checkpoint-1000"]["shares"]["unseen references"] == unseen
    printed = capsys.readouterr().out
    assert "CIDEr-D" in printed
    assert list(scores) == ["checkpoint-100", "checkpoint-1000"], "in the order of their steps"
    assert "note: only 4 pictures" in printed
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/webp;base64,") == 4
    assert "validation, last 2.250" in report
    assert "by checkpoint" in report


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "p.json", _rows("x", gt_caption=7))
    assert llava(["evaluate", str(tmp_path / "p.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
