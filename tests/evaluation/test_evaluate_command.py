"""Tests of `llava evaluate`: prediction files and references are read, scores and a report are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_simplified.cli import main as llava
from llava_simplified.evaluation.comparison import align_samples
from llava_simplified.evaluation.evaluate_command import main
from llava_simplified.evaluation.metrics import Sample
from llava_simplified.evaluation.predictions import Predictions, read_predictions
from llava_simplified.evaluation.references import read_references
from llava_simplified.evaluation.run_names import name_runs, sort_by_step, training_steps


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
    first, second = read_predictions(write_rows(tmp_path / name, rows)).samples
    assert first.captions == ("a dog", "a cat")
    assert first.references == ("a cat",)
    assert second.references == ("the sea", "waves")


def test_read_predictions_keeps_line_separators_within_a_caption(tmp_path: Path) -> None:
    """JSON allows U+2028 in a text, where it does not end a line of the file."""
    rows = make_rows("a cat\u2028on a mat", "a\x85dog")
    (sample,) = read_predictions(write_rows(tmp_path / "predictions.jsonl", rows)).samples
    assert sample.captions == ("a cat\u2028on a mat", "a\x85dog")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*make_rows("x"), {"image": "a.jpg"}],
            "row 1: 'pred_output' must be a string.* None.* keys",
        ),
        ([*make_rows("x"), "text"], "row 1: .*JSON object.* str"),
        (make_rows("x", image=7), "row 0: 'image' must be a string.* 7"),
        (make_rows("x", image=None, index=None), "row 0: .*'index'"),
        (
            make_rows("x", gt_caption=None),
            "row 0: 'gt_caption' must be a caption or a list of captions.*--references",
        ),
        (make_rows("x", gt_caption=[]), r"row 0: 'gt_caption' must be .*--references"),
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


@pytest.mark.parametrize(
    ("gt_caption", "references"),
    [(["a cat", ""], ("a cat",)), ([" ", "a cat"], ("a cat",)), (" ", None), (["", "\t"], None)],
)
def test_read_predictions_drops_blank_references(
    tmp_path: Path, gt_caption: object, references: tuple[str, ...] | None
) -> None:
    """`llava predict` copies all responses of a record, including blank ones."""
    rows = [*make_rows("x", gt_caption=gt_caption), *make_rows("y", index=1, image="b.jpg")]
    read = read_predictions(write_rows(tmp_path / "predictions.jsonl", rows))
    expected = [("a cat",)] if references is None else [references, ("a cat",)]
    assert [sample.references for sample in read.samples] == expected
    assert read.counts["predictions without a reference"] == (references is None)


@pytest.mark.parametrize("option", ["--resamples -1", "--seed -1"])
def test_evaluate_refuses_numbers_out_of_range(tmp_path: Path, option: str) -> None:
    path = write_rows(tmp_path / "predictions.jsonl", make_rows("x"))
    with pytest.raises(ValueError, match=f"{option}: must be at least 0"):
        main([str(path), "--no-java", *option.split()])


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
    (sample,) = read_predictions(path, references).samples
    assert sample.references == ("a cat", "the cat")


@pytest.mark.parametrize("image", ["000000000042.jpg", "photo_1.jpg", "00001.tar#000000001"])
def test_read_predictions_names_an_image_without_references(tmp_path: Path, image: str) -> None:
    """A number in a name of another form, such as that of a shard, is not an image id."""
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


# ---- references ----


def write_coco(path: Path, captions: dict[str, list[str | None]]) -> Path:
    """Write a COCO caption file; the image ids count from 1."""
    images = []
    annotations = []
    for image_id, (name, texts) in enumerate(captions.items(), 1):
        images.append({"id": image_id, "file_name": name})
        annotations += [{"image_id": image_id, "caption": text} for text in texts]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def read_with_references(
    folder: Path, images: list[str], captions: dict[str, list[str | None]]
) -> Predictions:
    """Read one prediction for each image, with references from a COCO file."""
    rows = []
    for index, image in enumerate(images):
        rows += make_rows("x", index=index, image=image)
    predictions = write_rows(folder / "p.json", rows)
    return read_predictions(predictions, read_references(write_coco(folder / "r.json", captions)))


FOLDERS: dict[str, list[str | None]] = {
    "cats/1.jpg": ["a cat"],
    "dogs/1.jpg": ["a dog"],
    "dogs/2.jpg": ["two dogs"],
}


@pytest.mark.parametrize("prefix", ["", "./", "/home/ann/photos/", "C:\\photos\\"])
def test_references_of_equal_base_names_keep_their_folders(tmp_path: Path, prefix: str) -> None:
    read = read_with_references(tmp_path, [prefix + name for name in FOLDERS], FOLDERS)
    assert [list(sample.references) for sample in read.samples] == list(FOLDERS.values())
    is_exact = prefix in ("", "./")
    assert read.counts["references matched by the whole name"] == (3 if is_exact else 0)
    assert read.counts["references matched by the end of the path"] == (0 if is_exact else 3)
    assert any("end of the path" in note for note in read.notes) != is_exact


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (["1.jpg"], FOLDERS, r"row 0: .*'1\.jpg' matches 2 .*'cats/1\.jpg', 'dogs/1\.jpg'"),
        (["a/1.jpg", "b/1.jpg"], {"1.jpg": ["x"]}, r"row 1: .*'a/1\.jpg' and 'b/1\.jpg'"),
        (["birds/1.jpg", "birds/2.jpg"], FOLDERS, r"row 0: .*'birds/1\.jpg'"),
        (["dogs/3.jpg"], FOLDERS, r"row 0: .*'dogs/3\.jpg'"),
        (["cats/000000000001.jpg"], {"dogs/000000000001.jpg": ["x"]}, "row 0: "),
        (["a/000000000001.jpg", "b/000000000001.jpg"], {"x.jpg": ["x"]}, "row 1: .*different"),
    ],
)
def test_references_of_another_image_are_never_used(
    tmp_path: Path, images: list[str], captions: dict[str, list[str | None]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_with_references(tmp_path, images, captions)


def test_read_predictions_counts_what_is_not_scored(tmp_path: Path) -> None:
    captions: dict[str, list[str | None]] = {
        "0.jpg": ["a", None],
        "1.jpg": ["b"],
        "2.jpg": [],
        "3.jpg": [None, " "],
    }
    read = read_with_references(tmp_path, ["0.jpg", "2.jpg", "9.jpg"], captions)
    assert [sample.image for sample in read.samples] == ["0.jpg"]
    assert read.counts == {
        "references matched by the whole name": 1,
        "references matched by the end of the path": 0,
        "references matched by the image id": 0,
        "references without a prediction": 1,
        "annotations without a text": 3,
        "images without a caption": 2,
        "predictions without a reference": 2,
        "texts with half a surrogate pair": 0,
    }
    text = "\n".join(read.notes)
    assert "'1.jpg'" in text, "the image that was not predicted"
    assert "'2.jpg'" in text, "an image without references"


@pytest.mark.parametrize(
    "images",
    [
        [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}],
        [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}],
    ],
)
def test_read_references_rejects_ids_and_names_of_two_images(
    tmp_path: Path, images: list[dict[str, Any]]
) -> None:
    path = tmp_path / "r.json"
    path.write_text(
        json.dumps({"images": images, "annotations": [{"image_id": 1, "caption": "x"}]})
    )
    with pytest.raises(ValueError, match=r"r\.json.* 1 .*|a\.jpg"):
        read_references(path)


def test_read_references_accepts_records(tmp_path: Path) -> None:
    records = [
        {"image": "a.jpg", "instruction": "x", "response": "a cat"},
        {"image": "a.jpg", "instruction": "y", "responses": ["a cat", "my cat"]},
        {"image": "b.jpg", "instruction": "y"},
        {"image": None, "instruction": "y", "response": "text"},
    ]
    references = read_references(write_rows(tmp_path / "records.jsonl", records))
    path = write_rows(tmp_path / "p.json", make_rows("x", image="photos/a.jpg"))
    read = read_predictions(path, references)
    assert read.samples[0].references == ("a cat", "my cat")
    assert read.counts["records without a caption"] == 1
    assert read.counts["records with no image or several"] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", '[{"image": "a.jpg", "caption": "a cat"}, {"image": "a.jpg", "caption": "my"}]'),
        ("x.json", '{"a.jpg": ["a cat", "my"]}'),
        ("x.jsonl", '{"image": "a.jpg", "caption": "a cat"}\n{"image": "a.jpg", "caption": "my"}'),
        ("x.csv", "image,caption\na.jpg,a cat\na.jpg,my\na.jpg,"),
    ],
)
def test_read_references_accepts_what_convert_reads(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    references = read_references(tmp_path / name)
    assert references.find("a.jpg").captions == ("a cat", "my")
    if name == "x.csv":
        assert references.counts["empty caption (skipped)"] == 1


def test_read_predictions_reads_coco_results_with_references(tmp_path: Path) -> None:
    results = [{"image_id": 1, "caption": "a cat"}, {"image_id": 3, "caption": "x"}]
    path = write_rows(tmp_path / "results.json", results)
    with pytest.raises(ValueError, match="row 0: .*COCO results.*--references"):
        read_predictions(path)
    read = read_predictions(path, read_references(write_coco(tmp_path / "r.json", FOLDERS)))
    assert [(s.image, s.references) for s in read.samples] == [
        ("cats/1.jpg", ("a cat",)),
        ("dogs/2.jpg", ("two dogs",)),
    ]
    assert read.counts["references matched by the image id"] == 2
    assert read.counts["references without a prediction"] == 1


# ---- texts ----


def test_evaluate_scores_records_of_text_alone(tmp_path: Path, data_folder: Path) -> None:
    rows = [
        *make_rows("hi", image=None, gt_caption="hi there"),
        *make_rows("a dog", index=1, image="1.jpg", gt_caption="a dog"),
        *make_rows("nothing to compare with", index=2, image=None, gt_caption=""),
    ]
    path = write_rows(tmp_path / "p.json", rows)
    report = tmp_path / "report.html"
    options = ["--image-folder", str(data_folder / "images"), "--no-java", "--resamples", "0"]
    scores = tmp_path / "scores.json"
    assert main([str(path), *options, "--report", str(report), "--output", str(scores)]) == 0
    assert json.loads(scores.read_text())["p"]["counts"]["predictions without a reference"] == 1
    assert "text only" in report.read_text()
    with pytest.raises(ValueError, match="--clip: index 0 has no image"):
        main([str(path), "--clip", str(tmp_path), *options])


@pytest.mark.slow
@pytest.mark.xdist_group("meteor")
@pytest.mark.usefixtures("one_meteor_process")
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_evaluate_accepts_text_that_breaks_other_programs(
    tmp_path: Path, data_folder: Path, suffix: str
) -> None:
    """Half a surrogate pair, separators that are not line breaks in JSON, and characters that HTML has to escape."""
    text = "a \ud83d b \u2028 c \x85 d \u2029 <b> \U0001f600 \x00"
    rows = make_rows(text, image="1.jpg", gt_caption=text)
    rows += make_rows("x", index=1, image="half \udcff.jpg", gt_caption=["y", text])
    path = tmp_path / f"p.{suffix}"
    content = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    path.write_text(content)
    options = ["--image-folder", str(data_folder / "images"), "--resamples", "0"]
    if suffix == "jsonl":
        options.append(
            "--no-java"
        )  # METEOR takes seconds to load its tables, and its input is the same for both suffixes
    output = tmp_path / "scores.json"
    report = tmp_path / "report.html"
    assert main([str(path), *options, "--output", str(output), "--report", str(report)]) == 0
    scores = json.loads(output.read_text(encoding="utf-8"))["p"]
    assert scores["counts"]["texts with half a surrogate pair"] == 3
    assert scores["mean"]["exact match"][0] == 0.5
    report.read_text(encoding="utf-8")


# ---- comparison ----


@pytest.mark.parametrize(("num_trials", "num_columns"), [(1, 0), (5, 5), (6, 0)])
def test_table_shows_each_trial_only_if_there_are_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_trials: int, num_columns: int
) -> None:
    rows = [row for index in range(2) for row in make_rows(*["a cat"] * num_trials, index=index)]
    predictions = write_rows(tmp_path / "predictions.jsonl", rows)
    output = tmp_path / "scores.json"
    assert main([str(predictions), "--no-java", "--output", str(output)]) == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if "95 %" in line)
    assert header.count("trial ") == num_columns
    assert ("best of trials" in header) == (num_trials > 1)
    (scores,) = json.loads(output.read_text()).values()
    assert len(scores["trials"]) == num_trials


def test_evaluate_compares_each_file_with_the_first(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = json.loads((data_folder / "val.json").read_text())
    for name, num_right in (("clip-b32", 1), ("effnet-b0", 3)):
        rows = []
        for index, record in enumerate(val):
            caption = record["response"] if index < num_right else "a red car"
            reference = record["response"]
            rows += make_rows(caption, index=index, image=record["image"], gt_caption=reference)
        # The images of the second file are in another order, so they are compared by name.
        write_rows(tmp_path / f"{name}.json", rows if num_right == 1 else rows[::-1])
    output = tmp_path / "scores.json"
    report = tmp_path / "report.html"
    arguments = [
        *(str(tmp_path / name) for name in ("clip-b32.json", "effnet-b0.json")),
        *("--image-folder", str(data_folder / "images")),
        *("--output", str(output), "--report", str(report), "--no-java", "--resamples", "200"),
    ]
    assert main(arguments) == 0
    scores = json.loads(output.read_text())
    assert list(scores) == ["clip-b32", "effnet-b0"], "in the given order"
    compared = scores["effnet-b0"]["compared with"]
    assert compared["run"] == "clip-b32"
    exact = compared["differences"]["exact match"]
    assert exact["difference"][0] == 0.5
    assert exact["difference"][1] >= 0, "no resample can be worse: no image is"
    assert [exact["better"], exact["worse"], exact["equal"]] == [2, 0, 2]
    changed = {row["index"] for row in compared["changed images"]}
    assert changed == {"1", "2"}
    assert "effnet-b0 minus clip-b32" in capsys.readouterr().out
    assert "effnet-b0 compared with clip-b32" in report.read_text()
    assert "by checkpoint" not in report.read_text()

    other = write_rows(tmp_path / "other.json", make_rows("x", index=99, image="1.jpg"))
    assert main([arguments[0], str(other), "--no-java", "--resamples", "0"]) == 0
    assert "different images" in capsys.readouterr().out


# ---- the command ----


def test_name_runs_uses_folders_if_stems_are_equal() -> None:
    assert name_runs([Path("a.json"), Path("b.json")]) == ["a", "b"]
    paths = [Path("checkpoint-1/p.json"), Path("checkpoint-2/p.json")]
    assert name_runs(paths) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step-500", "step-1000"], [500, 1000]),
        (["checkpoint-500", "checkpoint-1000"], [500, 1000]),
        (["cc3m.checkpoint-5", "cc3m.checkpoint-10"], [5, 10]),
        (["clip-vit-base-patch16", "clip-vit-base-patch32"], None),
        (["effnet-b1", "effnet-b0"], None),
        (["run-2", "run-1"], None),
        (["footstep-2", "footstep-1"], None),
        (["step-500", "baseline"], None),
        (["a-step-2", "b-step-1"], None),
        (["step-500-greedy", "step-100-greedy"], None),
    ],
)
def test_training_steps_are_only_those_of_checkpoints(
    names: list[str], steps: list[int] | None
) -> None:
    assert training_steps(names) == steps


def test_sort_by_step_sorts_checkpoints_only() -> None:
    paths = [Path("step-1000.json"), Path("step-500.json")]
    assert sort_by_step(paths) == [Path("step-500.json"), Path("step-1000.json")]
    paths = [Path("checkpoint-1000/p.json"), Path("checkpoint-500/p.json")]
    assert sort_by_step(paths) == paths[::-1]
    for names in (["mine", "baseline"], ["clip-vit-base-patch16", "effnet-b0"], ["b2", "b1"]):
        paths = [Path(f"{name}.json") for name in names]
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
    # There is a card for each image, and two more for the images that changed, with the captions of both runs.
    assert report.count("data:image/webp;base64,") == 4 + 2
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
    ("arguments", "message"),
    [
        (["p.jsonl", "--output", "p.jsonl"], r"--output p\.jsonl would replace .* the predictions"),
        (["p.jsonl", "--report", "./p.jsonl"], "--report p.jsonl would replace .* the predictions"),
        (["p.jsonl", "--references", "r.json", "--output", "r.json"], "a file of --references"),
        (["p.jsonl", "--train-captions", "r.json", "--report", "r.json"], "of --train-captions"),
        (["p.jsonl", "--instances", "r.json", "--output", "r.json"], "a file of --instances"),
        (["p.jsonl", "--output", "new", "--report", "new"], "--report new .* a file of --output"),
        (["p.jsonl", "./p.jsonl"], "p.jsonl is given twice"),
    ],
)
def test_evaluate_never_replaces_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "p.jsonl", make_rows("x"))
    text = path.read_text()
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--no-java", "--resamples", "0"])
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("option", ["--model-path", "--log"])
def test_evaluate_checks_what_the_report_shows_before_it_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    path = write_rows(tmp_path / "p.jsonl", make_rows("x"))
    arguments = [str(path), "--no-java", option, str(tmp_path / "gone")]
    assert llava(["evaluate", *arguments, "--report", str(tmp_path / "r.html")]) == 2
    captured = capsys.readouterr()
    assert "gone" in captured.err
    assert not captured.out, "nothing may be scored"


# ---- two programs ----


def write_two_programs(folder: Path, *, second_id: int = 2) -> list[str]:
    """Write a prediction file, COCO results of the same images in another order, and the references of both."""
    name = "COCO_val2014_{:012}.jpg".format
    rows = []
    for index, caption in enumerate(["a cat", "a dog"]):
        rows += make_rows(caption, index=index, image=f"val2014/{name(index + 1)}")
    results = [
        {"image_id": second_id, "caption": "a dog"},
        {"image_id": 1, "caption": "a cat on a mat"},
    ]
    content = {
        "images": [{"id": i, "file_name": name(i)} for i in (1, 2, 3)],
        "annotations": [{"image_id": i, "caption": "a cat"} for i in (1, 2, 3)],
    }
    first = write_rows(folder / "ours.json", rows)
    second = write_rows(folder / "theirs.json", results)
    references = folder / "captions.json"
    references.write_text(json.dumps(content))
    return [str(first), str(second), "--references", str(references), "--no-java"]


def test_files_of_two_programs_are_compared_image_by_image(tmp_path: Path) -> None:
    """One program writes positions and paths of images; the other writes image ids, in another order."""
    words = write_two_programs(tmp_path)
    scores = tmp_path / "scores.json"
    assert main([*words, "--output", str(scores), "--resamples", "20"]) == 0
    comparison = json.loads(scores.read_text())["theirs"]["compared with"]
    (changed,) = comparison["changed images"]
    assert changed["image"] == "val2014/COCO_val2014_000000000001.jpg"
    assert changed["differences"]["word F1"] == pytest.approx(4 / 7 - 1)
    exact = comparison["differences"]["exact match"]
    assert (exact["better"], exact["worse"], exact["equal"]) == (0, 1, 1)


def test_files_of_different_images_are_not_compared(tmp_path: Path) -> None:
    words = write_two_programs(tmp_path, second_id=3)
    scores = tmp_path / "scores.json"
    assert main([*words, "--output", str(scores), "--resamples", "0"]) == 0
    assert "compared with" not in json.loads(scores.read_text())["theirs"]


def test_align_samples_gives_images_the_names_of_the_first_program() -> None:
    order = [
        Sample("0", "a/1.jpg", "", ("a cat",), ("x",)),
        Sample("1", "b/1.jpg", "", ("c",), ("y",)),
    ]
    samples = [
        replace(order[1], index="1007"),
        replace(order[0], index="1003", image="val/a/1.jpg"),
    ]
    assert align_samples(samples, order) == order
    # Not aligned: a name without its folder, which fits both images; other references; and a missing image.
    assert align_samples([samples[0], replace(samples[1], image="1.jpg")], order) is None
    assert align_samples([samples[0], replace(samples[1], references=("a dog",))], order) is None
    assert align_samples(samples[:1], order) is None


def test_files_with_different_references_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records without images are numbered from 0 in every data set, so equal numbers do not mean equal records."""
    files = []
    for name in ("first", "second"):
        rows = make_rows("x", image=None, gt_caption=f"a caption of the {name} data set")
        files.append(str(write_rows(tmp_path / f"{name}.json", rows)))
    assert main([*files, "--no-java", "--resamples", "0"]) == 0
    assert "different images or references" in capsys.readouterr().out
