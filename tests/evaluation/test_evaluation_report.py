"""Tests of the report: it is a single small file, makes no requests, is safe for any caption, and is correct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_pages import Page, assert_self_contained
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_simplified.evaluation import evaluation_report
from llava_simplified.evaluation.comparison import compare_runs
from llava_simplified.evaluation.evaluation_report import Run, mark_captions, write_report
from llava_simplified.evaluation.metrics import Sample, evaluate, word_f1
from llava_simplified.evaluation.training_curves import read_training_log
from llava_simplified.evaluation.word_usage import compare_word_usage


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for number in range(4):
        pixels = np.full((20, 30, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def make_run(name: str, *pairs: tuple[str, str]) -> Run:
    """Return a run with an image for each pair of caption and reference."""
    samples = []
    for number, (caption, reference) in enumerate(pairs):
        image = f"{number}.png"
        samples.append(Sample(str(number), image, "Describe.", (reference,), (caption,)))
    result = evaluate(samples, train_captions=["a cat"], java=False, resamples=20)
    return Run(name, samples, result)


def write_page(
    image_folder: Path, *runs: Run, train_captions: set[str] | None = None, title: str = "A & B"
) -> str:
    output = image_folder / "out" / "report.html"
    write_report(
        output,
        title=title,
        runs=runs,
        image_folder=image_folder,
        settings={"rate": "<b>1e-3</b>"},
        train_captions=train_captions,
    )
    return output.read_text(encoding="utf-8")


# ---- the page ----


def test_report_escapes_captions(image_folder: Path) -> None:
    evil = "<script>alert(1)</script> \"x\" onerror='y' <img src=http://a.b/c> </title> {{ 7 * 7 }}"
    run = make_run("<i>run</i>", (evil, evil), (evil, "a dog"))
    page = Page(write_page(image_folder, run, train_captions={"a cat"}))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert not [tag for tag, attributes in page.elements if tag == "i" and not attributes]
    names = [name for _, attributes in page.elements for name in attributes]
    assert not [name for name in names if name.startswith("on")]
    image = next(attributes for tag, attributes in page.elements if tag == "img")
    assert image["alt"] == evil
    assert "49" not in page.text


def test_report_makes_no_requests(image_folder: Path) -> None:
    assert_self_contained(write_page(image_folder, make_run("a", ("a cat", "a dog"), ("x", "y"))))


def test_report_shows_the_best_images_first(image_folder: Path) -> None:
    run = make_run(
        "a",
        ("a boat", "the sea"),
        ("A red cat", "a red cat"),
        ("a red dog here", "the red dog"),
    )
    page = Page(write_page(image_folder, run, train_captions={"a red cat"}))
    cards = [attributes for tag, attributes in page.elements if tag == "article"]
    assert [(card["data-position"], card["data-kind"]) for card in cards] == [
        ("1", "right"),
        ("2", "close"),
        ("0", "wrong"),
    ]
    assert page.text.count("not in training data") == 2
    assert "rate" in page.text
    assert "<b>1e-3</b>" in page.text


def test_report_of_two_models_names_the_run_in_every_panel(image_folder: Path) -> None:
    """A run whose name ends with a number is not a checkpoint: the order stays, and no curve over steps is drawn."""
    first = make_run("clip-vit-base-patch16", ("a cat", "a cat"), ("a red dog", "the sea"))
    second = make_run("effnet-b0", ("a boat", "a cat"), ("a boat", "the sea"))
    comparison = compare_runs(first.samples, first.result, second.samples, second.result)
    output = image_folder / "report.html"
    write_report(
        output,
        title="",
        runs=[first, second],
        image_folder=image_folder,
        settings={},
        train_captions={"a cat"},
        comparisons={second.name: comparison},
    )
    html = output.read_text(encoding="utf-8")
    assert_self_contained(html)
    # The image whose score decreased is shown beside the captions of both runs.
    losses = html[html.index("The greatest losses") : html.index('<section id="images">')]
    assert losses.count('<img src="data:image/webp;base64,') == 1
    text = " ".join(Page(html).text.split())
    assert "by checkpoint" not in text
    assert text.index(first.name) < text.index(second.name)
    sections = {
        "exact match": ("50.0 %", "0.0 %"),
        "Does the image matter?": (f"{first.name}: own image", f"{second.name}: own image"),
        "Memorized or generalized?": (first.name, second.name),
        "Words generated too often": (second.name,),
        f"{second.name} compared with {first.name}": ("-50.0 %", "greatest losses", "-1.00"),
        "Images and captions": (f"filters use the scores of {first.name}",),
        "All scores": (first.name, second.name),
    }
    for heading, expected in sections.items():
        panel = text[text.index(heading) :]
        for part in expected:
            assert part in panel[:900], f"{part!r} under {heading!r}"


def test_report_of_checkpoints_shows_the_newest_first(image_folder: Path) -> None:
    runs = [make_run(f"step-{step}", ("a cat", "a cat")) for step in (100, 200, 300, 400, 1000)]
    html = write_page(image_folder, *runs)
    text = " ".join(Page(html).text.split())
    assert "by checkpoint" in text
    assert text.index("step-1000") < text.index("step-400") < text.index("step-100 ")
    assert "panels below show step-1000" in text, "five runs have no panels of their own"


@pytest.mark.medium
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_compare_runs_equals_scores_of_each_image(data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(["a", "cat", "dog"]), max_size=3).map(" ".join)
    pairs = data.draw(st.lists(st.tuples(words, words), min_size=2, max_size=6))
    first = make_run("first", *((before, "a cat") for before, _ in pairs))
    second = make_run("second", *((after, "a cat") for _, after in pairs))
    comparison = compare_runs(first.samples, first.result, second.samples, second.result)
    difference = comparison.differences["word F1"]
    change = [word_f1(after, ["a cat"]) - word_f1(before, ["a cat"]) for before, after in pairs]
    assert difference.score.value == pytest.approx(np.mean(change))
    assert difference.score.low - 1e-9 <= difference.score.value <= difference.score.high + 1e-9
    assert difference.num_better == sum(value > 1e-9 for value in change)
    assert difference.num_better + difference.num_worse + difference.num_equal == len(pairs)
    is_changed = {n for n, (before, after) in enumerate(pairs) if before != after}
    assert {image.position for image in comparison.changed} == is_changed


def test_mark_captions_marks_words_of_references() -> None:
    captions = ("Cat on a hat", "Cat on a hat", "a cat, on the mat", "")
    sample = Sample("0", "0.png", "", ("a cat, on the Mat",), captions)
    first, second, empty = mark_captions(sample)
    assert first.count == 2
    assert [piece for piece, is_hit in first.pieces if is_hit] == ["Cat", "on", "a"]
    assert not first.is_exact
    assert second.is_exact
    assert empty.pieces == []


def test_report_rejects_runs_on_different_images(image_folder: Path) -> None:
    one = make_run("one", ("a", "b"))
    two = make_run("two", ("a", "b"), ("c", "d"))
    with pytest.raises(ValueError, match="'one' and 'two' are on different images"):
        write_page(image_folder, one, two)


def test_report_rejects_runs_with_different_references(image_folder: Path) -> None:
    """A card shows the references of an image once, for all runs."""
    one = make_run("one", ("a", "b"))
    two = make_run("two", ("a", "c"))
    with pytest.raises(ValueError, match="'one' and 'two' .*different references"):
        write_page(image_folder, one, two)


def test_report_notes_images_that_cannot_be_read(image_folder: Path) -> None:
    run = make_run("a", ("a", "b"), ("c", "d"))
    (image_folder / "1.png").write_bytes(b"no image")
    page = Page(write_page(image_folder, run))
    assert "images that cannot be shown: 1; the first error: 1.png: " in page.text
    assert "image not available" in page.text
    (image_folder / "0.png").unlink()
    with pytest.raises(ValueError, match=r"None of the 2 images can be read.*--image-folder"):
        write_page(image_folder, run)


@pytest.mark.slow
def test_report_of_500_photos_stays_below_10_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images have strong low frequencies and noise, like photos. If there are more than 500, some are left out."""
    # Each of the 20 photos occurs 31 times, but its thumbnail is made once.
    make_thumbnail = evaluation_report.make_thumbnail
    thumbnails: dict[bytes, Any] = {}

    def make_once(pixels: np.ndarray) -> Any:
        key = pixels.tobytes()
        if key not in thumbnails:
            thumbnails[key] = make_thumbnail(pixels)
        return thumbnails[key]

    monkeypatch.setattr(evaluation_report, "make_thumbnail", make_once)
    generator = np.random.default_rng(0)
    for number in range(20):
        coarse = Image.fromarray(generator.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((512, 384)), np.int16)
        noise = generator.normal(0, 6, (384, 512, 1)).astype(np.int16)
        noisy = (smooth + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / f"{number}.jpg", quality=92)
    samples = []
    for number in range(620):
        reference = "a long caption " * 6 + str(number)
        caption = f"word {number} " * 8
        samples.append(Sample(str(number), f"{number % 20}.jpg", "", (reference,), (caption,)))
    run = Run("a", samples, evaluate(samples, java=False, resamples=0))
    html = write_page(tmp_path, run)
    assert html.count("<article") == 500
    assert "500 of 620 images are shown" in html
    assert len(html.encode()) < 10_000_000


# ---- curves and words ----


def test_read_training_log_handles_resumed_and_killed_runs(tmp_path: Path) -> None:
    rows = [
        '{"step": 10, "loss": 3.0, "grad_norm": 1}',
        '{"step": 20, "loss": 2.0}',
        '{"step": 20, "eval_loss": 2.5, "eval_cider": 0.5, "x": []}',
        "",
        '{"step": 20, "loss": 1.5, "note": "a\u2028b"}',  # the step again, after a resume
        '{"step": 30, "loss": NaN}',
        '{"train_runtime": 5.0}',
        '{"step": 30, "lo',
    ]
    log = tmp_path / "trainer_log.jsonl"
    log.write_text("\n".join(rows), encoding="utf-8")
    assert read_training_log(log) == {
        "training": [(10, 3.0), (20, 1.5)],
        "validation": [(20, 2.5)],
        "CIDEr-D": [(20, 0.5)],
        "reward": [],
    }


def test_read_training_log_names_a_bad_line(tmp_path: Path) -> None:
    log = tmp_path / "trainer_log.jsonl"
    log.write_text('{"step": 10, "loss": 3.0}\noops\n{"step": 20, "loss": 3.0}')
    with pytest.raises(ValueError, match=r"trainer_log\.jsonl line 2"):
        read_training_log(log)


def test_compare_word_usage_finds_words_used_too_often_and_too_rarely() -> None:
    pairs = [
        ("a man walks", "a dog walks"),
        ("a man sits", "a cat sits"),
        ("a man stands", "a bird stands"),
    ]
    samples = []
    for number, (caption, reference) in enumerate(pairs * 5):
        references = (reference, reference)
        samples.append(Sample(str(number), f"{number}.png", "", references, (caption,)))
    overused, underused = compare_word_usage(samples)
    (man,) = overused
    assert (man.word, round(man.generated), round(man.references)) == ("man", 15, 0)
    assert {usage.word for usage in underused} == {"dog", "cat", "bird"}
