"""The web page: its routes, and how it behaves in a real browser (skipped without Chromium)."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_server import (
    Limits,
    LiveServer,
    live_server,
    paused_after,
    wide_photo,
    without_end_tokens,
)
from PIL import Image
from tiny import build_llava

from llava_simplified.data.images import decode_image
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message
from llava_simplified.serve import page
from llava_simplified.serve.attention_map import WORD, attention_map
from llava_simplified.serve.page import find_examples, load_examples


def find_chromium() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    return None


CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
# Run all of these tests in one process, because a browser takes seconds to start.
IN_BROWSER = pytest.mark.xdist_group("browser")
COMPLETE = ".answer:not(.writing)"  # selects answers that have ended


# ---- without a browser ----


def test_find_examples_spreads_over_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--examples"):
        find_examples(tmp_path)  # no images
    for number in range(60):
        (tmp_path / f"{number:02}.jpg").touch()
    (tmp_path / "notes.txt").touch()
    found = find_examples(tmp_path)
    assert [path.stem for path in found] == [f"{number:02}" for number in range(0, 60, 5)]
    assert len(find_examples(tmp_path, 100)) == 60


def test_load_examples_shrinks_images_and_skips_broken_files(
    tmp_path: Path, photos: Sequence[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        page.logger, "warning", lambda text, *values: warnings.append(text % values)
    )
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "large.png")
    (tmp_path / "small.png").write_bytes(photos[0])
    (tmp_path / "broken.png").write_bytes(photos[0][:-40])
    (tmp_path / "missing.png").symlink_to(tmp_path / "nowhere.png")
    examples = load_examples(find_examples(tmp_path))
    images = [Image.open(io.BytesIO(example)) for example in examples]
    found = [(image.format, image.size) for image in images]
    assert found == [("JPEG", (768, 384)), ("JPEG", (48, 40))]
    assert len(warnings) == 2
    assert "broken.png" in warnings[0] and "missing.png" in warnings[1]
    with pytest.raises(ValueError, match="--examples"):
        load_examples([tmp_path / "broken.png"])


def test_settings_describe_model_and_limits(model: Llava, photos: Sequence[bytes]) -> None:
    limits = Limits(max_tokens=40)
    with live_server(model, limits=limits, batch_size=4, examples=photos[:3]) as server:
        settings = httpx.get(f"{server.url}/page.json").json()
    assert settings == {
        "model": "tiny",
        "instruction": model.instruction,
        "key_required": False,
        "examples": 3,
        "max_body": 20_000_000,
        "max_tokens": 40,
        "default_max_tokens": 40,
        "max_answers": 4,
        "sampling_temperature": 0.7,
    }


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("Chromium is not installed; run make setup-browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def examples(photos: Sequence[bytes], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("examples")
    for number, photo in enumerate(photos[8:20]):
        (folder / f"{number:02}.png").write_bytes(photo)
    return load_examples(find_examples(folder))


@pytest.fixture(scope="module")
def server(model: Llava, examples: list[bytes]) -> Iterator[LiveServer]:
    # A small limit, so that a file above it can be sent to the browser quickly.
    with live_server(model, limits=Limits(max_body=2_000_000), examples=examples) as server:
        yield server


@pytest.fixture
def visit(browser: Any, server: LiveServer) -> Iterator[Callable[..., Any]]:
    """Open the page in a new browser context.

    At the end, assert that no request went to another server, that no script failed, and that nothing violated the
    Content-Security-Policy.
    """
    contexts: list[Any] = []
    requests: list[str] = []
    faults: list[str] = []

    def record_message(message: Any) -> None:
        # The tests cause some requests to fail. Browsers report these as errors too, so ignore them.
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    def open_page(url: str = server.url, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", record_message)
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
    page.locator("#app").wait_for()
    page.locator("#file").set_input_files({"name": name, "mimeType": mime, "buffer": data})


def words(page: Any) -> str:
    return page.locator(".answer").last.evaluate("e => e.textContent")


def veil_alpha(page: Any) -> np.ndarray:
    """Return the opacity of the veil (the canvas with the attention map, over the image): (height, width), 0 to 255."""
    rows = page.evaluate(
        """() => {
            const veil = document.getElementById("veil");
            const {width, height} = veil;
            const data = veil.getContext("2d").getImageData(0, 0, width, height).data;
            const row = (y) => Array.from({length: width}, (_, x) => data[4 * (y * width + x) + 3]);
            return Array.from({length: height}, (_, y) => row(y));
        }"""
    )
    return np.array(rows)


@pytest.mark.slow
@IN_BROWSER
def test_page_streams_caption_and_shows_attention(visit: Callable[..., Any], model: Llava) -> None:
    photo = wide_photo()
    page = visit()
    page.locator("#app").wait_for()
    page.evaluate(
        """() => {
            window.seen = [];
            const record = () => {
                const text = document.querySelector(".answer")?.textContent;
                if (text && text !== window.seen.at(-1)) window.seen.push(text);
            };
            const changes = {subtree: true, childList: true, characterData: true};
            new MutationObserver(record).observe(document.getElementById("conversation"), changes);
        }"""
    )
    show(page, photo)
    page.locator(COMPLETE).wait_for()
    caption = model.caption(photo, max_new_tokens=64)
    assert words(page) == caption
    assert page.locator(".word").count() == len(WORD.findall(caption))
    seen = page.evaluate("window.seen")
    assert len(seen) > 2 and all(late.startswith(early) for early, late in pairwise(seen))
    assert page.locator("#conversation").get_attribute("aria-live") == "polite"
    assert page.locator("#conversation").get_attribute("aria-busy") == "false"

    page.locator(".word").first.hover()
    page.locator("#veil").wait_for()
    (grid,) = attention_map(model, model.instruction, [photo], caption)[0]
    percent = round(100 * float(grid.sum()))
    assert f"{percent} % of the model's attention" in page.locator("#note").inner_text()
    veil, preview = page.locator("#veil").bounding_box(), page.locator("#preview").bounding_box()
    assert veil["width"] / veil["height"] == pytest.approx(2, rel=0.01), (
        "the veil must cover the image, and not its box"
    )
    assert veil["x"] >= preview["x"] - 1 and veil["y"] >= preview["y"] - 1
    centers = [
        (box["y"] + box["height"] / 2, box["x"] + box["width"] / 2) for box in (veil, preview)
    ]
    np.testing.assert_allclose(centers[0], centers[1], atol=1.5)

    alpha = veil_alpha(page)
    height, width = alpha.shape
    rows, columns = grid.shape
    left, top, right, bottom = model.vision_tower.transform.visible_region(200, 400)
    assert (left, right) == (0.25, 0.75)
    assert (alpha[:, : int(0.24 * width)] > 175).all(), (
        "the margin that the tower does not receive must be dark"
    )
    y = [int((top + (row + 0.5) / rows * (bottom - top)) * height) for row in range(rows)]
    x = [
        int((left + (column + 0.5) / columns * (right - left)) * width) for column in range(columns)
    ]
    light = 1 - (grid - grid.min()) / (grid.max() - grid.min())
    np.testing.assert_allclose(alpha[np.ix_(y, x)] / 255, 0.22 + 0.5 * light.numpy(), atol=0.15)
    assert np.corrcoef(alpha[np.ix_(y, x)].ravel(), light.numpy().ravel())[0, 1] > 0.98

    page.get_by_label("compare with the other words").check()
    page.locator(".word").first.hover()
    page.locator("#note").filter(has_text="above the average").wait_for()
    above_average = """async (shares) => {
        const {aboveAverage} = await import("/page_attention.js");
        return aboveAverage({shares}, 1);
    }"""
    assert page.evaluate(above_average, [[0.5, 0.5], [0.75, 0.25]]) == [0.125, 0]
    page.get_by_label("compare with the other words").uncheck()

    page.mouse.move(5, 5)
    page.locator("#veil").wait_for(state="detached")
    page.locator(".word").first.focus()
    page.locator("#veil").wait_for()
    page.keyboard.press("ArrowRight")
    assert (
        page.locator(".word")
        .nth(1)
        .evaluate("e => e === document.activeElement && e.matches('.pointed')")
    )
    page.locator("#question").focus()
    page.locator("#veil").wait_for(state="detached")


@pytest.mark.slow
@IN_BROWSER
def test_veil_of_a_padded_image_shows_the_patches_of_the_image(
    visit: Callable[..., Any], models_folder: Path
) -> None:
    """The model receives a square with borders above and below the image. Their patches are not shown on the page."""
    model = build_llava(models_folder, image_aspect_ratio="pad")
    photo = wide_photo()  # 400 x 200
    with live_server(model, examples=[]) as server:
        page = visit(server.url)
        show(page, photo)
        page.locator(COMPLETE).wait_for()
        page.locator(".word").first.hover()
        page.locator("#veil").wait_for()
        alpha = veil_alpha(page)
        grid = attention_map(model, model.instruction, [photo], words(page))[0, 0]
    assert grid.shape == (4, 4)
    light = (grid - grid.min()) / (grid.max() - grid.min())
    height, width = alpha.shape
    assert width / height == pytest.approx(2, rel=0.01)
    # The square has 400 x 400 pixels. The image occupies its pixel rows 100 to 299, which are rows 1 and 2 of the patches.
    y = [height // 4, 3 * height // 4]
    x = [(2 * column + 1) * width // 8 for column in range(4)]
    expected = 0.72 - 0.5 * light[1:3].numpy()
    np.testing.assert_allclose(alpha[np.ix_(y, x)] / 255, expected, atol=0.05)
    assert np.ptp(expected) > 0.2, "the patches must differ"


@pytest.mark.slow
@IN_BROWSER
def test_veil_disappears_with_new_answer_and_new_image(
    visit: Callable[..., Any], model: Llava, photos: Sequence[bytes]
) -> None:
    page = visit()
    show(page, photos[6])
    page.locator(COMPLETE).wait_for()

    def ask_question() -> None:
        page.get_by_label("Question").fill("And?")
        page.keyboard.press("Enter")

    def press_remove() -> None:
        # A click would move the pointer away from the word, which removes the veil as well.
        page.locator("#remove").evaluate("button => button.click()")

    for start_next in (
        lambda: page.locator("#question").press("Enter"),
        ask_question,
        lambda: show(page, photos[7]),
        press_remove,
    ):
        page.locator(".word").first.hover()
        page.locator("#veil").wait_for()
        start_next()
        page.locator("#veil").wait_for(state="detached")
        if page.locator("#remove").is_visible():
            page.locator(COMPLETE).last.wait_for()
            page.mouse.move(5, 5)
    assert page.locator(".answer").count() == 0 and page.locator("#drop").is_visible()


@pytest.mark.slow
@IN_BROWSER
def test_bad_files_are_explained_and_next_image_is_captioned(
    visit: Callable[..., Any], model: Llava, photos: Sequence[bytes], examples: list[bytes]
) -> None:
    file = io.BytesIO()
    Image.fromarray(decode_image(photos[3])).resize((300, 300)).save(file, "JPEG", quality=95)
    damaged = bytearray(file.getvalue())
    damaged[-3000:-2000] = bytes(1000)
    bomb = io.BytesIO()
    Image.new("1", (8000, 8000)).save(bomb, "PNG")
    heic = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100)
    page = visit()
    problem = page.get_by_role("alert")
    for data, name, mime, message in (
        (file.getvalue()[:-3000], "cut.jpg", "image/jpeg", "This image is damaged"),
        (bytes(damaged), "damaged.jpg", "image/jpeg", "This image is damaged"),
        (b"GIF? no.", "text.png", "image/png", "This file is not an image"),
        (b"<html></html>", "page.png", "image/png", "This file is a web page"),
        (
            bomb.getvalue(),
            "bomb.png",
            "image/png",
            "This image is too large: it has 8000x8000 pixels",
        ),
        (b"", "empty.png", "image/png", "This file is empty"),
        (bytes(2_100_000), "huge.png", "image/png", "This file is too large: it has 2.1 MB"),
        (heic, "IMG_1.HEIC", "image/heic", "If it is a HEIC photo, export it as JPEG"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "a.svg",
            "image/svg+xml",
            "SVG drawings are not",
        ),
        (b"%PDF-1.7", "a.pdf", "application/pdf", "This file is a PDF document"),
    ):
        show(page, data, name, mime)
        problem.filter(has_text=message).wait_for()
        assert page.locator(".answer").count() == 0
        page.get_by_role("button", name="Remove image").click()
        problem.wait_for(state="hidden")
    page.get_by_role("button", name="Example 2").click()
    page.locator(COMPLETE).wait_for()
    assert words(page) == model.caption(examples[1], max_new_tokens=64)


@pytest.mark.slow
@IN_BROWSER
def test_image_can_be_dropped_pasted_and_photographed(
    visit: Callable[..., Any], server: LiveServer, model: Llava, photos: Sequence[bytes]
) -> None:
    captions = {
        "drop": model.caption(photos[8], max_new_tokens=64),
        "paste": model.caption(photos[9], max_new_tokens=64),
    }
    page = visit()
    page.locator("#app").wait_for()
    for number, event in ((8, "drop"), (9, "paste")):
        transfer = page.evaluate_handle(
            """(data) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
                transfer.items.add(new File([bytes], "photo.png", {type: "image/png"}));
                return transfer;
            }""",
            base64.b64encode(photos[number]).decode(),
        )
        page.evaluate(
            """([kind, transfer]) => {
                const options = {bubbles: true, cancelable: true};
                document.body.dispatchEvent(kind === "drop"
                    ? new DragEvent("drop", {...options, dataTransfer: transfer})
                    : new ClipboardEvent("paste", {...options, clipboardData: transfer}));
            }""",
            [event, transfer],
        )
        page.locator(COMPLETE).wait_for()
        assert words(page) == captions[event], event
    page.get_by_role("button", name="Use camera").click()
    page.locator("#camera-dialog").wait_for()
    page.locator("video").evaluate(
        "v => v.videoWidth || new Promise((ready) => v.onloadedmetadata = ready)"
    )
    page.get_by_role("button", name="Take photo").click()
    page.locator("#camera-dialog").wait_for(state="hidden")
    # Chromium's artificial camera has larger images than the photos.
    page.wait_for_function("() => document.getElementById('preview').naturalWidth > 48")
    page.locator(COMPLETE).wait_for()
    assert words(page) != captions["paste"]
    assert page.locator("video").evaluate("v => v.srcObject") is None, "the camera must be released"


@pytest.mark.slow
@IN_BROWSER
def test_follow_up_questions_several_answers_and_markup_are_shown(
    visit: Callable[..., Any], server: LiveServer, model: Llava, photos: Sequence[bytes]
) -> None:
    page = visit()
    show(page, photos[5])
    page.locator(COMPLETE).wait_for()
    caption, question = words(page), "<img src=x onerror=alert(1)> `${document.title}` {{name}}?"
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")
    page.locator(".question").wait_for()
    page.locator(COMPLETE).nth(1).wait_for()
    assert page.locator(".question").inner_text() == question
    assert page.locator("#conversation img").count() == 0
    turns = [
        Message("user", model.instruction),
        Message("assistant", caption),
        Message("user", question),
    ]
    assert words(page) == model.chat(turns, [photos[5]], max_new_tokens=64)

    page.get_by_text("Settings").click()
    page.get_by_label("Answers").fill("3")
    assert page.get_by_label("Temperature").input_value() == "0.7"
    page.get_by_label("Maximum length").fill("5")
    page.get_by_role("button", name="Ask").click()
    page.locator(COMPLETE).nth(2).wait_for()
    assert page.locator(".answer").count() == 3 and page.locator(".question").count() == 0
    assert page.get_by_role("button", name="Copy").count() == 3
    page.get_by_label("Temperature").fill("0")
    assert page.get_by_label("Answers").input_value() == "1"


@pytest.mark.slow
@IN_BROWSER
def test_empty_fields_have_their_first_values(
    visit: Callable[..., Any], server: LiveServer, photos: Sequence[bytes]
) -> None:
    page = visit()
    show(page, photos[5])
    page.locator(COMPLETE).wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Answers").fill("")
    page.get_by_label("Maximum length").fill("")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Ask").click()
    default = httpx.get(f"{server.url}/page.json").json()["default_max_tokens"]
    assert request.value.post_data_json["max_tokens"] == default > 1
    page.locator(COMPLETE).wait_for()  # one answer, in place of the first
    assert page.locator(".answer").count() == 1


def send_events(route: Any, *texts: str) -> None:
    """Answer a browser's request for a chat completion with these pieces of text."""
    events = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    route.fulfill(status=200, content_type="text/event-stream", body=body)


@pytest.mark.slow
@IN_BROWSER
def test_answer_is_inserted_as_text(visit: Callable[..., Any], photos: Sequence[bytes]) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    answer = '<b>${1}</b> <img src=x onerror="boom()"> 日本 `{{7}}` <script>boom()</script>'
    page.route("**/v1/chat/completions", lambda route: send_events(route, answer[:20], answer[20:]))
    show(page, photos[0])
    page.locator(COMPLETE).wait_for()
    assert words(page) == answer
    tags = page.locator(".answer").evaluate(
        "e => [...new Set([...e.querySelectorAll('*')].map((x) => x.tagName))]"
    )
    assert tags == ["SPAN"]
    assert page.locator(".word").count() == len(WORD.findall(answer))
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == answer


def respond_with(status: int, headers: dict[str, str], body: Any) -> Callable[[Any], None]:
    return lambda route: route.fulfill(status=status, headers=headers, json=body)


@pytest.mark.slow
@IN_BROWSER
def test_failures_of_server_are_explained(
    visit: Callable[..., Any], photos: Sequence[bytes]
) -> None:
    page = visit()
    failures: list[tuple[int, dict[str, str], str, str]] = [
        (
            429,
            {"retry-after": "7"},
            "queue_full",
            "The server is busy. Please try again in 7 seconds.",
        ),
        (504, {}, "timeout", "The answer took too long."),
        (500, {}, "", "The server failed."),
        (413, {}, "body_too_large", "too large for the server"),
        (400, {}, "", "The server refused the request: because"),
    ]
    for status, headers, code, message in failures:
        body = {"error": {"message": "because", "type": "x", "param": None, "code": code or None}}
        page.route("**/v1/chat/completions", respond_with(status, headers, body))
        show(page, photos[0])
        page.get_by_role("alert").filter(has_text=message).wait_for()
        assert page.locator(".answer").count() == 0
        page.unroute("**/v1/chat/completions")
    event = 'data: {"error": {"message": "x", "type": "x", "param": null, "code": "timeout"}}\n\n'
    for respond, message in (
        (
            lambda route: route.fulfill(content_type="text/event-stream", body=event),
            "took too long",
        ),
        (
            lambda route: route.fulfill(content_type="text/event-stream", body="data: "),
            "connection to the server",
        ),
        (lambda route: route.abort(), "connection to the server"),
    ):
        page.route("**/v1/chat/completions", respond)
        page.get_by_label("Question").fill("And?")
        page.keyboard.press("Enter")
        page.get_by_role("alert").filter(has_text=message).wait_for()
        assert page.get_by_label("Question").input_value() == "And?", (
            "the question must stay, so that it can be sent again"
        )
        page.unroute("**/v1/chat/completions")
    page.keyboard.press("Enter")
    page.locator(COMPLETE).wait_for()
    assert page.get_by_role("alert").count() == 0


@pytest.mark.slow
@IN_BROWSER
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_phone_and_tap_shows_attention(
    visit: Callable[..., Any], photos: Sequence[bytes], scheme: str
) -> None:
    page = visit(
        viewport={"width": 360, "height": 740},
        has_touch=True,
        is_mobile=True,
        device_scale_factor=2,
        color_scheme=scheme,
    )

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.locator("#example-list img").nth(11).wait_for()
    assert fits()
    show(page, photos[2])
    page.locator(COMPLETE).wait_for()
    page.get_by_label("Question").fill("x" * 300)
    page.get_by_role("button", name="Ask").tap()
    page.locator(".question").wait_for()
    page.locator(COMPLETE).nth(1).wait_for()
    page.get_by_text("Settings").tap()
    assert fits()
    page.locator(".word").first.tap()
    page.locator("#veil").wait_for()
    assert fits()


@pytest.mark.slow
@IN_BROWSER
def test_stopping_or_leaving_frees_sequence(
    visit: Callable[..., Any], server: LiveServer, model: Llava, photos: Sequence[bytes]
) -> None:
    page = visit()

    def wait_until_idle(resume: threading.Event) -> None:
        resume.set()
        server.wait_until(lambda: not server.engine.requests_in_flight)

    with without_end_tokens(model):
        # Pause the model each time, so that the answer cannot end before the page is used.
        with paused_after(model, steps=12) as resume:
            show(page, photos[1])
            page.locator(".answer.writing .word").first.wait_for()
            page.get_by_role("button", name="Stop").click()
            page.locator(COMPLETE).wait_for()
            assert words(page), "the text that has arrived must remain"
            wait_until_idle(resume)
        with paused_after(model, steps=12) as resume:
            page.get_by_role("button", name="Ask").click()
            page.locator(".answer.writing .word").first.wait_for()
            assert server.engine.requests_in_flight
            page.get_by_role("button", name="Remove image").click()
            wait_until_idle(resume)
        with paused_after(model, steps=12) as resume:
            show(page, photos[1])
            page.locator(".answer.writing .word").first.wait_for()
            page.close()
            wait_until_idle(resume)


@pytest.mark.slow
@IN_BROWSER
def test_key_is_required_and_kept_for_tab(
    visit: Callable[..., Any], model: Llava, photos: Sequence[bytes]
) -> None:
    with live_server(model, key="sésame", examples=photos[:2]) as locked:
        page = visit(locked.url)
        page.locator("#key-form").wait_for()
        assert not page.locator("#app").is_visible()
        page.get_by_label("API key").fill("open")
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("alert").filter(has_text="This key is wrong").wait_for()
        page.get_by_label("API key").fill("sésame")
        page.keyboard.press("Enter")
        show(page, photos[4])
        page.locator(COMPLETE).wait_for()
        page.locator(".word").first.hover()
        page.locator("#veil").wait_for()
        page.get_by_role("button", name="Example 2").wait_for()
        page.reload()
        page.locator("#app").wait_for()
        assert page.evaluate("localStorage.length") == 0 and not page.context.cookies()
        page.close()


@pytest.mark.slow
@IN_BROWSER
def test_open_page_does_not_delay_shutdown(
    visit: Callable[..., Any], command: Any, photos: Sequence[bytes]
) -> None:
    process, url = command()
    page = visit(url)
    show(page, photos[0])
    page.locator(COMPLETE).wait_for()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, "the server must not wait for --timeout (120 s)"
