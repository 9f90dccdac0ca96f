"""The HTTP API that OpenAI's clients speak, in front of a `Worker`.

What is asked is read strictly: a parameter that is unknown, out of range or asks for what isn't done here is an error that
names it, not a silent difference. Everything that a request holds is freed where it ends, in whatever way.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, MutableMapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from uuid import uuid4

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from llava_simplified.data.images import load_pixels
from llava_simplified.data.records import insert_image_placeholders
from llava_simplified.extras import require_extra
from llava_simplified.model.generation_options import DEFAULT_TEMPERATURE, GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prompt import Message
from llava_simplified.serve.attention_map import encode_answer, word_attention
from llava_simplified.serve.engine import Busy, Piece, Place, Worker
from llava_simplified.serve.errors import handle_exception, to_openai_error
from llava_simplified.serve.security import HostCheck, KeyCheck, SecurityHeaders

if TYPE_CHECKING:
    from llava_simplified.prepare.fetch import Fetcher

_GRACE = 5.0  # seconds beyond its time for a client to read its answer
_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, float("inf"))
_SSE = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
]
_MIN_TEMPERATURE = (
    1e-3  # below, logits divided by the temperature overflow; the limit is greedy decoding
)


@dataclass(frozen=True)
class Limits:
    """Of one request: the bytes of its body, its pictures, the tokens of an answer (as many are given where it names
    none), and how http(s) pictures are fetched (None: refused)."""

    max_body: int = 20_000_000
    max_images: int = 8
    max_tokens: int = 512
    fetch: FetchOptions | None = None


# ---- what may be asked ----


class _Given(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Given):
    type: Literal["text"]
    text: str


class ImageURL(_Given):
    url: str | bytes  # bytes: of a data URI
    detail: Literal["auto", "low", "high"] | None = None  # there is one size

    @field_validator("url")
    @classmethod
    def decode(cls, url: str) -> str | bytes:
        if not url.startswith("data:"):
            return url
        head, _, data = url.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("a data URI must be data:image/...;base64,...")
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise ValueError(f"the data URI is not base64: {error}") from None


class ImagePart(_Given):
    type: Literal["image_url"]
    image_url: ImageURL


class Turn(_Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def one_text(cls, content: object) -> object:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def images(self) -> list[str | bytes]:
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def message(self, instruction: str) -> Message:
        """Pictures stand in front of the text, as in training, unless it says by `<image>` where they go."""
        text = "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        count = len(self.images)
        if count and self.role != "user":
            raise ValueError(f"pictures belong to the user's messages, not to the {self.role}'s")
        message = Message("system" if self.role == "developer" else self.role, text)
        if count and not text.strip():
            message = message._replace(content=instruction)
        return insert_image_placeholders([message], count, "a message")[0]


class StreamOptions(_Given):
    include_usage: bool = False


class TextFormat(_Given):
    type: Literal["text"]


class Conversation(_Given):
    """The fields that chat completions and attention maps have in common."""

    model: str
    messages: list[Turn] = Field(min_length=1, max_length=100)


ConversationT = TypeVar("ConversationT", bound=Conversation)


class AttentionRequest(Conversation):
    """The body of POST /v1/attention: a conversation about one image, and the answer that was given to it."""

    answer: str = Field(min_length=1, max_length=100_000)


class ChatRequest(Conversation):
    """The body of POST /v1/chat/completions; the last six are taken where they ask for what is done anyway."""

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] | None = Field(
        None, max_length=4
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    response_format: TextFormat | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def one_stop(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    def options(self, longest: int) -> GenerationOptions:
        """Return the options of the decoder. All options of requests, the page's included, pass through here.

        Without a temperature, one answer is greedy and several are sampled at 0.7, as by `Llava.caption`.

        Args:
            longest: The maximum number of tokens of an answer, and the default.
        """
        most = self.max_completion_tokens or self.max_tokens or longest
        if most > longest:
            raise ValueError(f"an answer has {longest} tokens at most here, {most} are asked for")
        count = self.n or 1
        temperature = (
            self.temperature if self.temperature is not None else DEFAULT_TEMPERATURE * (count > 1)
        )
        return GenerationOptions(
            max_new_tokens=most,
            temperature=temperature if temperature >= _MIN_TEMPERATURE else 0.0,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            num_return_sequences=count,
            seed=self.seed,
        )


# ---- the answer ----


class ModelEndpoint:
    """An ASGI application that answers POST requests with the model.

    A request occupies a place of the worker from before its body is read until its response is sent. The
    place is released when the call returns, for whatever reason: an answer, an error, a timeout, or a
    client that has disconnected.

    Args:
        worker: Owns the model.
        name: The name of the model, as clients must give it.
        limits: The limits of one request.
        fetcher: Fetches the images of http(s) URLs; None if that is not allowed.
        registry: Receives the metrics.
    """

    metrics_prefix = "llava"

    def __init__(
        self,
        worker: Worker,
        name: str,
        limits: Limits,
        fetcher: Fetcher | None,
        registry: CollectorRegistry,
    ) -> None:
        self.worker, self.name, self.limits, self.fetcher = worker, name, limits, fetcher
        prefix = self.metrics_prefix
        self._requests = Counter(
            f"{prefix}_requests", "Requests by status", ["status"], registry=registry
        )
        self._seconds = Histogram(
            f"{prefix}_request_seconds",
            "From a request to the end of its response",
            registry=registry,
            buckets=_BUCKETS,
        )

    async def _answer(self, body: bytes, place: Place, send: Send) -> None:
        """Send the response to a request with this body."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status, begun = time.perf_counter(), 499, False

        async def reply(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            with self.worker.place() as place:
                async with place.deadline():
                    body = await self._body(Request(scope, receive))
                await _while_there(receive, self._answer(body, place, reply), place.left + _GRACE)
            status = 200
        except ClientDisconnect:
            pass
        except Exception as error:
            status, body_of_error, _ = to_openai_error(error)
            if not begun:
                raise
            await send(_event(body_of_error, more=False))
        finally:
            seconds = time.perf_counter() - start
            self._requests.labels(status).inc()
            self._seconds.observe(seconds)
            logging.getLogger(__name__).info("%d in %.2f s", status, seconds)

    async def _body(self, request: Request) -> bytes:
        # Other types can be sent by any web page without a preflight request.
        if (
            request.headers.get("content-type", "").partition(";")[0].strip().lower()
            != "application/json"
        ):
            raise HTTPException(415, "the content-type must be application/json")
        body = bytearray()
        too_large = HTTPException(
            413, f"the body is over {self.limits.max_body} bytes", {"connection": "close"}
        )
        if int(request.headers.get("content-length", 0)) > self.limits.max_body:
            raise too_large
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.limits.max_body:
                raise too_large
        return bytes(body)

    async def _parse(self, kind: type[ConversationT], body: bytes) -> ConversationT:
        """Validate a body and the name of the model in it."""
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self.worker.readers, kind.model_validate_json, body)
        if asked.model != self.name:
            raise HTTPException(404, f"there is no model {asked.model!r} here, but {self.name!r}")
        return asked

    async def _images(self, messages: Sequence[Turn]) -> list[bytes]:
        """Return the files of all images, in the order of the messages."""
        urls = [url for turn in messages for url in turn.images]
        if len(urls) > self.limits.max_images:
            raise ValueError(f"{len(urls)} pictures; {self.limits.max_images} may be shown at once")
        return await asyncio.gather(*(self._image(url) for url in urls))

    async def _image(self, url: str | bytes) -> bytes:
        if isinstance(url, bytes):
            return url
        if self.fetcher is None:
            raise ValueError(
                "a picture must be a data URI: this server fetches none (--allow-image-urls)"
            )
        fetched = await self.fetcher.fetch(url)
        if fetched.image is None:
            raise ValueError(f"the picture can't be fetched: {fetched.kind}: {fetched.detail}")
        return fetched.image.data


class Attention(ModelEndpoint):
    """POST /v1/attention, an extension of OpenAI's API: where each word of an answer attended to in the image."""

    metrics_prefix = "llava_attention"

    async def _answer(self, body: bytes, place: Place, send: Send) -> None:
        asked = await self._parse(AttentionRequest, body)
        turns = [turn.message(self.worker.model.instruction) for turn in asked.messages]
        images = await self._images(asked.messages)
        if len(images) != 1:
            raise ValueError(
                f"attention maps need exactly one image, the messages have {len(images)}"
            )
        loop = asyncio.get_running_loop()
        readers = self.worker.readers
        async with place.deadline():
            answer_ids = await loop.run_in_executor(readers, self._answer_ids, asked.answer)
            pixels = await loop.run_in_executor(readers, load_pixels, images[0])
        # The answer counts as generated tokens, so that the limit of the context applies to it.
        await place.read(turns, [pixels], GenerationOptions(max_new_tokens=len(answer_ids)))
        async with place.deadline():
            words, grids = await self.worker.call(
                lambda model: self._grids(model, place, answer_ids)
            )
        height, width = pixels.shape[:2]
        content = {
            "object": "attention",
            "model": self.name,
            "region": self.worker.model.vision_tower.transform.visible_region(height, width),
            "words": [{"word": word, "grid": grid} for word, grid in zip(words, grids)],
        }
        await _send_json(content, send)

    def _answer_ids(self, answer: str) -> list[int]:
        ids = encode_answer(self.worker.model, answer)
        if not 0 < len(ids) <= self.limits.max_tokens:
            raise ValueError(
                f"answer: expected 1 to {self.limits.max_tokens} tokens, got {len(ids)}"
            )
        return ids

    @staticmethod
    def _grids(
        model: Llava, place: Place, answer_ids: list[int]
    ) -> tuple[list[str], list[list[list[float]]]]:
        """Return the words and, for each, its attention to the image's patches (rows, columns)."""
        assert place.pixels is not None
        words, grids = word_attention(model, place.prompt, place.pixels, answer_ids)
        rounded = [
            [[float(f"{weight:.4g}") for weight in row] for row in grid]
            for grid in grids[:, 0].nan_to_num().tolist()
        ]
        return words, rounded


class ChatCompletions(ModelEndpoint):
    """POST /v1/chat/completions."""

    def __init__(
        self,
        worker: Worker,
        name: str,
        limits: Limits,
        fetcher: Fetcher | None,
        registry: CollectorRegistry,
    ) -> None:
        super().__init__(worker, name, limits, fetcher, registry)
        self._tokens = Counter(
            "llava_tokens", "Tokens of answered requests", ["kind"], registry=registry
        )
        self._first = Histogram(
            "llava_first_token_seconds",
            "From a request to its answer's beginning",
            registry=registry,
            buckets=_BUCKETS,
        )

    async def _answer(self, body: bytes, place: Place, send: Send) -> None:
        asked = await self._parse(ChatRequest, body)
        options = asked.options(self.limits.max_tokens)
        turns = [turn.message(self.worker.model.instruction) for turn in asked.messages]
        images = await self._images(asked.messages)
        await place.ask(turns, images, options, asked.stop or ())
        await (self._stream if asked.stream else self._whole)(asked, place, send)

    async def _pieces(self, place: Place, tokens: list[int]) -> AsyncIterator[Piece]:
        """The place's pieces; `tokens` keeps how many each sample has."""
        async for piece in place:
            if not any(tokens):
                self._first.observe(self.worker.timeout - place.left)
            tokens[piece.sample] = piece.tokens
            yield piece
        self._tokens.labels("prompt").inc(place.prompt_tokens)
        self._tokens.labels("answer").inc(sum(tokens))

    async def _whole(self, asked: ChatRequest, place: Place, send: Send) -> None:
        count = place.options.num_return_sequences
        texts, ends, tokens = [""] * count, [""] * count, [0] * count
        async for piece in self._pieces(place, tokens):
            texts[piece.sample] += piece.text
            ends[piece.sample] = piece.finish
        choices = [
            {
                "index": sample,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": end,
                "logprobs": None,
            }
            for sample, (text, end) in enumerate(zip(texts, ends))
        ]
        content = {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": _usage(place, tokens),
        }
        await _send_json(content, send)

    async def _stream(self, asked: ChatRequest, place: Place, send: Send) -> None:
        """Server-sent events, a chunk each."""
        tokens = [0] * place.options.num_return_sequences
        head = self._head("chat.completion.chunk")

        async def chunk(sample: int, delta: dict[str, str], finish: str | None = None) -> None:
            choice = {"index": sample, "delta": delta, "finish_reason": finish, "logprobs": None}
            await send(_event({**head, "choices": [choice]}))

        await send({"type": "http.response.start", "status": 200, "headers": _SSE})
        for sample in range(len(tokens)):
            await chunk(sample, {"role": "assistant", "content": ""})
        async for piece in self._pieces(place, tokens):
            if piece.text:
                await chunk(piece.sample, {"content": piece.text})
            if piece.finish:
                await chunk(piece.sample, {}, piece.finish)
        if asked.stream_options and asked.stream_options.include_usage:
            await send(_event({**head, "choices": [], "usage": _usage(place, tokens)}))
        await send(_event("[DONE]", more=False))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }


def _usage(place: Place, tokens: list[int]) -> dict[str, int]:
    asked, said = place.prompt_tokens, sum(tokens)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


async def _send_json(content: object, send: Send) -> None:
    response = JSONResponse(content)
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


def _event(content: object, more: bool = True) -> dict[str, Any]:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more}


async def _while_there(receive: Receive, work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Do the work, as long as the client is there; one that has not read its answer in time counts as gone.

    Raises:
        ClientDisconnect
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---- the application ----


def create_app(
    worker: Worker,
    name: str,
    key: str = "",
    limits: Limits = Limits(),
    page: Sequence[BaseRoute] = (),
    allowed_hosts: Iterable[str] = (),
) -> Starlette:
    """Return the application. It starts and stops the worker.

    Args:
        worker: Owns the model.
        name: The name of the model, as clients must give it.
        key: The API key; empty if none is required. `security.PUBLIC_PATHS` never require it.
        limits: The limits of one request.
        page: The routes of the web page, from `page.page_routes`.
        allowed_hosts: Additional values of the Host header, see `security.HostCheck`.
    """
    registry = CollectorRegistry()
    fetcher = None
    if limits.fetch:
        require_extra("download", "aiohttp", "aiodns", purpose="--allow-image-urls")
        from llava_simplified.prepare.fetch import Fetcher

        fetcher = Fetcher(limits.fetch)
    Gauge("llava_places", "Requests under way", registry=registry).set_function(
        lambda: len(worker.places)
    )
    Gauge("llava_rows", "Answers being decoded", registry=registry).set_function(
        lambda: len(worker.rows)
    )
    model = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "llava-simplified",
    }

    async def health(_: Request) -> Response:
        return JSONResponse(
            {"status": "ok" if worker.alive else "failed"}, 200 if worker.alive else 503
        )

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != name:
            raise HTTPException(
                404, f"there is no model {request.path_params['name']!r} here, but {name!r}"
            )
        return JSONResponse(model)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with worker, fetcher or nullcontext():
            yield

    endpoint = (worker, name, limits, fetcher, registry)
    middleware = [Middleware(SecurityHeaders), Middleware(HostCheck, allowed_hosts)]
    if key:
        middleware.append(Middleware(KeyCheck, key))
    handled = (HTTPException, Busy, asyncio.TimeoutError, ValueError, Exception)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(*endpoint), methods=["POST"]),
            Route("/v1/attention", Attention(*endpoint), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
            Route("/metrics", metrics),
            *page,
        ],
        middleware=middleware,
        exception_handlers=dict.fromkeys(handled, handle_exception),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # only the paths above exist
    return app
