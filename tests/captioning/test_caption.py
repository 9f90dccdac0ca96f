"""Sources of pictures, and a file of captions that loses nothing when it is killed."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_commands import ENVIRONMENT

from llava_simplified.arguments import parse_arguments
from llava_simplified.captioning import caption_command
from llava_simplified.captioning import runner as captioning
from llava_simplified.captioning.caption_command import caption_main, chat_main
from llava_simplified.captioning.inputs import open_inputs
from llava_simplified.captioning.runner import Job, caption_file
from llava_simplified.data.images import read_image_bytes
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.training.train_command import train

OPTIONS = GenerationOptions(max_new_tokens=6, temperature=1.0, num_return_sequences=2, seed=3)


@pytest.fixture(scope="module")
def checkpoint(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("model") / "out"
    options = {
        "model_name_or_path": models_folder / "mistral",
        "vision_tower": models_folder / "clip",
        "train_data_path": data_folder / "train.json",
        "train_image_folder": data_folder / "images",
        "output_dir": output,
        "max_steps": 1,
        "cache_vision_features": "off",
    }
    return train(
        *parse_arguments(
            [word for name, value in options.items() for word in (f"--{name}", str(value))]
        )
    )


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Llava:
    return Llava.from_pretrained(checkpoint)


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """Six pictures, one of them in a subfolder, a broken one, and a file that is no picture."""
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for number in range(5):
        shutil.copy(data_folder / "images" / f"{number}.jpg", pictures)
    shutil.copy(data_folder / "images" / "5.jpg", pictures / "more" / "5.JPG")
    (pictures / "bad.jpg").write_bytes(b"not a picture")
    (pictures / "notes.txt").write_text("hello")
    return pictures


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_kind_of_source(
    folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(source: object) -> list[str]:
        return [record.images[0] for record in open_inputs(str(source), None, ["What?"])[0]]

    def images_of_records(source: Path) -> list[str]:
        return [record.images[0] for record in open_inputs(str(source), None, [])[0]]

    assert images(folder) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "bad.jpg", "more/5.JPG"]
    assert images(folder / "1.jpg") == ["1.jpg"]
    assert images(folder / "[0-2].jpg") == [str(folder / f"{n}.jpg") for n in range(3)]
    monkeypatch.chdir(folder)
    assert images("*/*.JPG") == ["more/5.JPG"]
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key in ("a", "b"):
            data = (data_folder / "images" / "0.jpg").read_bytes()
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert images("00000.tar") == ["00000.tar#a", "00000.tar#b"]
    assert images("*.tar") == images("00000.tar")
    assert images(folder)[:3] == ["0.jpg", "00000.tar#a", "00000.tar#b"]
    for source in (folder, folder / "1.jpg", "00000.tar", "*.tar", "[0-2].jpg", folder / "*.jpg"):
        records, where = open_inputs(str(source), None, ["What?"])
        assert read_image_bytes(records[0].images[0], where)
    assert len(open_inputs(str(data_folder / "val.json"), str(data_folder / "images"), [])[0]) == 4
    unanswered = folder / "unanswered.jsonl"  # what is to be captioned need not have been
    unanswered.write_text(json.dumps({"image": "1.jpg", "instruction": "What?"}) + "\n")
    assert images_of_records(unanswered) == ["1.jpg"]
    for wrong, message in (
        (None, "none of the first images"),
        ("nowhere", "--image-folder nowhere: no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            open_inputs(str(data_folder / "val.json"), wrong, [])
    with pytest.raises(ValueError, match="bring their own questions"):
        open_inputs(str(data_folder / "val.json"), None, ["What?"])
    with pytest.raises(ValueError, match="nothing-here: no picture, folder"):
        open_inputs("nothing-here", None, ["What?"])


def test_a_folder_with_two_questions(model: Llava, folder: Path, tmp_path: Path) -> None:
    job = Job(
        "",
        str(folder),
        str(tmp_path / "out.jsonl"),
        GenerationOptions(6),
        ("What?", "Where is <image>?"),
    )
    assert caption_file(job, model) == (12, 2)
    written = rows(tmp_path / "out.jsonl")
    assert [row["index"] for row in written] == [*range(10), 12, 13]
    assert [row["instruction"] for row in written[:2]] == ["What?", "Where is <image>?"]
    for row in written[::3]:
        assert row["pred_output"] == model.caption(
            folder / row["image"], row["instruction"], max_new_tokens=6
        )
    assert [row["index"] for row in rows(Path(job.output + ".bad.jsonl"))] == [10, 11]


@pytest.mark.parametrize("cut", [0, 1, 60, 300, 700, -1, -30, None])
def test_a_stopped_file_goes_on_where_it_was(
    model: Llava, folder: Path, tmp_path: Path, cut: int | None
) -> None:
    """Cut at any byte, also inside a row or between the two trials of a picture."""
    job = Job("", str(folder), str(tmp_path / "out.jsonl"), OPTIONS, batch_size=2)
    caption_file(job, model)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[:cut])
    assert caption_file(job, model) == (6, 1)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert len(rows(Path(job.output + ".bad.jsonl"))) == 1


def test_chunks_share_the_work_and_batches_change_nothing(
    model: Llava, folder: Path, tmp_path: Path
) -> None:
    caption_file(Job("", str(folder), str(tmp_path / "one.jsonl"), OPTIONS), model)
    parts = []
    for chunk in range(3):
        output = tmp_path / f"{chunk}.jsonl"
        caption_file(
            Job("", str(folder), str(output), OPTIONS, batch_size=1, chunk=chunk, chunks=3), model
        )
        parts += rows(output)
    assert sorted(parts, key=lambda row: row["index"]) == rows(tmp_path / "one.jsonl")


def test_other_settings_are_refused(model: Llava, folder: Path, tmp_path: Path) -> None:
    job = Job("", str(folder), str(tmp_path / "out.jsonl"), OPTIONS)
    caption_file(job, model)
    with pytest.raises(ValueError, match="was begun with another options, limit: delete"):
        caption_file(replace(job, options=GenerationOptions(7), limit=2), model)


def test_a_source_that_has_changed_is_refused(model: Llava, folder: Path, tmp_path: Path) -> None:
    """With a picture more, the numbers of the rows mean other pictures."""
    job = Job("", str(folder), str(tmp_path / "out.jsonl"), OPTIONS)
    caption_file(job, model)
    shutil.copy(folder / "0.jpg", folder / "00.jpg")
    with pytest.raises(ValueError, match="was begun with another contents of the source: delete"):
        caption_file(job, model)


def test_chunks_come_from_flags_or_from_torchrun(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(caption_command, "caption_file", lambda job: jobs.append(job) or (1, 0))
    words = [str(folder), "--model-path", "m", "--output", str(tmp_path / "out.jsonl")]
    caption_main([*words, "--num-chunks", "3", "--chunk-idx", "1"])
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    caption_main(words)
    assert [(job.chunk, job.chunks, Path(job.output).name) for job in jobs] == [
        (1, 3, "out-1-of-3.jsonl"),
        (2, 4, "out-2-of-4.jsonl"),
    ]
    with pytest.raises(ValueError, match="--chunk-idx 3 is not one of --num-chunks 3"):
        caption_main([*words, "--num-chunks", "3", "--chunk-idx", "3"])


def test_a_file_that_is_deleted_is_begun_anew(model: Llava, folder: Path, tmp_path: Path) -> None:
    """What was bad in the old source must not be skipped in the new one."""
    job = Job("", str(folder), str(tmp_path / "out.jsonl"), OPTIONS)
    assert caption_file(job, model) == (6, 1)
    (tmp_path / "out.jsonl").unlink()
    (folder / "bad.jpg").write_bytes((folder / "0.jpg").read_bytes())
    assert caption_file(job, model) == (7, 0)
    assert not Path(job.output + ".bad.jsonl").exists()


def test_an_array_that_is_written_anew_names_what_is_bad_now(
    model: Llava, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "load_model", lambda asked: model)
    records = json.loads((data_folder / "val.json").read_text())[:2]
    data, output = tmp_path / "data.json", tmp_path / "out.json"
    words = [
        "--data-path",
        data,
        "--image-folder",
        data_folder / "images",
        "--output",
        output,
        "--max-new-tokens",
        2,
    ]
    for image, bad in (("gone.jpg", True), ("0.jpg", False)):
        data.write_text(json.dumps([{**records[0], "image": image}, records[1]]))
        assert (
            caption_command.main(["--model-path", "", *map(str, words), "--temperature", "0"]) == 0
        )
        assert (tmp_path / "out.json.bad.jsonl").exists() == bad
        assert len(json.loads(output.read_text())) == 2 - bad


def test_a_picture_is_encoded_once_and_captions_come_early(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions of different lengths fall into different batches; what is done is given before the window is."""
    encoded, encode_images = [], captioning.encode_images
    monkeypatch.setattr(
        captioning,
        "encode_images",
        lambda model, pixels: encoded.append(len(pixels)) or encode_images(model, pixels),
    )
    records, where = open_inputs(
        str(folder), None, ["What?", "What is it that one can see in this?"]
    )
    parts = list(
        captioning.caption_records(model, records, where, GenerationOptions(3), batch_size=2)
    )
    assert sum(encoded) == 6
    assert [row["index"] for rows, _ in parts for row in rows] == [*range(10), 12, 13]
    records, where = open_inputs(str(folder), None, ["What?"])
    parts = list(
        captioning.caption_records(model, records, where, GenerationOptions(3), batch_size=2)
    )
    assert [len(rows) for rows, _ in parts] == [2, 2, 1, 1]


@pytest.mark.slow
def test_kill_9_then_the_same_command_again(
    checkpoint: Path, data_folder: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(200):
        shutil.copy(data_folder / "images" / f"{number % 6}.jpg", pictures / f"{number:03}.jpg")
    output = tmp_path / "captions.jsonl"
    words = [
        sys.executable,
        "-m",
        "llava_simplified.cli",
        "caption",
        pictures,
        "--model-path",
        checkpoint,
    ]
    words += ["--output", output, "--batch-size", "1", "--max-new-tokens", "3"]
    process = subprocess.Popen(list(map(str, words)), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not output.exists() or output.stat().st_size < 2000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(output.read_text().splitlines()) < 200
    subprocess.run(list(map(str, words)), env=ENVIRONMENT, check=True, capture_output=True)
    assert [row["index"] for row in rows(output)] == list(range(200))


def test_one_picture_on_the_terminal(
    checkpoint: Path, model: Llava, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "0.jpg"), "--model-path", str(checkpoint), "--max-new-tokens", "6"]
    assert caption_main([*words, "--prompt", "What?", "--prompt", "Where?"]) == 0
    wanted = [
        model.caption(folder / "0.jpg", question, max_new_tokens=6)
        for question in ("What?", "Where?")
    ]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == wanted


def test_a_chat_remembers(
    checkpoint: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\nWhere?\n\nnever asked\n"))
    monkeypatch.setattr(
        captioning.Llava,
        "stream",
        lambda self, turns, images, **_: heard.append(list(turns)) or ["yes"],
    )
    assert chat_main([str(folder / "0.jpg"), "--model-path", str(checkpoint)]) == 0
    assert capsys.readouterr().out.split() == ["yes", "yes"]
    assert [[turn.content for turn in turns] for turns in heard] == [
        ["What?"],
        ["What?", "yes", "Where?"],
    ]
