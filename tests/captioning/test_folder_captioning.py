"""Tests of `llava caption DIR --write txt`: sidecar files, prompts and texts of a folder of images."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from html_pages import Page, assert_self_contained
from tiny import build_llava, looping

from llava_simplified.captioning import runner
from llava_simplified.captioning.caption_command import caption_main
from llava_simplified.captioning.caption_text import TextOptions
from llava_simplified.captioning.inputs import ImageRecords
from llava_simplified.captioning.prompts import WeightedPrompt
from llava_simplified.captioning.runner import CaptionJob, caption_file
from llava_simplified.captioning.sidecars import SIDECAR_JOURNAL, SidecarOptions, SidecarWriter
from llava_simplified.data.records import prediction_row
from llava_simplified.model import generation
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava


@pytest.fixture(scope="module")
def model(models_folder: Path) -> Llava:
    return build_llava(models_folder)


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """Four images, one of them in a sub-folder with tags."""
    images = tmp_path / "photos"
    (images / "sub").mkdir(parents=True)
    for number in range(3):
        shutil.copy(data_folder / "images" / f"{number}.jpg", images)
    shutil.copy(data_folder / "images" / "3.jpg", images / "sub" / "d.jpg")
    (images / "sub" / "d.txt").write_bytes(b"1girl, solo\r\n")
    return images


def sidecar_job(folder: Path, **changes: object) -> CaptionJob:
    job = CaptionJob(
        "",
        str(folder),
        SIDECAR_JOURNAL,
        GenerationOptions(max_new_tokens=6),
        sidecars=SidecarOptions(),
    )
    return replace(job, **changes)


def texts(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files except the images."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".jpg"
    }


def caption_of(model: Llava, image: Path) -> str:
    return model.caption(image, max_new_tokens=6)


def test_sidecar_files_are_written_beside_the_images(model: Llava, folder: Path) -> None:
    assert caption_file(sidecar_job(folder), model) == (4, 0)
    expected = {
        f"{n}.txt": f"{caption_of(model, folder / f'{n}.jpg')}\n".encode() for n in range(3)
    }
    assert texts(folder) == {**expected, "sub/d.txt": b"1girl, solo\r\n"}
    # All images have a file now, so another run changes nothing.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.txt")}
    assert caption_file(sidecar_job(folder), model) == (4, 0)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.txt")} == before


def test_output_folder_mirrors_the_images(model: Llava, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sidecars = SidecarOptions(output=str(out), suffix=".caption")
    text = TextOptions(template="{caption}; {tags}; {folder}/{name}")
    job = sidecar_job(folder, output=str(out / SIDECAR_JOURNAL), sidecars=sidecars, text=text)
    caption_file(job, model)
    caption = caption_of(model, folder / "sub" / "d.jpg")
    written = texts(out)
    assert set(written) == {"0.caption", "1.caption", "2.caption", "sub/d.caption"}
    assert written["sub/d.caption"].decode() == f"{caption}; 1girl, solo; sub/d\n"
    assert written["0.caption"].decode().endswith("; ; photos/0\n")
    assert set(texts(folder)) == {"sub/d.txt"}


@pytest.mark.parametrize("existing", ["append", "prepend", "overwrite"])
def test_existing_files_are_changed_by_the_chosen_policy(
    model: Llava, folder: Path, existing: str
) -> None:
    caption_file(sidecar_job(folder, sidecars=SidecarOptions(existing=existing)), model)
    caption = caption_of(model, folder / "sub" / "d.jpg")
    expected = {
        "append": f"1girl, solo, {caption}\r\n",
        "prepend": f"{caption}, 1girl, solo\r\n",
        "overwrite": f"{caption}\n",
    }
    assert texts(folder)["sub/d.txt"].decode() == expected[existing]


def test_conflicts_and_damaged_images_are_listed_with_reasons(
    model: Llava, folder: Path, package_log: pytest.LogCaptureFixture
) -> None:
    shutil.copy(folder / "0.jpg", folder / "0.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    assert caption_file(sidecar_job(folder), model) == (3, 3)
    failures = folder / f"{SIDECAR_JOURNAL}.bad.jsonl"
    rows = [json.loads(line) for line in failures.read_text().splitlines()]
    assert {row["image"] for row in rows} == {"0.jpg", "0.png", "bad.jpg"}
    assert all("0.jpg and 0.png" in row["error"] for row in rows if row["image"] != "bad.jpg")
    assert str(failures) in package_log.text
    assert set(texts(folder)) == {"1.txt", "2.txt", "sub/d.txt", failures.name, "0.png"}
    # The next job retries the images that failed.
    (folder / "0.png").unlink()
    (folder / "bad.jpg").unlink()
    assert caption_file(sidecar_job(folder), model) == (4, 0)
    assert not failures.exists()


def test_images_that_keep_one_file_together_are_reported(
    model: Llava, folder: Path, package_log: pytest.LogCaptureFixture
) -> None:
    caption_file(sidecar_job(folder), model)
    assert "share" not in package_log.text
    shutil.copy(folder / "0.jpg", folder / "0.png")
    before = texts(folder)
    caption_file(sidecar_job(folder), model)
    assert "0.jpg and 0.png would share the sidecar file 0.txt" in package_log.text
    assert texts(folder) == before


def test_prompts_are_chosen_by_seed_and_image(model: Llava, folder: Path) -> None:
    prompts = (WeightedPrompt(1, "Say {name}:"), WeightedPrompt(1, "{folder} {tags}?"))
    job = sidecar_job(folder, sidecars=None, output=str(folder.parent / "o.jsonl"), prompts=prompts)
    chosen = {}
    for seed in (0, 1):
        output = folder.parent / f"{seed}.jsonl"
        options = GenerationOptions(max_new_tokens=6, seed=seed)
        caption_file(replace(job, output=str(output), options=options), model)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        chosen[seed] = {row["image"]: row["instruction"] for row in rows}
        for row in rows:
            alone = model.caption(folder / row["image"], row["instruction"], max_new_tokens=6)
            assert row["pred_output"] == alone
    possible = {"0.jpg": {"Say 0:", "photos ?"}, "sub/d.jpg": {"Say d:", "sub 1girl, solo?"}}
    for choice in chosen.values():
        assert all(choice[image] in texts for image, texts in possible.items())
    assert chosen[0] != chosen[1]


def test_loops_are_cut_and_counted(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch, package_log: object
) -> None:
    def generate(_: Llava, prompts: list, *__: object) -> list[list[str]]:
        return [["a dog and " * 20] for _ in prompts]

    monkeypatch.setattr(generation, "generate_separately", generate)
    caption_file(sidecar_job(folder, text=TextOptions(prefix="sks ", loop_guard=8)), model)
    assert texts(folder)["0.txt"] == b"sks a dog and\n"
    assert "repeat themselves: 3" in package_log.text


def test_generation_ends_at_a_loop(model: Llava, folder: Path, package_log: object) -> None:
    """The texts are equal to complete generations whose loop is cut off afterward."""
    loop = "two dogs run over a green field"
    options = GenerationOptions(max_new_tokens=80, start_with="two")
    job = sidecar_job(folder, options=options, text=TextOptions(loop_guard=8), batch_size=16)
    with looping(model, loop), count_steps() as num_steps:
        caption_file(job, model)
    assert {texts(folder)[f"{number}.txt"] for number in range(3)} == {f"{loop}\n".encode()}
    assert "repeat themselves: 3" in package_log.text
    assert sum(num_steps) < 40


@contextmanager
def count_steps() -> Iterator[list[int]]:
    """Count the decoding steps of all batches."""
    steps: list[int] = []
    step = generation.DecodingBatch.step

    def counted(batch: generation.DecodingBatch) -> list[tuple[int, int]]:
        steps.append(1)
        return step(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation.DecodingBatch, "step", counted)
        yield steps


def test_limit_counts_the_images_that_are_captioned(model: Llava, folder: Path) -> None:
    """Images that keep their file do not count toward the limit, so the next run captions other images."""
    (folder / "0.txt").write_text("by hand")
    job = sidecar_job(folder, limit=1)
    assert caption_file(job, model) == (2, 0)
    assert set(texts(folder)) == {"0.txt", "1.txt", "sub/d.txt"}
    assert caption_file(job, model) == (3, 0)
    assert set(texts(folder)) == {"0.txt", "1.txt", "2.txt", "sub/d.txt"}
    assert texts(folder)["0.txt"] == b"by hand"


def test_limit_counts_what_was_captioned_before_a_kill(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "1.txt").write_text("by hand")
    (folder / "sub" / "d.txt").unlink()
    job = sidecar_job(folder, limit=2, batch_size=1)

    def killed(*_: object, **__: object) -> bool:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SidecarWriter, "write", killed)
        caption_file(job, model)
    assert caption_file(job, model) == (3, 0)
    assert set(texts(folder)) == {"0.txt", "1.txt", "2.txt"}


def test_slices_share_the_limit(model: Llava, folder: Path) -> None:
    (folder / "sub" / "d.txt").unlink()
    for chunk in (0, 1):
        job = sidecar_job(folder, limit=3, chunk=chunk, chunks=2, output=f"{chunk}.jsonl")
        caption_file(job, model)
    assert len([name for name in texts(folder) if name.endswith(".txt")]) == 3


def test_empty_caption_is_a_failure(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        generation, "generate_separately", lambda _, prompts, *__: [[""]] * len(prompts)
    )
    assert caption_file(sidecar_job(folder, text=TextOptions(prefix="sks")), model) == (1, 3)
    assert "0.txt" not in texts(folder)


# ---- killed and continued ----


class Killed(BaseException):
    """Simulates a kill, because no code catches this exception."""


@pytest.mark.parametrize("existing", ["skip", "append", "overwrite"])
@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_job_that_is_killed_at_a_file_continues(
    model: Llava,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: str,
    moment: str,
) -> None:
    """The job is killed before, while or after it replaces the file of an image. Each caption is written once."""
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    job = sidecar_job(folder, sidecars=SidecarOptions(existing=existing), batch_size=2)
    caption_file(replace(job, source=str(other)), model)
    expected = texts(other)

    write = SidecarWriter.write
    num_calls = 0

    def killed(self: SidecarWriter, image: str, *args: object, **kwargs: object) -> bool:
        nonlocal num_calls
        num_calls += 1
        if num_calls != 2:
            return write(self, image, *args, **kwargs)
        if moment == "half":
            path = self.path(image)
            path.with_name(f".{path.name}.part01234567").write_text("half of a")
        if moment == "after":
            write(self, image, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SidecarWriter, "write", killed)
        caption_file(job, model)
    assert (folder / SIDECAR_JOURNAL).exists()
    assert texts(folder) != expected
    caption_file(job, model)
    assert texts(folder) == expected


def test_continued_job_writes_no_files_for_images_that_were_moved(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = sidecar_job(folder)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runner, "_log_finished", killed)
        caption_file(job, model)
    before = texts(folder)
    (folder / "good").mkdir()
    (folder / "0.jpg").rename(folder / "good" / "0.jpg")
    (folder / "0.txt").rename(folder / "good" / "0.txt")
    (folder / "1.jpg").unlink()
    (folder / "1.txt").unlink()
    caption_file(job, model)
    assert set(texts(folder)) == {"good/0.txt", "2.txt", "sub/d.txt"}
    assert texts(folder)["good/0.txt"] == before["0.txt"]


def start_child(job: CaptionJob) -> int:
    """Run a job in a forked process, which need not import anything; return its process id."""
    if sys.platform == "win32":
        pytest.skip("requires os.fork")
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        caption_file(job, SimpleNamespace(instruction="What?"))
        status = 0
    finally:
        os._exit(status)


@pytest.mark.medium
@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires os.fork")
@pytest.mark.parametrize("existing", ["skip", "append", "prepend"])
def test_every_caption_is_complete_after_five_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: str
) -> None:
    """Kill the job with kill -9; only its model is replaced. tests/test_kill.py does the same with the command."""

    def fake_captions(
        _: object, records: ImageRecords, *others: object
    ) -> Iterator[tuple[list[dict], list[dict]]]:
        indices = others[-1]
        for start in range(0, len(indices), 4):
            batch = indices[start : start + 4]
            rows = [prediction_row(i, records[i], f"about {records.names[i]}") for i in batch]
            time.sleep(0.002)
            yield rows, []

    monkeypatch.setattr(runner, "caption_records", fake_captions)
    forms = [b"by hand\n", b"\xef\xbb\xbftag,\r\n", b"one\r\ntwo"]
    by_hand = {}
    for number in range(300):
        (tmp_path / f"{number:03}.jpg").touch()
        if number % 3 == 0:
            by_hand[f"{number:03}.txt"] = forms[number % 9 // 3]
            (tmp_path / f"{number:03}.txt").write_bytes(by_hand[f"{number:03}.txt"])

    job = sidecar_job(tmp_path, sidecars=SidecarOptions(existing=existing))
    rng = random.Random(existing)
    for _ in range(5):
        child = start_child(job)
        journal = tmp_path / SIDECAR_JOURNAL
        size = journal.stat().st_size if journal.exists() else 0
        # Wait until the journal has grown by a random number of bytes, on average by a sixth of the job.
        while not journal.exists() or journal.stat().st_size < size + rng.randint(2000, 9000):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), (
                "finished or failed before it was killed"
            )
            time.sleep(0.0005)  # leave the core to the job
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # Every file that exists is complete, whenever the job is killed.
        for name, data in texts(tmp_path).items():
            if name in by_hand or name.startswith("."):
                continue
            assert data == f"about {name[:3]}.jpg\n".encode()
    child = start_child(job)
    assert os.waitpid(child, 0)[1] == 0

    expected = {f"{n:03}.txt": f"about {n:03}.jpg\n".encode() for n in range(300) if n % 3}
    for name, data in by_hand.items():
        caption = f"about {name[:3]}.jpg".encode()
        expected[name] = {
            "skip": data,
            "append": {
                forms[0]: b"by hand, " + caption + b"\n",
                forms[1]: b"\xef\xbb\xbftag, " + caption + b"\r\n",
                forms[2]: b"one\r\ntwo, " + caption,
            }[data],
            "prepend": {
                forms[0]: caption + b", by hand\n",
                forms[1]: b"\xef\xbb\xbf" + caption + b", tag,\r\n",
                forms[2]: caption + b", one\r\ntwo",
            }[data],
        }[existing]
    assert texts(tmp_path) == expected


def test_unfinished_job_refuses_other_settings(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> bool:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SidecarWriter, "write", killed)
        caption_file(sidecar_job(folder), model)
    other = sidecar_job(folder, sidecars=SidecarOptions(existing="append"))
    with pytest.raises(ValueError, match="sidecars"):
        caption_file(other, model)


# ---- the review page ----


def test_review_shows_every_image(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sub" / "d.txt").write_text("<b>tags</b>")
    shutil.copy(folder / "0.jpg", folder / "loop.jpg")
    (folder / "bad.jpg").write_bytes(b"no image")
    monkeypatch.setattr(
        generation,
        "generate_separately",
        lambda _, prompts, *__: [["a </script> dog"]] * (len(prompts) - 1) + [["b " * 30]],
    )
    page = folder.parent / "review.html"
    job = sidecar_job(folder, review=str(page), text=TextOptions(loop_guard=8), batch_size=16)
    caption_file(job, model)
    html = page.read_text()
    assert_self_contained(html)
    cards = [attributes for tag, attributes in Page(html).elements if tag == "article"]
    kinds = [card["data-kind"] for card in cards]
    assert kinds.count("captioned") == 3
    assert {"loop", "kept", "failed"} < set(kinds)
    text = Page(html).text
    for shown in ("a </script> dog", "<b>tags</b>", "sub/d.jpg", "bad.jpg", "not an image"):
        assert shown in text
    shown = {
        attributes["data-show"]
        for _, attributes in Page(html).elements
        if "data-show" in attributes
    }
    assert shown == {"", "captioned", "loop", "kept", "failed"}


def test_review_of_many_images_has_several_pages(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_simplified.captioning.review_page.CARDS_PER_PAGE", 3)
    page = folder.parent / "my review.html"
    output = str(folder.parent / "o.jsonl")
    caption_file(sidecar_job(folder, sidecars=None, output=output, review=str(page)), model)
    second = folder.parent / "my review-2.html"
    counts = [path.read_text().count("<article") for path in (page, second)]
    assert counts == [3, 1]
    assert 'href="my%20review-2.html"' in page.read_text()
    assert 'href="my%20review.html"' in second.read_text()


@pytest.mark.parametrize("name", ["0.jpg", "out.jsonl", "page"])
def test_review_replaces_pages_only(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"--review .*{name}.* end in \.html"):
        sidecar_job(folder, review=str(folder / name))


@pytest.mark.parametrize("name", ["sub.html", "0.jpg/review.html"])
def test_impossible_review_is_refused_before_the_model_is_loaded(folder: Path, name: str) -> None:
    (folder / "sub.html").mkdir()
    job = sidecar_job(folder, review=str(folder / name), model_path="no-model")
    with pytest.raises(ValueError, match=name):
        caption_file(job)


# ---- the command ----


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[CaptionJob]:
    """Collect the jobs of the command, without running them."""
    started: list[CaptionJob] = []

    def record(job: CaptionJob) -> runner.CaptionCounts:
        started.append(job)
        return runner.CaptionCounts(1, 0)

    monkeypatch.setattr(runner, "caption_file", record)
    return started


def test_command_passes_the_options_on(
    jobs: list[CaptionJob], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("2 | What is in {folder}?\n")
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbfimage\r\na photo\r\nimage\r\n")
    options = f"""--write caption --existing append --separator \\n --prefix {"sks,"} --suffix .
        --template {{caption}};{{name}} --max-words 9 --prompt-file {tmp_path}/prompts.txt
        --forbid {tmp_path}/words.txt --review {tmp_path}/r.html --output {tmp_path}/out --shards 1/4"""
    argv = [str(folder), "--model-path", "m", *options.split(), "--start-with", "A view of "]
    assert caption_main(argv) == 0
    (job,) = jobs
    assert job.sidecars == SidecarOptions(".caption", "append", str(tmp_path / "out"), "\n")
    assert job.text == TextOptions("sks,", ".", "{caption};{name}", 9, 8)
    assert job.prompts == ((2.0, "What is in {folder}?"),)
    assert job.options.forbid == ("image", "a photo")
    assert job.options.start_with == "A view of"
    assert job.output == str(tmp_path / "out" / ".llava-caption-1-of-4.jsonl")
    assert job.review == str(tmp_path / "r-1-of-4.html")


def test_command_writes_beside_the_images_by_default(jobs: list[CaptionJob], folder: Path) -> None:
    assert caption_main([str(folder), "--model-path", "m", "--write", "txt"]) == 0
    assert jobs[0].sidecars == SidecarOptions()
    assert jobs[0].output == SIDECAR_JOURNAL
    assert jobs[0].text == TextOptions(loop_guard=8)
    assert caption_main([str(folder), "--model-path", "m"]) == 0
    assert jobs[1].sidecars is None
    assert jobs[1].text == TextOptions()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--existing append", "--existing.*--write"),
        ("--separator x", "--separator.*--write"),
        ("--write txt --separator x", "--separator.*append"),
        ("--write txt --trials 2 --temperature 1", "--trials 2"),
        ("--write txt --instruction a --instruction b", "--instruction.*--prompt-file"),
        ("--write txt --output a.jsonl", "--output a.jsonl.*folder"),
        ("--write txt --template {caption},{tags}", "--existing overwrite"),
        ("--write txt --existing append --template {caption},{tags}", "twice"),
        ("--template {tag}", "--template"),
        ("--prompt-file missing", "--prompt-file missing"),
        ("--forbid missing", "--forbid missing"),
        ("--instruction a --prompt-file b", "--prompt-file"),
    ],
)
def test_command_refuses_invalid_and_contradictory_options(
    jobs: list[CaptionJob], folder: Path, options: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        caption_main([str(folder), "--model-path", "m", *options.split()])
    assert jobs == []


@pytest.mark.parametrize(
    "changes", [{"sidecars": SidecarOptions()}, {"prompts": (WeightedPrompt(1, "a"),)}]
)
def test_records_refuse_sidecar_files_and_other_prompts(
    model: Llava, data_folder: Path, tmp_path: Path, changes: dict
) -> None:
    job = CaptionJob(
        "",
        str(data_folder / "val.json"),
        str(tmp_path / "o.jsonl"),
        GenerationOptions(),
        image_folder=str(data_folder / "images"),
        **changes,
    )
    with pytest.raises(ValueError, match=r"val\.json"):
        caption_file(job, model)


def test_printed_caption_has_the_prefix_and_the_forced_beginning(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "load_model", lambda _: model)
    argv = [str(folder / "0.jpg"), "--model-path", "m", "--max-new-tokens", "6"]
    caption_main([*argv, "--prefix", "sks, ", "--start-with", "two dogs"])
    printed = capsys.readouterr().out
    assert re.fullmatch(r"sks, two dogs.*\n", printed, re.DOTALL)
    caption_main([*argv, "--start-with", "two dogs"])
    assert f"sks, {capsys.readouterr().out}" == printed


def test_sidecar_files_of_images_are_not_reported_as_left_out(
    model: Llava, folder: Path, package_log: pytest.LogCaptureFixture
) -> None:
    caption_file(sidecar_job(folder), model)
    caption_file(sidecar_job(folder), model)
    assert "left out" not in package_log.text
    (folder / "notes.txt").write_text("no sidecar")
    caption_file(sidecar_job(folder), model)
    assert "1 x .txt" in package_log.text


# ---- the page of the documentation ----


def test_commands_of_the_documentation_page_run_in_order(
    model: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "captioning.md").read_text(encoding="utf-8")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(runner, "load_model", lambda _: model)
    monkeypatch.setattr("llava_simplified.captioning.review_page.CARDS_PER_PAGE", 3)
    blocks = re.findall(r"(?s)```(\w*)\n(.*?)```", page)
    (prompts,) = [code for language, code in blocks if not language]
    Path("prompts.txt").write_text(prompts)
    # Long commands are wrapped, with a backslash at the end of the line.
    code = "".join(code for _, code in blocks).replace("\\\n", " ")
    commands = re.findall(r"(?m)^llava caption (.+)$", code)
    assert len(commands) == 6
    for command in commands:
        argv = shlex.split(command, comments=True)
        assert caption_main([*argv, "--max-new-tokens", "4"]) == 0
    # The last commands have combined tags and captions, and have written captions into a separate folder.
    assert b"1girl, solo" in texts(folder)["sub/d.txt"]
    assert b"Tags: 1girl, solo" not in texts(folder)["sub/d.txt"]
    assert b"1girl, solo" in texts(folder)["sub/d.caption"]
    assert set(texts(folder.parent / "captions")) == {"0.txt", "1.txt", "2.txt", "sub/d.txt"}
    assert len(list(folder.parent.glob("review*.html"))) == 2
    assert not list(folder.parent.rglob(".*"))
