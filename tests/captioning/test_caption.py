"""Tests of captioning: sources, resumable output files, and the commands."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import build_llava, nan_features_for

from llava_simplified.captioning import caption_command, runner
from llava_simplified.captioning.caption_command import (
    build_caption_parser,
    caption_main,
    chat_main,
    parse_job_slice,
    predict_main,
)
from llava_simplified.captioning.inputs import open_inputs
from llava_simplified.captioning.runner import (
    CaptionCounts,
    CaptionJob,
    caption_file,
    caption_records,
)
from llava_simplified.captioning.sidecars import SIDECAR_JOURNAL
from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import Record
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.jobs import exclusive_lock
from llava_simplified.model import generation
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.model.openmp import run_in_own_thread
from llava_simplified.options import escape_control_characters
from llava_simplified.prompt import Message
from llava_simplified.workers import TaskResult

SAMPLING = GenerationOptions(max_new_tokens=6, temperature=1.0, num_return_sequences=2, seed=3)
LINE_SEPARATORS = "\u2028\u2029\u0085"  # line breaks for str.splitlines, but not for JSON lines


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Llava:
    return Llava.from_pretrained(checkpoint)


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """A folder with six images, one of them in a subfolder, a broken image, and a text file."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for number in range(5):
        shutil.copy(data_folder / "images" / f"{number}.jpg", images)
    shutil.copy(data_folder / "images" / "5.jpg", images / "more" / "5.JPG")
    (images / "bad.jpg").write_bytes(b"not an image")
    (images / "notes.txt").write_text("hello")
    return images


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def folder_job(folder: Path, output: Path, **changes: object) -> CaptionJob:
    """Return a job that captions a folder with two sampled captions per image."""
    return replace(CaptionJob("", str(folder), str(output), SAMPLING), **changes)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def failures_of(output: Path) -> Path:
    return Path(f"{output}.bad.jsonl")


# ---- sources ----


def image_names(source: object, *instructions: str) -> list[str]:
    records, _ = open_inputs(str(source), None, instructions)
    return [record.images[0] for record in records]


def add_shard(folder: Path, image: Path) -> None:
    """Write 00000.tar with the images `a` and `b`."""
    data = image.read_bytes()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key in ("a", "b"):
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_open_inputs_finds_images_in_files_folders_and_patterns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "bad.jpg", "more/5.JPG"]
    assert image_names(folder, "What?") == everything
    assert image_names(folder / "1.jpg", "What?") == ["1.jpg"]
    matches = [str(folder / f"{number}.jpg") for number in range(3)]
    assert image_names(folder / "[0-2].jpg", "What?") == matches
    monkeypatch.chdir(folder)
    assert image_names("*/*.JPG", "What?") == ["more/5.JPG"]
    # There are two ways to match it: each `**` can stand for `more`.
    assert image_names("**/**/*.JPG", "What?") == ["more/5.JPG"]


def test_open_inputs_finds_images_in_shards(
    folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    add_shard(folder, data_folder / "images" / "0.jpg")
    assert image_names("00000.tar", "What?") == ["00000.tar#a", "00000.tar#b"]
    assert image_names("*.tar", "What?") == image_names("00000.tar", "What?")
    assert image_names(folder, "What?")[:3] == ["0.jpg", "00000.tar#a", "00000.tar#b"]


def test_open_inputs_leaves_out_a_folder_whose_files_cannot_be_opened(
    folder: Path, package_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `chmod 644`, the names in a folder can be listed, but its files cannot be opened."""
    access = os.access

    def refuse(path: Path, mode: int) -> bool:  # the tests may run as root, who can open everything
        return path.name != "more" and access(path, mode)

    monkeypatch.setattr(os, "access", refuse)
    assert "more/5.JPG" not in image_names(folder, "What?")
    assert f"{folder / 'more'}: left out: Permission denied" in package_log.text


def test_open_inputs_reads_no_folder_as_a_shard(folder: Path, data_folder: Path) -> None:
    (folder / "old.tar").mkdir()
    shutil.copy(data_folder / "images" / "6.jpg", folder / "old.tar")
    assert "old.tar/6.jpg" in image_names(folder, "What?")
    assert len(image_names(folder / "*", "What?")) == 6


def test_open_inputs_returns_the_folder_that_contains_the_images(
    folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    add_shard(folder, data_folder / "images" / "0.jpg")
    for source in (folder, folder / "1.jpg", "00000.tar", "*.tar", "[0-2].jpg", folder / "*.jpg"):
        records, image_folder = open_inputs(str(source), None, ["What?"])
        assert read_image_bytes(records[0].images[0], image_folder)


def test_open_inputs_reads_records_with_and_without_responses(
    folder: Path, data_folder: Path
) -> None:
    records, _ = open_inputs(str(data_folder / "val.json"), str(data_folder / "images"), [])
    assert len(records) == 4
    unanswered = folder / "unanswered.jsonl"
    unanswered.write_text(json.dumps({"image": "1.jpg", "instruction": "What?"}) + "\n")
    assert image_names(unanswered) == ["1.jpg"]


def test_open_inputs_refuses_what_cannot_be_captioned(data_folder: Path) -> None:
    records = str(data_folder / "val.json")
    with pytest.raises(ValueError, match="--image-folder"):
        open_inputs(records, None, [])  # the images are elsewhere
    with pytest.raises(ValueError, match="--image-folder nowhere"):
        open_inputs(records, "nowhere", [])
    with pytest.raises(ValueError, match="--instruction.*val.json"):
        open_inputs(records, None, ["What?"])
    with pytest.raises(ValueError, match="nothing-here"):
        open_inputs("nothing-here", None, ["What?"])
    with pytest.raises(ValueError, match="--image-folder nowhere"):
        open_inputs(str(data_folder / "images"), "nowhere", ["What?"])


# ---- output files ----


def test_caption_file_captions_a_folder_with_two_instructions(
    model: Llava, folder: Path, output: Path
) -> None:
    instructions = ("What?", "Where is <image>?")
    job = folder_job(folder, output, options=GenerationOptions(6), instructions=instructions)
    assert caption_file(job, model) == CaptionCounts(captioned=12, failed=2)
    rows = read_rows(output)
    assert [row["index"] for row in rows] == [*range(10), 12, 13]
    assert [row["instruction"] for row in rows[:2]] == list(instructions)
    for row in rows[::3]:
        alone = model.caption(folder / row["image"], row["instruction"], max_new_tokens=6)
        assert row["pred_output"] == alone
    assert [row["index"] for row in read_rows(failures_of(output))] == [10, 11]


@pytest.mark.medium
@pytest.mark.parametrize("size", [0, 1, 60, 300, 700, -1, -30, None])
def test_caption_file_resumes_after_any_byte(
    model: Llava, folder: Path, output: Path, size: int | None
) -> None:
    """The file is empty, ends inside a row or between the two captions of an image, or is complete."""
    job = folder_job(folder, output, batch_size=2)
    caption_file(job, model)
    complete = output.read_bytes()
    output.write_bytes(complete[:size])
    assert caption_file(job, model) == (6, 1)
    assert output.read_bytes() == complete
    assert len(read_rows(failures_of(output))) == 1


@pytest.mark.medium
def test_caption_file_chunks_and_batch_size_do_not_change_captions(
    model: Llava, folder: Path, tmp_path: Path, output: Path
) -> None:
    caption_file(folder_job(folder, output), model)
    rows = []
    for chunk in range(3):
        part = tmp_path / f"{chunk}.jsonl"
        caption_file(folder_job(folder, part, batch_size=1, chunk=chunk, chunks=3), model)
        rows += read_rows(part)
    assert sorted(rows, key=lambda row: row["index"]) == read_rows(output)


def test_caption_file_refuses_other_settings(model: Llava, folder: Path, output: Path) -> None:
    caption_file(folder_job(folder, output), model)
    other = folder_job(folder, output, options=GenerationOptions(7), limit=2)
    with pytest.raises(ValueError, match=r"out\.jsonl .*options.*limit"):
        caption_file(other, model)
    with pytest.raises(ValueError, match=r"out\.jsonl .*quantize"):
        caption_file(folder_job(folder, output, quantize="int8"), model)


def test_caption_file_names_the_journal_of_other_settings(
    model: Llava, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal, not the JSON array, is the file whose deletion starts the job again."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "predictions.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "_publish_array", killed)
        caption_file(folder_job(folder, output), model)
    with pytest.raises(ValueError, match=r"predictions\.json\.part\.jsonl .*limit.* delete it"):
        caption_file(folder_job(folder, output, limit=2), model)


@pytest.mark.parametrize("kept_bytes", [None, 700])
@pytest.mark.parametrize("instructions", [("What?",), ("What?", "Where is it?")])
def test_caption_file_continues_with_images_that_were_added(
    model: Llava,
    folder: Path,
    output: Path,
    kept_bytes: int | None,
    instructions: tuple[str, ...],
) -> None:
    """The finished rows do not change. Every image has one number, and every number belongs to one image."""
    job = folder_job(folder, output, instructions=instructions)
    caption_file(job, model)
    written = output.read_bytes()[:kept_bytes]
    output.write_bytes(written)
    # Add images at the beginning, in the middle and at the end, and remove one.
    for name in ("00.jpg", "2b.jpg", "more/z.jpg"):
        shutil.copy(folder / "0.jpg", folder / name)
    (folder / "4.jpg").unlink()
    counts = caption_file(job, model)
    complete_lines = written[: written.rindex(b"\n") + 1]
    assert output.read_bytes().startswith(complete_lines[: len(complete_lines) // 2])

    rows = read_rows(output)
    per_image = len(instructions)
    images = {row["image"] for row in rows}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.[jJ]*")}
    assert images - {"4.jpg"} == present - {"bad.jpg"}
    numbers = {(row["image"], row["index"] // per_image) for row in rows}
    assert len(numbers) == len(images) == len({number for _, number in numbers})
    captions = Counter((row["image"], row["instruction"]) for row in rows)
    assert captions == {(image, text): 2 for image in images for text in instructions}
    assert counts == (len(images) * per_image, per_image)
    # Nothing is left to do.
    complete = output.read_bytes()
    assert caption_file(job, model) == counts
    assert output.read_bytes() == complete


@pytest.mark.parametrize("failure_has_a_name", [True, False])
def test_image_added_after_a_failure_is_captioned(
    model: Llava, folder: Path, tmp_path: Path, output: Path, failure_has_a_name: bool
) -> None:
    """Earlier versions did not store the name of an image whose name is not UTF-8."""
    images = tmp_path / "few"
    images.mkdir()
    bad_name = os.fsdecode(b"\xff.jpg")
    for name in ("b.jpg", bad_name):
        shutil.copy(folder / "0.jpg", images / name)
    job = folder_job(images, output, review=str(tmp_path / "review.html"))
    assert caption_file(job, model) == (1, 1)
    (failure,) = read_rows(failures_of(output))
    assert failure["image"] == bad_name
    if not failure_has_a_name:
        failure["image"] = None
        failures_of(output).write_text(json.dumps(failure) + "\n")
    shutil.copy(folder / "0.jpg", images / "a.jpg")
    assert caption_file(job, model) == (2, 1)
    assert {row["image"] for row in read_rows(output)} == {"a.jpg", "b.jpg"}
    (failure,) = read_rows(failures_of(output))
    assert failure["image"] == bad_name
    indices = {row["image"]: row["index"] for row in [*read_rows(output), failure]}
    assert sorted(indices.values()) == [0, 1, 2]


def test_caption_file_refuses_a_changed_source_of_slices(
    model: Llava, folder: Path, output: Path
) -> None:
    """With one more image in the folder, the indices of a slice would belong to other images."""
    job = folder_job(folder, output, chunks=2)
    caption_file(job, model)
    shutil.copy(folder / "0.jpg", folder / "00.jpg")
    with pytest.raises(ValueError, match="contents of the source"):
        caption_file(job, model)


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_failed_caption_leaves_no_files(folder: Path, tmp_path: Path, name: str) -> None:
    job = folder_job(folder, tmp_path / name, model_path=str(tmp_path / "no-model"))
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(ValueError, match="no-model"):
            caption_file(job)
        assert sorted(tmp_path.rglob("*")) == before


def test_open_inputs_accepts_several_sources(
    folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    add_shard(folder, data_folder / "images" / "0.jpg")
    other = str(data_folder / "images" / "7.jpg")
    for sources in (
        ["2.jpg", "1.jpg"],
        ["more", "1.jpg", "00000.tar", "[0-1].jpg"],
        ["1.jpg", other],
    ):
        records, image_folder = open_inputs(sources, None, ["What?"])
        names = [record.images[0] for record in records]
        assert len(names) == len(set(names)) == {2: 2, 4: 5}[len(sources)]
        for name in names:
            assert read_image_bytes(name, image_folder)
    with pytest.raises(ValueError, match=r"val\.json"):
        open_inputs(["1.jpg", str(data_folder / "val.json")], None, [])


def test_caption_accepts_several_images(jobs: list[CaptionJob], folder: Path) -> None:
    images = (str(folder / "1.jpg"), str(folder / "0.jpg"))
    assert caption_main([*images, "--model-path", "m"]) == 0
    assert jobs[0].source == images
    assert jobs[0].output == "captions.jsonl"


def test_caption_file_refuses_an_output_without_settings(
    model: Llava, folder: Path, output: Path
) -> None:
    output.write_text('{"index": 0}\n')
    with pytest.raises(ValueError, match=r"out\.jsonl\.settings\.json"):
        caption_file(folder_job(folder, output), model)
    assert output.read_text() == '{"index": 0}\n'


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_caption_file_does_not_replace_its_records(
    data_folder: Path, tmp_path: Path, name: str
) -> None:
    record = json.dumps({"image": "0.jpg", "instruction": "What?"})
    records = tmp_path / name
    records.write_text(f"[{record}]" if records.suffix == ".json" else f"{record}\n")
    before = records.read_bytes()
    (tmp_path / "more").mkdir()
    output = f"{tmp_path}/more/../{name}"
    images = str(data_folder / "images")
    job = CaptionJob("no-model", str(records), output, SAMPLING, image_folder=images)
    with pytest.raises(ValueError, match=r"--output .* records"):
        caption_file(job)
    assert records.read_bytes() == before


@pytest.mark.parametrize("name", ["more", "notes.txt/a.json", "notes.txt/a.jsonl"])
def test_caption_file_refuses_an_impossible_output_before_it_loads_the_model(
    folder: Path, name: str
) -> None:
    job = CaptionJob("no-model", str(folder), str(folder / name), SAMPLING)
    with pytest.raises(ValueError, match=name):
        caption_file(job)


def test_caption_file_refuses_an_output_in_use(
    model: Llava, folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_simplified.jobs.LOCK_TIMEOUT", 0.1)
    job = folder_job(folder, output)
    lock = runner.JobFiles.of(job.output).lock
    with exclusive_lock(lock, job.output), pytest.raises(ValueError, match=r"out\.jsonl"):
        caption_file(job, model)
    assert not output.exists()


def test_caption_file_starts_again_without_its_output(
    model: Llava, folder: Path, output: Path
) -> None:
    """A record that failed in the deleted job must not be skipped in the new one."""
    job = folder_job(folder, output)
    assert caption_file(job, model) == (6, 1)
    output.unlink()
    (folder / "bad.jpg").write_bytes((folder / "0.jpg").read_bytes())
    assert caption_file(job, model) == (7, 0)
    assert not failures_of(output).exists()


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_caption_file_keeps_unicode_line_separators(
    model: Llava, folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption = f"a{LINE_SEPARATORS}b"

    def generate(model: Llava, prompts: list, *_: object) -> list[list[str]]:
        return [[caption] for _ in prompts]

    monkeypatch.setattr(generation, "generate_separately", generate)
    output = tmp_path / name
    job = folder_job(folder, output, options=GenerationOptions(6), limit=3)
    assert caption_file(job, model) == (3, 0)
    if name == "out.jsonl":
        # Reading the rows again, when the job is resumed, must not split them.
        assert caption_file(job, model) == (3, 0)
        rows = read_rows(output)
    else:
        rows = json.loads(output.read_text(encoding="utf-8"))
    assert [row["pred_output"] for row in rows] == [caption] * 3


def test_caption_file_resumes_a_json_array(
    model: Llava, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a job is killed before it writes the array, the resumed job leaves no other files beside the array."""
    output = tmp_path / "new" / "out.json"
    job = folder_job(folder, output, batch_size=2)

    def fail(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_publish_array", fail)
        with pytest.raises(KeyboardInterrupt):
            caption_file(job, model)
    journal = Path(f"{output}.part.jsonl")
    rows = read_rows(journal)
    journal.write_bytes(journal.read_bytes()[:-300])
    assert not output.exists()
    assert caption_file(job, model) == (6, 1)
    assert json.loads(output.read_text()) == rows
    visible = [path.name for path in output.parent.iterdir() if not path.name.startswith(".")]
    assert sorted(visible) == ["out.json", "out.json.bad.jsonl"]


# ---- jobs of version 0.1.0 ----


@pytest.mark.parametrize("kept_rows", [0, 3, 11])
def test_caption_file_resumes_a_job_of_0_1_0(
    model: Llava, folder: Path, output: Path, kept_rows: int
) -> None:
    """The settings file was written by 0.1.0 for such a job; only the path of its source is replaced."""
    job = folder_job(folder, output, instructions=("What?",))
    caption_file(job, model)
    complete = output.read_bytes()

    fixture = Path(__file__).parents[1] / "fixtures" / "captioning_0_1_0"
    settings = json.loads((fixture / "captions.jsonl.settings.json").read_text())
    settings["source"] = str(folder)
    Path(f"{output}.settings.json").write_text(json.dumps(settings))
    output.write_bytes(b"".join(complete.splitlines(keepends=True)[:kept_rows]) + b'{"ind')
    assert caption_file(job, model) == (6, 1)
    assert output.read_bytes() == complete


def test_caption_file_continues_the_rows_of_0_1_0(model: Llava, folder: Path, output: Path) -> None:
    """Rows that 0.1.0 has written are kept, and only the missing records are captioned."""
    fixture = Path(__file__).parents[1] / "fixtures" / "captioning_0_1_0"
    old = (fixture / "captions.jsonl").read_bytes()
    settings = json.loads((fixture / "captions.jsonl.settings.json").read_text())
    settings["source"] = str(folder)
    output.write_bytes(old)
    Path(f"{output}.settings.json").write_text(json.dumps(settings))
    assert caption_file(folder_job(folder, output, instructions=("What?",)), model) == (6, 1)
    # The last row of the fixture is the first of two captions of its image.
    complete_rows = b"".join(old.splitlines(keepends=True)[:-1])
    assert output.read_bytes().startswith(complete_rows)
    indices = [row["index"] for row in read_rows(output)]
    assert indices == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 6, 6]


# ---- batches ----


@pytest.mark.medium
def test_caption_records_encodes_each_image_once(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instructions of different lengths put one image into several batches."""
    encoded = []
    encode = generation.encode_images

    def count_and_encode(model: Llava, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return encode(model, pixels)

    monkeypatch.setattr(generation, "encode_images", count_and_encode)
    instructions = ["What?", "What is it that one can see in this?"]
    records, image_folder = open_inputs(str(folder), None, instructions)
    parts = list(caption_records(model, records, image_folder, GenerationOptions(3), batch_size=2))
    assert sum(encoded) == 6
    indices = [row["index"] for rows, _ in parts for row in rows]
    assert indices == [*range(10), 12, 13]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_caption_records_sets_aside_a_prompt_that_exceeds_the_context(
    models_folder: Path, folder: Path, num_beams: int
) -> None:
    """OPT has learned position embeddings, so a position beyond the context is an IndexError."""
    opt = build_llava(models_folder, "opt")
    texts = ["What?", "What? " * 3000, "Where?"]
    records = []
    for text in texts:
        turns = [Message("user", f"<image>\n{text}")]
        records.append(Record(images=("0.jpg",), turns=turns, responses=(), id=text[:6]))
    options = GenerationOptions(3, num_beams=num_beams)
    ((rows, failed),) = caption_records(opt, records, folder, options)
    assert [row["index"] for row in rows] == [0, 2]
    (failure,) = failed
    assert failure["index"] == 1
    assert "context" in failure["error"]
    expected = [
        opt.caption(folder / "0.jpg", text, max_new_tokens=3, num_beams=num_beams)
        for text in ("What?", "Where?")
    ]
    assert [row["pred_output"] for row in rows] == expected


def test_caption_records_yields_rows_after_every_batch(model: Llava, folder: Path) -> None:
    records, image_folder = open_inputs(str(folder), None, ["What?"])
    parts = list(caption_records(model, records, image_folder, GenerationOptions(3), batch_size=2))
    assert [len(rows) for rows, _ in parts] == [2, 2, 1, 1]


def test_the_thread_that_reads_images_has_no_openmp_threads(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With OpenMP threads in two threads, decoding would take up to twice as long."""
    counts = set()
    transform: Any = ImageTransform.__call__

    def counting_transform(self: ImageTransform, pixels: Any) -> torch.Tensor:
        counts.add(torch.get_num_threads())
        result: torch.Tensor = transform(self, pixels)
        return result

    def caption() -> int:
        torch.set_num_threads(3)
        records, image_folder = open_inputs(str(folder), None, ["What?"])
        list(caption_records(model, records, image_folder, GenerationOptions(3)))
        return torch.get_num_threads()

    monkeypatch.setattr(ImageTransform, "__call__", counting_transform)
    # Use a new thread, because OpenMP threads of the main thread would not survive the forks of other tests.
    try:
        assert run_in_own_thread(caption) == 3
    finally:
        torch.set_num_threads(1)
    assert counts == {1}


# ---- commands ----


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[CaptionJob]:
    """Collect the jobs that a command starts, without running them."""
    started: list[CaptionJob] = []

    def record(job: CaptionJob) -> CaptionCounts:
        started.append(job)
        return CaptionCounts(1, 0)

    monkeypatch.setattr(runner, "caption_file", record)
    return started


SLICES = [["--num-chunks", "3", "--chunk-idx", "1"], ["--shards", "1/3"]]


@pytest.mark.parametrize("argv", SLICES, ids=lambda argv: argv[0])
def test_caption_captions_a_slice(
    jobs: list[CaptionJob], folder: Path, tmp_path: Path, argv: list[str]
) -> None:
    output = str(tmp_path / "out.jsonl")
    assert caption_main([str(folder), "--model-path", "m", "--output", output, *argv]) == 0
    [job] = jobs
    assert (job.chunk, job.chunks) == (1, 3)
    assert job.output == str(tmp_path / "out-1-of-3.jsonl")


@pytest.mark.parametrize("argv", SLICES, ids=lambda argv: argv[0])
def test_predict_captions_a_slice(
    jobs: list[CaptionJob], data_folder: Path, tmp_path: Path, argv: list[str]
) -> None:
    data, output = str(data_folder / "val.json"), str(tmp_path / "out.json")
    assert predict_main(["--model-path", "m", "--data-path", data, "--output", output, *argv]) == 0
    [job] = jobs
    assert (job.chunk, job.chunks) == (1, 3)
    assert job.output == str(tmp_path / "out-1-of-3.json")


def test_caption_reads_its_slice_from_torchrun(
    jobs: list[CaptionJob], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    output = str(tmp_path / "out.jsonl")
    caption_main([str(folder), "--model-path", "m", "--output", output])
    assert (jobs[0].chunk, jobs[0].chunks) == (2, 4)
    assert jobs[0].output == str(tmp_path / "out-2-of-4.jsonl")


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["--num-chunks", "3", "--chunk-idx", "3"], "--chunk-idx 3"),
        (["--chunk-idx", "-1"], "--chunk-idx -1"),
        (["--shards", "3/3"], "--shards"),
        (["--shards", "one"], "--shards"),
        (["--shards", "0/2", "--num-chunks", "2"], "--num-chunks"),
    ],
)
def test_parse_job_slice_refuses_wrong_slices(argv: list[str], option: str) -> None:
    args = build_caption_parser().parse_args(["images", "--model-path", "m", *argv])
    with pytest.raises(ValueError, match=option):
        parse_job_slice(args)


def test_caption_with_ray_captions_all_slices(
    jobs: list[CaptionJob], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[CaptionJob] = []

    def run_tasks(function: object, specs: list[CaptionJob], engine: str) -> list:
        assert engine == "ray"
        submitted.extend(specs)
        return []

    monkeypatch.setattr(caption_command, "run_tasks", run_tasks)
    argv = [str(folder), "--model-path", "m", "--engine", "ray", "--num-chunks", "2"]
    assert caption_main([*argv, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert [(job.chunk, job.chunks) for job in submitted] == [(0, 2), (1, 2)]
    with pytest.raises(ValueError, match="--shards"):
        caption_main([str(folder), "--model-path", "m", "--engine", "ray", "--shards", "0/2"])


def test_caption_with_ray_exits_with_1_if_a_slice_has_no_caption(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tasks(function: object, specs: list[CaptionJob], engine: str) -> list:
        return [TaskResult(spec, CaptionCounts(0, 3), "") for spec in specs]

    monkeypatch.setattr(caption_command, "run_tasks", run_tasks)
    argv = [str(folder), "--model-path", "m", "--engine", "ray"]
    assert caption_main([*argv, "--output", str(tmp_path / "out.jsonl")]) == 1


def test_caption_with_ray_makes_paths_absolute(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray worker has a different working directory."""
    submitted: list[CaptionJob] = []

    def run_tasks(function: object, specs: list[CaptionJob], engine: str) -> list:
        submitted.extend(specs)
        return []

    monkeypatch.setattr(caption_command, "run_tasks", run_tasks)
    monkeypatch.chdir(folder.parent)
    Path("model").symlink_to(checkpoint)
    argv = ["images", "images/*.jpg", "--model-path", "model", "--vision-tower", "org/clip"]
    argv += ["--engine", "ray", "--review", "review.html"]
    assert caption_main(argv) == 0
    (job,) = submitted
    assert job.source == (str(folder), str(folder / "*.jpg"))
    assert job.output == str(folder.parent / "captions.jsonl")
    assert job.review == str(folder.parent / "review.html")
    assert job.model_path == str(checkpoint)
    assert job.vision_tower == "org/clip"
    # Without --output, the journal of sidecar files is in the folder of the images, which the job finds.
    assert caption_main([*argv, "--write", "txt"]) == 0
    assert submitted[-1].output == SIDECAR_JOURNAL


@pytest.mark.parametrize(
    "option",
    [
        "--batch-size 0",
        "--batch-size -1",
        "--trials 0",
        "--trials -1",
        "--limit 0",
        "--limit -3",
        "--num-chunks 0",
        "--num-chunks -2",
    ],
)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_commands_refuse_numbers_below_1(
    jobs: list[CaptionJob],
    folder: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    engine: str,
) -> None:
    monkeypatch.setattr(caption_command, "run_tasks", lambda *_, **__: [])
    argv = ["--model-path", "m", *option.split()]
    message = f"{option}: must be at least 1"
    for source in (folder, folder / "0.jpg"):
        with pytest.raises(ValueError, match=message):
            caption_main([str(source), *argv, "--engine", engine])
    server = ["--endpoint", "http://127.0.0.1:1/v1", "--model", "m", *option.split()]
    if not option.startswith("--batch-size"):  # refused with --endpoint
        with pytest.raises(ValueError, match=message):
            caption_main([str(folder / "0.jpg"), *server])
    for source in (
        ["--image", str(folder / "0.jpg")],
        ["--data-path", str(data_folder / "val.json")],
    ):
        with pytest.raises(ValueError, match=message):
            predict_main([*source, *argv])
    assert jobs == []


@pytest.mark.parametrize(
    "changes", [{"limit": 0}, {"limit": -3}, {"batch_size": 0}, {"batch_size": -1}]
)
def test_caption_job_refuses_numbers_below_1(
    folder: Path, output: Path, changes: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        folder_job(folder, output, **changes)


def test_commands_refuse_an_image_folder_for_an_image(folder: Path) -> None:
    image = str(folder / "0.jpg")
    options = ["--image-folder", "elsewhere"]
    model = ["--model-path", "m"]
    server = ["--endpoint", "http://127.0.0.1:1/v1", "--model", "m"]
    for argv in (model, server):
        with pytest.raises(ValueError, match="--image-folder elsewhere"):
            caption_main([image, *argv, *options])
    with pytest.raises(ValueError, match="--image-folder elsewhere"):
        predict_main(["--image", image, *model, *options])


def test_predict_refuses_an_output_for_an_image(folder: Path) -> None:
    argv = ["--image", str(folder / "0.jpg"), "--model-path", "m"]
    with pytest.raises(ValueError, match=r"--output captions\.json: .* is printed"):
        predict_main([*argv, "--output", "captions.json"])


@pytest.mark.parametrize("option", ["--trials", "--num-return-sequences", "--num_return_sequences"])
def test_caption_accepts_every_name_of_trials(
    jobs: list[CaptionJob], folder: Path, option: str
) -> None:
    argv = [str(folder), "--model-path", "m", "--temperature", "1", option, "4"]
    caption_main(argv)
    assert jobs[0].options.num_return_sequences == 4


def test_commands_refuse_empty_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[CaptionJob]
) -> None:
    """A shell passes an empty text for a variable that is not set."""
    monkeypatch.chdir(folder)
    for option in ("--output", "--review", "--prompt-file"):
        with pytest.raises(ValueError, match=f"{option}: the path is empty"):
            caption_main([str(folder), "--model-path", "m", "--write", "txt", option, ""])
    assert not jobs
    with pytest.raises(ValueError, match="source is empty"):
        open_inputs(["0.jpg", ""], None, ["What?"])
    with pytest.raises(ValueError, match="no image"):
        predict_main(["--model-path", "m", "--image", ""])


def test_caption_refuses_an_array_as_output(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--output out\.json"):
        caption_main([str(folder), "--model-path", "m", "--output", "out.json"])


def test_predict_refuses_an_instruction_with_records(data_folder: Path, tmp_path: Path) -> None:
    data = str(data_folder / "val.json")
    argv = ["--model-path", "m", "--data-path", data, "--output", str(tmp_path / "out.json")]
    with pytest.raises(ValueError, match="--instruction"):
        predict_main([*argv, "--instruction", "What?"])


def test_predict_replaces_the_failures_of_an_earlier_array(
    model: Llava, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "load_model", lambda _: model)
    records = json.loads((data_folder / "val.json").read_text())[:2]
    data = tmp_path / "data.json"
    output = tmp_path / "out.json"
    argv = ["--model-path", "", "--data-path", str(data), "--output", str(output)]
    argv += ["--image-folder", str(data_folder / "images")]
    argv += ["--max-new-tokens", "2", "--temperature", "0"]
    for image, failed in (("gone.jpg", 1), ("0.jpg", 0)):
        data.write_text(json.dumps([{**records[0], "image": image}, records[1]]))
        assert predict_main(argv) == 0
        assert failures_of(output).exists() == bool(failed)
        assert len(json.loads(output.read_text())) == 2 - failed


def test_caption_exit_status_is_1_if_no_image_can_be_read(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(runner, "caption_file", lambda job: CaptionCounts(0, 3))
    assert caption_main([str(folder), "--model-path", "m"]) == 1


@pytest.mark.medium
def test_caption_prints_the_captions_of_one_image(
    checkpoint: Path, model: Llava, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(folder / "0.jpg"), "--model-path", str(checkpoint), "--max-new-tokens", "6"]
    assert caption_main([*argv, "--instruction", "What?", "--prompt", "Where?"]) == 0
    expected = []
    for instruction in ("What?", "Where?"):
        caption = model.caption(folder / "0.jpg", instruction, max_new_tokens=6)
        expected.append(escape_control_characters(caption))
    printed = capsys.readouterr().out.split("\n")[:-1]
    assert [line.strip() for line in printed] == expected


def test_chat_sends_the_whole_conversation(
    checkpoint: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conversations = []

    def stream(model: Llava, turns: list, images: list, **_: object) -> list[str]:
        conversations.append([turn.content for turn in turns])
        return ["yes"]

    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\nWhere?\n\nnever asked\n"))
    monkeypatch.setattr(Llava, "stream", stream)
    assert chat_main([str(folder / "0.jpg"), "--model-path", str(checkpoint)]) == 0
    assert capsys.readouterr().out.split() == ["yes", "yes"]
    assert conversations == [["What?"], ["What?", "yes", "Where?"]]


@pytest.mark.parametrize("option", ["--num-beams", "--length-penalty"])
def test_chat_has_no_options_of_beam_search(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit):
        chat_main([str(folder / "0.jpg"), "--model-path", "m", option, "4"])
    assert option in capsys.readouterr().err


# ---- every input becomes a record, a counted issue or an error ----


def draw_color(path: Path, color: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)


def test_error_names_a_missing_file_and_a_folder_without_images(tmp_path: Path) -> None:
    """The error about a missing file must not say that the file is of an unsupported kind."""
    with pytest.raises(ValueError, match=r"no\.jpg: no such file"):
        open_inputs([str(tmp_path / "no.jpg")], None, ["What?"])
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ValueError, match=r"1 x \.txt.*a folder of images"):
        open_inputs([str(tmp_path)], None, ["What?"])


@pytest.mark.parametrize("pattern", ["{there}/*.png", "../there/*.png", "../*ere/../there/*.png"])
@pytest.mark.parametrize("has_namesake", [True, False])
def test_pattern_opens_the_files_that_it_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, has_namesake: bool
) -> None:
    here = tmp_path / "here"
    draw_color(here / "2.png", "white")
    if has_namesake:
        draw_color(here / "1.png", "white")
    draw_color(tmp_path / "there" / "1.png", "black")
    monkeypatch.chdir(here)
    records, folder = open_inputs(pattern.format(there=tmp_path / "there"), None, ["What?"])
    (record,) = records
    assert decode_image(read_image_bytes(record.images[0], folder)).max() == 0, "the black one"


def test_brackets_of_an_existing_folder_are_not_a_wildcard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a wildcard, [1-9] would match the other folder.
    draw_color(tmp_path / "trip [1-9]" / "a [2].png", "black")
    draw_color(tmp_path / "trip 1" / "a [2].png", "white")
    monkeypatch.chdir(tmp_path)
    for pattern in ("trip [1-9]/*.png", f"{tmp_path}/trip [1-9]/a*.png", "./trip [1-9]/[a-b]*"):
        records, folder = open_inputs(pattern, None, ["What?"])
        (record,) = records
        assert decode_image(read_image_bytes(record.images[0], folder)).max() == 0, pattern
    # If no folder has this name, the brackets are wildcards.
    records, folder = open_inputs("trip [1-2]/*.png", None, ["What?"])
    assert decode_image(read_image_bytes(records[0].images[0], folder)).min() == 255


def test_several_sources_may_lead_upwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_color(tmp_path / "here" / "1.png", "white")
    draw_color(tmp_path / "there" / "1.png", "black")
    monkeypatch.chdir(tmp_path / "here")
    sources = ["1.png", "../there/1.png", "../there/../there", "../there/*.png", "./1.png"]
    records, folder = open_inputs(sources, None, ["What?"])
    images = [decode_image(read_image_bytes(record.images[0], folder)) for record in records]
    assert [image.max() for image in images] == [255, 0], "each image once"


def test_links_and_folders_that_are_not_followed_are_counted(
    tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    draw_color(tmp_path / "photos" / "1.png", "white")
    draw_color(tmp_path / "album" / "2.png", "white")
    (tmp_path / "photos" / "album").symlink_to(tmp_path / "album")
    (tmp_path / "photos" / "3.png").symlink_to(tmp_path / "moved.png")
    assert image_names(tmp_path / "photos", "What?") == ["1.png"]
    assert "1 x broken link, 1 x link to a folder" in package_log.text
    package_log.clear()
    with pytest.raises(ValueError, match="2 x folder"):
        open_inputs(f"{tmp_path}/*", None, ["What?"])


def test_folder_counts_what_is_not_an_image_and_finds_every_image(
    folder: Path, data_folder: Path, package_log: pytest.LogCaptureFixture
) -> None:
    photo = data_folder / "images" / "0.jpg"
    for name in ("a.jfif", "b.JPE", "c.JPEG", "d.HEIC", "no_suffix", "e.JFIF"):
        shutil.copy(photo, folder / name)
    for name in (".DS_Store", "LICENSE", "clip.mp4", "more.txt"):
        (folder / name).write_text("text")
    names = image_names(folder, "What?")
    assert {"a.jfif", "b.JPE", "c.JPEG", "d.HEIC", "no_suffix", "e.JFIF"} <= set(names)
    assert len(names) == 13
    (message,) = package_log.messages
    assert "1 x .mp4" in message
    assert "2 x .txt" in message
    assert "2 x no suffix" in message


def test_shard_counts_samples_without_an_image(
    tmp_path: Path, data_folder: Path, package_log: pytest.LogCaptureFixture
) -> None:
    data = (data_folder / "images" / "0.jpg").read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "b.txt", "c.JFIF", "d.seg.png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert image_names(tmp_path / "0.tar", "What?") == ["0.tar#a", "0.tar#c"]
    assert "2 x samples of a shard without an image" in package_log.text


def test_name_that_is_not_utf_8_is_set_aside(
    model: Llava, folder: Path, data_folder: Path, output: Path
) -> None:
    bad_name = os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(data_folder / "images" / "0.jpg", folder / bad_name)
    data = (data_folder / "images" / "0.jpg").read_bytes()
    with tarfile.open(folder / "0.tar", "w", errors="surrogateescape") as tar:
        for name in (bad_name, "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    counts = caption_file(folder_job(folder, output, options=GenerationOptions(3)), model)
    assert counts == (7, 3)
    failed = read_rows(failures_of(output))
    assert sum("not UTF-8" in row["error"] and "caf" in row["error"] for row in failed) == 2
    assert "0.tar#good" in {row["image"] for row in read_rows(output)}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_bad_rows_are_set_aside_with_their_reasons(
    model: Llava, folder: Path, tmp_path: Path, suffix: str
) -> None:
    good = {
        "image": "0.jpg",
        "instruction": "What?",
        "response": "one\u2028two\u2029three\x85 four",
    }
    rows = [
        good,
        {**good, "response": "a \ud83d b"},
        {"video": "a.mp4", "instruction": "<video>", "response": "x"},
        {"image": "0.jpg", "caption": "x"},
        {**good, "instruction": "\udc00"},
        "no record",
        good,
    ]
    source = folder / "rows.json"
    source.write_text(json.dumps(rows))
    output = tmp_path / f"out{suffix}"
    job = CaptionJob("", str(source), str(output), GenerationOptions(3))
    assert caption_file(job, model) == (2, 5)
    failed = {row["index"]: row["error"] for row in read_rows(failures_of(output))}
    assert sorted(failed) == [1, 2, 3, 4, 5]
    assert all(f"rows.json row {index}" in error for index, error in failed.items())
    assert "surrogate" in failed[1]
    captioned = json.loads(output.read_text()) if suffix == ".json" else read_rows(output)
    assert [row["index"] for row in captioned] == [0, 6]
    assert captioned[0]["gt_caption"] == good["response"]


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(6),
        SAMPLING,
        GenerationOptions(6, num_beams=3, num_return_sequences=2),
        GenerationOptions(6, num_beams=2, temperature=1.0, seed=1),
    ],
    ids=["greedy", "sampling", "beams", "sampled beams"],
)
def test_image_with_nan_logits_is_set_aside(
    model: Llava, folder: Path, tmp_path: Path, options: GenerationOptions
) -> None:
    """The other images of the batch have the same captions as without the bad one, except in a sampled beam search."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert caption_file(folder_job(folder, whole, options=options), model) == (6, 1)
    with nan_features_for(model, (folder / "2.jpg").read_bytes()):
        assert caption_file(folder_job(folder, output, options=options), model) == (5, 2)
    failed = {row["image"]: row["error"] for row in read_rows(failures_of(output))}
    assert "NaN" in failed["2.jpg"]
    if options.num_beams > 1 and options.temperature:
        # Transformers draws the random numbers of a beam search for the whole batch.
        assert {row["image"] for row in read_rows(output)} == {
            "0.jpg",
            "1.jpg",
            "3.jpg",
            "4.jpg",
            "more/5.JPG",
        }
        return
    others = [row for row in read_rows(whole) if row["image"] != "2.jpg"]
    assert read_rows(output) == others


def test_damaged_avif_is_set_aside(model: Llava, folder: Path, output: Path) -> None:
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
    path = folder / "a.avif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    data = path.read_bytes()
    scale = data.index((1000).to_bytes(4, "big"), data.index(b"mdhd"))
    path.write_bytes(data[:scale] + bytes(4) + data[scale + 4 :])
    counts = caption_file(folder_job(folder, output, options=GenerationOptions(3)), model)
    assert counts == (6, 2)
    assert any("ZeroDivisionError" in row["error"] for row in read_rows(failures_of(output)))


def test_caption_is_the_same_from_a_path_bytes_and_a_pil_image(
    model: Llava, data_folder: Path, tmp_path: Path
) -> None:
    image = Image.open(data_folder / "images" / "3.jpg").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[274] = 8
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    sources = [path, path.read_bytes(), Image.open(path), upright]
    captions = {model.caption(source, max_new_tokens=8) for source in sources}
    assert len(captions) == 1
