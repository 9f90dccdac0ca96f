"""The report: whole in one file, harmless whatever a caption says, small, and right in what it shows."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_simplified.evaluation import evaluation_report as report
from llava_simplified.evaluation.evaluation_report import Run, read_log, write_report
from llava_simplified.evaluation.metrics import Sample, evaluate


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(4):
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def _run(name: str, *pairs: tuple[str, str]) -> Run:
    samples = [
        Sample(str(i), f"{i}.png", "Describe.", (true,), (written,))
        for i, (written, true) in enumerate(pairs)
    ]
    return Run(name, samples, evaluate(samples, train_captions=["a cat"], java=False, resamples=20))


def _write(folder: Path, *runs: Run, **options: object) -> str:
    output = folder / "out" / "report.html"
    settings = {"rate": "<b>1e-3</b>"}
    write_report(
        output, title="A & B", runs=runs, image_folder=folder, settings=settings, **options
    )  # type: ignore[arg-type]
    return output.read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Elements with their attributes, and text outside of script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.texts.append(data)


def test_captions_cannot_become_markup(pictures: Path) -> None:
    evil = "<script>alert(1)</script> \"x\" onerror='y' <img src=http://a.b/c> </title> {{ 7 * 7 }}"
    page = _Page(
        _write(
            pictures, _run("<i>run</i>", (evil, evil), (evil, "a dog")), train_captions={"a cat"}
        )
    )
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "i" not in {tag for tag, attributes in page.elements if tag == "i" and not attributes}
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert next(a["alt"] for tag, a in page.elements if tag == "img") == evil
    assert "49" not in "".join(page.texts)


def test_nothing_is_fetched(pictures: Path) -> None:
    html = _write(pictures, _run("a", ("a cat", "a dog"), ("x", "y")))
    sources = [
        value
        for _, a in _Page(html).elements
        for name, value in a.items()
        if name in ("src", "href")
    ]
    assert sources
    assert all(source and source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html


def test_best_first_and_marked(pictures: Path) -> None:
    run = _run(
        "a", ("a boat", "the sea"), ("A red cat", "a red cat"), ("a red dog here", "the red dog")
    )
    page = _Page(_write(pictures, run, train_captions={"a red cat"}))
    cards = [a for tag, a in page.elements if tag == "article"]
    assert [(c["data-position"], c["data-verdict"]) for c in cards] == [
        ("1", "right"),
        ("2", "close"),
        ("0", "wrong"),
    ]
    text = "".join(page.texts)
    assert text.count("never in training") == 2
    assert "rate" in text
    assert "<b>1e-3</b>" in text


def test_words_of_a_true_caption_are_marked() -> None:
    sample = Sample(
        "0",
        "0.png",
        "",
        ("a cat, on the Mat",),
        ("Cat on a hat", "Cat on a hat", "a cat, on the mat"),
    )
    first, second = report._marked(sample)
    assert first["times"] == 2
    assert [word for word, hit in first["words"] if hit] == ["Cat", "on", "a"]
    assert not first["exact"]
    assert second["exact"]


def test_runs_of_other_pictures_are_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match="runs 'two' and 'one' are of different pictures"):
        _write(pictures, _run("one", ("a", "b")), _run("two", ("a", "b"), ("c", "d")))


def test_pictures_that_cannot_be_read(pictures: Path) -> None:
    (pictures / "1.png").write_bytes(b"no picture")
    html = _write(pictures, _run("a", ("a", "b"), ("c", "d")))
    assert "1 pictures can&#39;t be shown; the first: 1.png: not an image" in html
    assert "picture not available" in html
    (pictures / "0.png").unlink()
    with pytest.raises(ValueError, match="none of the 2 pictures can be read"):
        _write(pictures, _run("a", ("a", "b"), ("c", "d")))


@pytest.mark.slow
def test_five_hundred_photos_stay_below_ten_megabytes(tmp_path: Path) -> None:
    """Photo-like: strong at low frequencies, with some noise all over. More than 500 are not all shown."""
    dice = np.random.default_rng(0)
    for i in range(20):
        coarse = Image.fromarray(dice.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(
            (1024, 768)
        )
        noisy = np.asarray(coarse, np.int16) + dice.normal(0, 12, (768, 1024, 1)).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.jpg", quality=92)
    samples = [
        Sample(str(i), f"{i % 20}.jpg", "", ("a long caption " * 6 + str(i),), (f"word {i} " * 8,))
        for i in range(620)
    ]
    run = Run("a", samples, evaluate(samples, java=False, resamples=0))
    html = _write(tmp_path, run)
    assert html.count("<article") == 500
    assert "500 of 620 pictures are shown" in html
    assert len(html.encode()) < 10_000_000


def test_log_with_extra_keys_a_resume_and_a_cut_off_end(tmp_path: Path) -> None:
    rows = [
        '{"step": 10, "loss": 3.0, "grad_norm": 1}',
        '{"step": 20, "loss": 2.0}',
        '{"step": 20, "eval_loss": 2.5, "eval_cider": 0.5, "x": []}',
        "",
        '{"step": 20, "loss": 1.5}',
        '{"step": 30, "loss": NaN}',
        '{"train_runtime": 5.0}',
        '{"step": 30, "lo',
    ]
    log = tmp_path / "trainer_log.jsonl"
    log.write_text("\n".join(rows))
    assert read_log(log) == {
        "training": [(10, 3.0), (20, 1.5)],
        "validation": [(20, 2.5)],
        "CIDEr-D": [(20, 0.5)],
    }
    log.write_text("\n".join(['{"step": 10, "loss": 3.0}', "oops", '{"step": 20, "loss": 3.0}']))
    with pytest.raises(ValueError, match=r"trainer_log\.jsonl line 2: not a row of a training log"):
        read_log(log)


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 6.8), (0, 1), (3, 3), (1e-4, 2e-3), (0, 120_000), (0, 0)]
)
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    ticks = report._ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:e}".rstrip("0")[0] in "125"


def test_chart_places_points_and_averages_long_lines() -> None:
    chart = report._chart("Loss", "", {"a": [(0, 4.0), (50, 2.0), (100, 0.0)]})
    assert [(x, y) for x, y, *_ in chart["lines"][0]["spots"]] == [(0, 0), (50, 50), (100, 100)]
    many = report._chart("Loss", "", {"a": [(i, i % 2) for i in range(10_000)]}, most=100)
    values = [float(value) for *_, value in many["lines"][0]["spots"]]
    assert values == [0.5] * 100


def test_words_written_too_often_and_too_rarely() -> None:
    pairs = [
        ("a man walks", "a dog walks"),
        ("a man sits", "a cat sits"),
        ("a man stands", "a bird stands"),
    ] * 5
    samples = [
        Sample(str(i), f"{i}.png", "", (true, true), (written,))
        for i, (written, true) in enumerate(pairs)
    ]
    words = report._words(samples)
    assert [(w["word"], w["ours"], w["true"]) for w in words["over"]] == [("man", "15", "0")]
    assert {w["word"] for w in words["under"]} == {"dog", "cat", "bird"}
