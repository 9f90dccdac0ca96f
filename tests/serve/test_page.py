"""The page, by its functions; and, where there is a Chromium, as a visitor sees it: the words, the light on the picture,
and what a phone shows. All of it without a request to any other server."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from test_api import Limits, Live, command, endless, live  # noqa: F401

from llava_simplified.data.images import decode_image
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message
from llava_simplified.serve.attention_map import look
from llava_simplified.serve.engine import Busy, Worker
from llava_simplified.serve.page import (
    Conversation,
    Exchange,
    Page,
    example_pictures,
    mount_page,
    render,
    turns_of,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"  # fmt: skip
FILE = "#picture input[type=file]"
READY = "#view .answer:not(.writing)"


# ---- without a browser ----


def test_whatever_is_said_is_text() -> None:
    said = Exchange("<b>${1}</b>", ['<img src=x onerror="boom()"> `{{7}}` ${7*7}'])
    html = render(Conversation([said]), "What?")
    assert not re.search(r"<(?!/?(p|span|label|input)\b)", html), "nothing but our own elements"
    assert "&lt;b&gt;${1}&lt;/b&gt;" in html and 'onerror="' not in html
    assert "question" not in render(Conversation([Exchange("What?", ["a cat"])]), "What?"), (
        "it was not asked by hand"
    )


def test_the_next_question_stands_behind_the_answers_that_there_were() -> None:
    exchanges = [
        Exchange("a?", ["1", "2"]),
        Exchange("b?", [""]),
        Exchange("c?", ["3"]),
        Exchange("d?", [""]),
    ]
    assert [turn.content for turn in turns_of(exchanges)] == ["a?", "1", "c?", "3", "d?"]


def test_examples_are_spread_over_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures there"):
        example_pictures(tmp_path)
    for number in range(60):
        (tmp_path / f"{number:02}.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert [path.stem for path in example_pictures(tmp_path)] == [
        f"{number:02}" for number in range(0, 60, 5)
    ]
    assert len(example_pictures(tmp_path, 100)) == 60


def ask(model: Llava, work: Callable[[Page], Any], **batching: Any) -> Any:
    async def run() -> Any:
        async with Worker(model, **batching) as worker:
            result = await work(Page(worker))
            assert not worker.places
            return result

    return asyncio.run(run())


def test_an_answer_grows_and_an_error_leaves_what_there_was(
    model: Llava, photos: Sequence[bytes], tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(photos[0])
    (tmp_path / "broken.png").write_bytes(photos[0][:-40])
    photo, talk = str(tmp_path / "photo.png"), Conversation()

    async def visit(page: Page) -> None:
        seen = [html async for html, _ in page.begin(talk, photo, "", 0, 1, 24)]
        assert len(seen) > 4 and "writing" in seen[-2] and "writing" not in seen[-1]
        caption = model.caption(photos[0], max_new_tokens=24)
        assert talk.exchanges[0].answers == [caption]
        async for _ in page.ask(talk, photo, "And?", 0.9, 3, 4):
            pass
        assert len(talk.exchanges[1].answers) == 3
        before = list(talk.exchanges)
        for picture, samples, problem in (
            (str(tmp_path / "broken.png"), 1, "damaged"),
            (str(tmp_path / "none.png"), 1, "no longer here"),
            (None, 1, "no picture yet"),
            (photo, 3, "temperature"),
        ):
            *_, (html, _) = [
                update async for update in page.ask(talk, picture, "And?", 0, samples, 4)
            ]
            assert problem in html and "problem" in html and str(tmp_path) not in html
            assert talk.exchanges == before and talk.writing is None
        turns = [
            Message("user", model.instruction),
            Message("assistant", caption),
            Message("user", "Why?"),
        ]
        talk.exchanges[1].answers[0] = ""
        async for _ in page.ask(talk, photo, "Why?", 0, 1, 6):
            pass
        assert talk.exchanges[-1].answers[0] == model.chat(turns, [photo], max_new_tokens=6)
        async for _ in page.begin(talk, None, "", 0, 1, 4):
            pass
        assert talk.exchanges == []

    ask(model, visit)


def test_a_new_question_ends_the_answer_under_way(
    model: Llava, photos: Sequence[bytes], tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(photos[0])
    photo, talk = str(tmp_path / "photo.png"), Conversation()

    async def visit(page: Page) -> None:
        first = page.begin(talk, photo, "", 0, 1, 200)
        for _ in range(3):
            await anext(first)
        async for _ in page.begin(talk, photo, "Again?", 0, 1, 5):
            pass
        assert [html async for html, _ in first] == []
        assert [exchange.question for exchange in talk.exchanges] == ["Again?"]
        second = page.ask(talk, photo, "More?", 0, 1, 200)
        for _ in range(3):
            await anext(second)
        stopped = page.stop(talk)
        assert "writing" not in stopped and [html async for html, _ in second] == []

    with endless(model):
        ask(model, visit)


def test_busy_is_said(model: Llava, photos: Sequence[bytes], tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(photos[0])

    async def visit(page: Page) -> None:
        with page.worker.place(), pytest.raises(Busy), page.worker.place():
            pass
        with page.worker.place():
            updates = [
                html
                async for html, _ in page.begin(
                    Conversation(), str(tmp_path / "photo.png"), "", 0, 1, 4
                )
            ]
        assert len(updates) == 1 and "Many people" in updates[0]

    ask(model, visit, batch_size=1, queue=0)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make setup-browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server(
    model: Llava, photos: Sequence[bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("examples")
    for number, photo in enumerate(photos[10:13]):
        (folder / f"{number}.png").write_bytes(photo)
    with live(model, mount=lambda app, worker: mount_page(app, worker, "tiny", "", Limits(), example_pictures(folder))) as here:  # fmt: skip
        yield here


@pytest.fixture
def visit(browser: Any, server: Live) -> Iterator[Callable[..., Any]]:
    """Opens the page in a window of its own; in the end, no request went elsewhere and no script has failed."""
    contexts, requests, faults = [], [], []

    def open_page(url: str = server.url, **options: Any) -> Any:
        contexts.append(context := browser.new_context(**options))
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    elsewhere = [
        url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))
    ]
    assert requests and not elsewhere
    assert not faults


def show(page: Any, data: bytes, name: str = "photo.png", mime: str = "image/png") -> None:
    page.locator(FILE).wait_for(state="attached")
    page.locator(FILE).set_input_files({"name": name, "mimeType": mime, "buffer": data})


def words(page: Any) -> str:
    return page.locator("#view .answer").last.evaluate("e => e.textContent")


def wide_photo() -> bytes:
    """Twice as wide as high: the tower sees the middle."""
    image = Image.fromarray(
        np.random.default_rng(7).integers(0, 255, (4, 8, 3), dtype=np.uint8)
    ).resize((400, 200))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_the_caption_streams_in_and_a_word_lights_the_picture(
    visit: Callable[..., Any], server: Live, model: Llava
) -> None:
    photo = wide_photo()
    page = visit()
    page.locator(FILE).wait_for(state="attached")
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const text = document.querySelector("#view .answer")?.textContent;
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.querySelector("#view"), {subtree: true, childList: true, characterData: true}); }"""
    )
    show(page, photo)
    page.locator(READY).wait_for()
    caption = model.caption(photo, max_new_tokens=64)
    assert words(page) == caption
    seen = page.evaluate("window.seen")
    assert len(seen) > 2 and all(late.startswith(early) for early, late in pairwise(seen)), (
        "it streams"
    )

    page.locator("#view .word").first.hover()
    page.locator("#veil").wait_for()
    (grid,) = look(model, model.instruction, [photo], caption)[0]
    assert (
        f"{round(100 * float(grid.sum()))} % of the model's attention"
        in page.locator("#view").inner_text()
    )
    veil, picture = (
        page.locator("#veil").bounding_box(),
        page.locator("#picture img").bounding_box(),
    )
    assert veil["width"] / veil["height"] == pytest.approx(2, rel=0.01), (
        "it lies on the picture, not on its frame"
    )
    assert veil["x"] >= picture["x"] - 1 and veil["y"] >= picture["y"] - 1
    alpha = np.array(
        page.evaluate(
            """() => { const veil = document.getElementById("veil"), {width, height} = veil;
            const data = veil.getContext("2d").getImageData(0, 0, width, height).data;
            return Array.from({length: height}, (_, y) => Array.from({length: width}, (_, x) => data[4 * (y * width + x) + 3])); }"""
        )
    )
    height, width = alpha.shape
    rows, columns = grid.shape
    left, top, right, bottom = model.vision_tower.transform.region(200, 400)
    assert (left, right) == (0.25, 0.75)
    assert (alpha[:, : int(0.24 * width)] > 175).all(), "what the tower does not see is dark"
    y = [int((top + (row + 0.5) / rows * (bottom - top)) * height) for row in range(rows)]
    x = [
        int((left + (column + 0.5) / columns * (right - left)) * width) for column in range(columns)
    ]
    light = 1 - (grid - grid.min()) / (grid.max() - grid.min())
    np.testing.assert_allclose(alpha[np.ix_(y, x)] / 255, 0.22 + 0.5 * light.numpy(), atol=0.15)
    assert np.corrcoef(alpha[np.ix_(y, x)].ravel(), light.numpy().ravel())[0, 1] > 0.98

    page.mouse.move(5, 5)
    page.locator("#veil").wait_for(state="detached")
    page.locator("#view .word").nth(1).focus()
    page.locator("#veil").wait_for()


@pytest.mark.slow
def test_a_bad_file_is_explained_and_the_next_one_is_answered(
    visit: Callable[..., Any], model: Llava, photos: Sequence[bytes]
) -> None:
    file = io.BytesIO()
    Image.fromarray(decode_image(photos[3])).resize((300, 300)).save(file, "JPEG", quality=95)
    page = visit()
    problem = page.locator("#view .problem")
    for data, name, message in (
        (file.getvalue()[:-3000], "cut.jpg", "This picture is damaged"),
        (b"GIF? no.", "text.png", "This file is no picture"),
    ):
        show(page, data, name)
        problem.filter(has_text=message).wait_for()
        assert page.locator("#view .answer").count() == 0
        page.get_by_role("button", name="Remove Image").click()
        problem.wait_for(state="detached")
    page.locator("#examples img").nth(1).click()
    page.locator(READY).wait_for()
    assert words(page) == model.caption(photos[11], max_new_tokens=64)


@pytest.mark.slow
def test_questions_samples_and_what_looks_like_markup(
    visit: Callable[..., Any], server: Live, model: Llava, photos: Sequence[bytes]
) -> None:
    page = visit()
    show(page, photos[5])
    page.locator(READY).wait_for()
    caption, question = words(page), "<img src=x> `${document.title}` {{name}}?"
    page.locator("#asking textarea").fill(question)
    page.keyboard.press("Enter")
    page.locator("#view .question").wait_for()
    page.locator(READY).nth(1).wait_for()
    assert page.locator("#view .question").inner_text().endswith(question)
    turns = [
        Message("user", model.instruction),
        Message("assistant", caption),
        Message("user", question),
    ]
    assert words(page) == model.chat(turns, [photos[5]], max_new_tokens=64)

    page.get_by_text("Settings").click()
    number, temperature = (
        page.get_by_label(f"number input for {name}") for name in ("Answers", "Temperature")
    )

    def typed() -> bool:
        number.fill("3")
        page.wait_for_timeout(100)
        return temperature.input_value() == "0.7"

    server.wait(
        typed
    )  # what is typed within milliseconds of the click is lost: Gradio still builds the settings
    page.locator("#send").click()
    page.locator(READY).nth(2).wait_for()
    assert (
        page.locator("#view .answer").count() == 3 and page.locator("#view .question").count() == 0
    )


@pytest.mark.slow
def test_a_phone_shows_all_of_it_and_a_tap_is_enough(
    visit: Callable[..., Any], photos: Sequence[bytes]
) -> None:
    page = visit(
        viewport={"width": 360, "height": 740},
        has_touch=True,
        is_mobile=True,
        device_scale_factor=2,
    )

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.locator("#picture").wait_for()
    assert fits()
    show(page, photos[2])
    page.locator(READY).wait_for()
    page.locator("#asking textarea").fill("x" * 300)
    page.locator("#send").tap()
    page.locator("#view .question").wait_for()
    page.locator(READY).nth(1).wait_for()
    page.get_by_text("Settings").tap()
    assert fits()
    page.locator("#view .word").first.tap()
    page.locator("#veil").wait_for()
    assert fits()


@pytest.mark.slow
def test_whoever_stops_or_leaves_frees_the_place(
    visit: Callable[..., Any], server: Live, model: Llava, photos: Sequence[bytes]
) -> None:
    handle = model.language_model.register_forward_pre_hook(
        lambda *_: time.sleep(0.3)
    )  # 64 tokens take longer than we wait
    try:
        with endless(model):
            page = visit()
            show(page, photos[1])
            page.locator("#view .answer.writing .word").first.wait_for()
            page.locator("#stop").click()
            page.locator(READY).wait_for()
            server.wait(lambda: not server.worker.places)
            page.locator("#send").click()
            page.locator("#view .answer.writing .word").first.wait_for()
            assert server.worker.places
            page.close()
            server.wait(lambda: not server.worker.places)
    finally:
        handle.remove()


@pytest.mark.slow
def test_the_key_is_asked_for(
    visit: Callable[..., Any], model: Llava, photos: Sequence[bytes]
) -> None:
    def mount(app: Any, worker: Worker) -> None:
        mount_page(app, worker, "tiny", "sésame", Limits(), [])

    with live(model, key="sésame", mount=mount) as locked:
        assert httpx.get(locked.url + "/config").status_code == 401
        page = visit(locked.url)
        name, password = page.get_by_label("username"), page.get_by_label("password")
        for word in ("open", "sésame"):
            name.fill("me")
            password.fill(word)
            page.get_by_role("button", name="Login").click()
            if word == "open":
                page.get_by_text("Incorrect Credentials").wait_for()
        show(page, photos[4])
        page.locator(READY).wait_for()
        page.close()


@pytest.mark.slow
def test_a_window_that_stands_open_does_not_hold_up_the_end(
    visit: Callable[..., Any], command: Any
) -> None:
    process, url = command()
    page = visit(url)
    page.locator(FILE).wait_for(state="attached")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, "--timeout is 120 s"
