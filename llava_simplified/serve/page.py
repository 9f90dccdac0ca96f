"""The web page: drop a picture, its caption streams in; hover a word, and the picture shows where the model looked.

Answers come from the `Worker` that the API also asks. The page brings all that it needs along: it asks nothing of any
other server.
"""

from __future__ import annotations

import asyncio
import atexit
import hmac
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
from starlette.applications import Starlette

from llava_simplified.captioning.inputs import PICTURES
from llava_simplified.data.images import ImageError, load_pixels
from llava_simplified.model.generation_options import DEFAULT_TEMPERATURE, GenerationOptions
from llava_simplified.prompt import Message
from llava_simplified.serve.api import Limits
from llava_simplified.serve.attention_map import WORD, look
from llava_simplified.serve.engine import Busy, Worker

UNREADABLE = {
    "not_image": "This file is no picture. JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF can be read.",
    "corrupt": "This picture is damaged: a part of the file is broken ({}). Try another copy of it.",
    "html": "This file is a web page, no picture.",
    "truncated": "This picture is damaged: a part of the file is missing ({}). Try another copy of it.",
    "too_large": "This picture is too large: {}.",
    "missing": "This picture is no longer here: choose it again.",
}


@dataclass
class Exchange:
    """A question and the answers to it; the conversation goes on from the first of them."""

    question: str
    answers: list[str]
    key: str = field(default_factory=lambda: uuid4().hex)


@dataclass
class Conversation:
    """What a visitor has asked about a picture, and which answer is being written."""

    exchanges: list[Exchange] = field(default_factory=list)
    writing: Exchange | None = None


def turns_of(exchanges: Sequence[Exchange]) -> list[Message]:
    """The last question, behind all that was said before."""
    turns: list[Message] = []
    for exchange in exchanges[:-1]:
        if exchange.answers[0]:  # else it was stopped, or the model had nothing to say
            turns += [Message("user", exchange.question), Message("assistant", exchange.answers[0])]
    return [*turns, Message("user", exchanges[-1].question)]


def explain(error: Exception) -> str:
    """What went wrong, to a person who has only the page before them."""
    if isinstance(error, ImageError):
        return UNREADABLE[error.kind].format(error)
    if isinstance(error, Busy):
        return f"Many people are asking just now. Please try again in {error.retry_after} seconds."
    if isinstance(error, asyncio.TimeoutError):
        return "The answer did not come in time. Please try again."
    if isinstance(error, RuntimeError):
        return "The model failed at this. The server's log says how."
    return f"This cannot be asked: {error}."


def render(conversation: Conversation, instruction: str, problem: Exception | None = None) -> str:
    """The conversation as HTML. Each word is an element that page.js listens to."""
    parts = []
    for number, exchange in enumerate(conversation.exchanges):
        if number or exchange.question != instruction:
            parts.append(f'<p class="question">{escape(exchange.question)}</p>')
        state = " writing" if exchange is conversation.writing else ""
        for sample, answer in enumerate(exchange.answers):
            parts.append(
                f'<p class="answer{state}" data-key="{exchange.key}-{sample}">{_words(answer)}</p>'
            )
    if problem:
        kind = getattr(problem, "kind", "")
        parts.append(f'<p class="problem {kind}" role="alert">{escape(explain(problem))}</p>')
    elif not parts:
        parts.append('<p class="note">The caption will appear here.</p>')
    elif not conversation.writing:
        parts.append(
            '<p class="note">Point at a word to see where in the picture the model looked.</p>'
        )
        parts.append(
            '<label class="note"><input type="checkbox"> compare with the other words</label>'
        )
    return "".join(parts)


def _words(answer: str) -> str:
    spaced = [(len(word) - len(word.lstrip()), word) for word in WORD.findall(answer)]
    return "".join(
        f'{word[:space]}<span class="word" tabindex="0">{escape(word[space:])}</span>'
        for space, word in spaced
    )


Updates = AsyncIterator[tuple[str, Any]]
"""The conversation's HTML, and what the question box is to hold, as they change."""


class Page:
    """What the page's events call. One serves all visitors; what is theirs alone comes as an argument."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.instruction = worker.model.instruction

    async def begin(
        self, conversation: Conversation, picture: str | None, *question: Any
    ) -> Updates:
        """A picture has come, or has gone: a new conversation. `question` and what follows are those of `ask`."""
        conversation.exchanges, conversation.writing = [], None
        if picture is None:
            yield render(conversation, self.instruction), gr.skip()
            return
        async for update in self.ask(conversation, picture, *question):
            yield update

    async def ask(
        self,
        conversation: Conversation,
        picture: str | None,
        question: str,
        temperature: float,
        samples: int,
        length: int,
    ) -> Updates:
        """Ask one question more; without words, begin anew with the question that it was trained with."""
        if not (question := question.strip()):
            conversation.exchanges = []
        before = conversation.exchanges
        conversation.writing = new = Exchange(question or self.instruction, [""] * samples)
        try:
            if picture is None:
                raise ValueError("there is no picture yet")
            options = GenerationOptions(
                max_new_tokens=length, temperature=temperature, num_return_sequences=samples
            )
            with self.worker.place() as place:
                conversation.exchanges = [*before, new]
                yield render(conversation, self.instruction), ""
                await place.ask(turns_of(conversation.exchanges), [Path(picture)], options)
                async for piece in place:
                    if (
                        conversation.writing is not new
                    ):  # stopped, or something else has been asked meanwhile
                        return
                    new.answers[piece.sample] += piece.text
                    yield render(conversation, self.instruction), gr.skip()
            conversation.writing = None
            yield render(conversation, self.instruction), gr.skip()
        except (ValueError, Busy, asyncio.TimeoutError, RuntimeError) as error:
            if conversation.writing is new:
                conversation.exchanges, conversation.writing = before, None
                yield render(conversation, self.instruction, error), gr.skip()

    def stop(self, conversation: Conversation) -> str:
        """What has been said stays."""
        conversation.writing = None
        return render(conversation, self.instruction)

    async def look(
        self, event: gr.EventData, conversation: Conversation, picture: str | None
    ) -> Any:
        """Somebody points at a word: where the model looked for each word of its answer, for page.js to draw."""
        key, _, sample = event.key.partition("-")
        places = {
            exchange.key: number for number, exchange in enumerate(conversation.exchanges, start=1)
        }
        if picture is None or key not in places:  # another conversation has begun
            return gr.skip()
        asked = conversation.exchanges[: places[key]]
        turns, answer = turns_of(asked), asked[-1].answers[int(sample)]
        pixels = await asyncio.to_thread(load_pixels, Path(picture))
        grids = await self.worker.call(lambda model: look(model, turns, [pixels], answer)[:, 0])
        region = self.worker.model.vision_tower.transform.region(*pixels.shape[:2])
        shares = [
            [[float(f"{share:.4g}") for share in row] for row in grid] for grid in grids.tolist()
        ]
        return gr.HTML(looks={"key": event.key, "region": region, "grids": shares})


def example_pictures(folder: Path, count: int = 12) -> list[Path]:
    """Some pictures of a folder, evenly spread.

    Raises:
        ValueError: there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"--examples {folder}: no pictures there")
    return (
        [found[number * len(found) // count] for number in range(count)]
        if len(found) > count
        else found
    )


def mount_page(
    app: Starlette, worker: Worker, name: str, key: str, limits: Limits, examples: Sequence[Path]
) -> asyncio.Event:
    """Put the page at `/` of an application, behind its other routes.

    Args:
        name: of the model, shown to visitors.
        key: asked of visitors (as password, with any user name) where it isn't empty.
        examples: pictures to click.

    Returns:
        To be set when the server is to end: each window of the page holds a connection open until then.
    """
    # visitors' pictures lie in a folder that nobody else on this machine can read, for an hour
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="llava-page-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    page = Page(worker)
    files = resources.files(__package__)
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["monospace"],
    )
    with gr.Blocks(
        title=f"{name} · LLaVA Simplified", analytics_enabled=False, delete_cache=(600, 3600)
    ) as blocks:
        gr.HTML(f"<h1>LLaVA Simplified</h1><p>{escape(name)}</p>", elem_id="head")
        with gr.Row(elem_id="columns"):
            with gr.Column():
                picture: Any = gr.Image(
                    label="Picture", show_label=False, type="filepath", buttons=[], elem_id="picture",
                    sources=["upload", "clipboard", "webcam"], placeholder="Drop a picture here\nor click to choose",
                )  # fmt: skip
                # The very file that was sent: Gradio would open it first, and fail in its own words. Not by a class of
                # our own: Gradio would write a stub beside this file.
                picture.preprocess = lambda payload: payload and payload.path
            with gr.Column():
                view = gr.HTML(
                    render(Conversation(), page.instruction),
                    looks=None,
                    js_on_load=files.joinpath("page.js").read_text(encoding="utf-8"),
                    elem_id="view",
                )
                with gr.Row(elem_id="asking"):
                    question = gr.Textbox(
                        label="Question",
                        show_label=False,
                        placeholder=page.instruction,
                        container=False,
                        scale=5,
                    )
                    send = gr.Button(
                        "Ask", variant="primary", scale=1, min_width=80, elem_id="send"
                    )
                    stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
        with gr.Accordion("Settings", open=False), gr.Row():
            temperature = gr.Slider(
                0, 1.5, 0, step=0.05, label="Temperature", info="0: always the likeliest word"
            )
            samples = gr.Slider(
                1, min(8, worker.batch_size), 1, step=1, label="Answers", info="to one question"
            )
            length = gr.Slider(
                1,
                limits.max_tokens,
                min(64, limits.max_tokens),
                step=1,
                label="Longest answer",
                info="in tokens",
            )
        if examples:
            gr.Examples(
                [[str(path)] for path in examples],
                [picture],
                label="Or try one of these",
                elem_id="examples",
            )
        conversation = gr.State(Conversation())
        asking = [conversation, picture, question, temperature, samples, length]
        quiet: dict[str, Any] = {
            "api_visibility": "private",
            "concurrency_limit": None,
            "show_progress": "hidden",
        }
        many: dict[str, Any] = {**quiet, "trigger_mode": "multiple"}
        begun = picture.change(page.begin, asking, [view, question], **many)
        asked = gr.on([send.click, question.submit], page.ask, asking, [view, question], **many)
        stop.click(page.stop, conversation, view, cancels=[begun, asked], **quiet)
        view.look(page.look, [conversation, picture], view, trigger_mode="always_last", **quiet)
        # in the browser: the answer of the server could overwrite what has been chosen meanwhile
        samples.input(
            None,
            [samples, temperature],
            temperature,
            js=f"(n, t) => t || (n > 1 ? {DEFAULT_TEMPERATURE} : 0)",
            **quiet,
        )
    blocks.queue(max_size=None)
    gr.mount_gradio_app(
        app,
        blocks,
        path="",
        footer_links=[],
        run_history=False,
        theme=theme,
        css=files.joinpath("page.css").read_text(encoding="utf-8"),
        auth=(lambda _, password: hmac.compare_digest(password.encode(), key.encode()))
        if key
        else None,
        auth_message="The password is this server's key; any user name will do." if key else None,
        show_error=False,
        max_file_size=limits.max_body,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    mounted: Any = app.routes[-1]
    return mounted.app.stop_event
