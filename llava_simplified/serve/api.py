"""The HTTP API of an `Engine`: OpenAI's chat completions, and attention maps."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, MutableMapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

from llava_simplified.data.images import ImageError, check_image, read_image_size
from llava_simplified.data.pixel_budget import DECODING
from llava_simplified.model.llava import Llava
from llava_simplified.serve.attention_map import encode_answer, word_attention
from llava_simplified.serve.body_check import check_body
from llava_simplified.serve.engine import (
    Delta,
    Engine,
    QueueFullError,
    RequestError,
    RequestHandle,
)
from llava_simplified.serve.errors import handle_exception, to_openai_error
from llava_simplified.serve.schemas import (
    AttentionRequest,
    ChatMessage,
    ChatRequest,
    Conversation,
    image_urls,
)
from llava_simplified.serve.security import HostCheck, KeyCheck, SecurityHeaders

if TYPE_CHECKING:
    from llava_simplified.prepare.fetch import Fetcher
    from llava_simplified.prepare.fetch_options import FetchOptions

logger = logging.getLogger(__name__)

# Additional seconds after the deadline for a slow client to read its response.
_READ_GRACE = 5.0
# A body must arrive within this many seconds, plus one second for every `_BODY_RATE` bytes of it. Each body occupies a
# place in the queue until it has arrived, so a few clients that send one byte a second would lock out all others.
BODY_SECONDS = 10.0
_BODY_RATE = 50_000
# An image host that is down is not requested for this long, so that not every request has to wait for its timeout.
_HOST_BAN_SECONDS = 30.0
# Upper bounds of the histograms in seconds.
_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, float("inf"))
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that has disconnected
_EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # prevents nginx from buffering the events
]


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        max_body: Maximum size of the body in bytes, and of all fetched images of a request together.
        max_images: Maximum number of images in the conversation.
        max_tokens: Maximum number of tokens of an answer; also used for requests that set no maximum.
        fetch: Options for fetching the images of http(s) URLs; None rejects such URLs.
        strict_model: Reject requests that name another model, or none. By default, the name in a request is ignored.
    """

    max_body: int = 20_000_000
    max_images: int = 8
    max_tokens: int = 512
    fetch: FetchOptions | None = None
    strict_model: bool = False


ConversationT = TypeVar("ConversationT", bound=Conversation)


# The path of a request:
#
#     SecurityHeaders --> HostCheck --> KeyCheck --> route --> ModelEndpoint.__call__
#                                                                1. open a request (429: the queue is full)
#                                                                2. read the body (408, 413, 415)
#                                                                3. `_respond`, unless the client disconnects
#                                                                4. count and log the status
#
# The endpoints of the model are ASGI applications instead of Starlette's request handlers, because they
# must detect a client that disconnects while its answer is generated, and evict its sequences immediately.


class ModelEndpoint:
    """An ASGI application that answers POST requests with the model.

    A request is in flight from before its body is read (which needs memory too) until its response is
    sent. It is closed when the call returns: after an answer, an error, a timeout, or when the client has
    disconnected.

    Args:
        engine: The engine, which owns the model.
        name: Name of the model in responses; see also `Limits.strict_model`.
        limits: Limits of one request.
        fetcher: Fetcher for the images of http(s) URLs; None if these are not allowed.
        registry: Registry for the metrics.
    """

    metrics_prefix = "llava"

    def __init__(
        self,
        engine: Engine,
        name: str,
        limits: Limits,
        fetcher: Fetcher | None,
        registry: CollectorRegistry,
    ) -> None:
        self.engine = engine
        self.name = name
        self.limits = limits
        self.fetcher = fetcher
        self._requests = Counter(
            f"{self.metrics_prefix}_requests", "Requests by status", ["status"], registry=registry
        )
        self._seconds = Histogram(
            f"{self.metrics_prefix}_request_seconds",
            "Seconds from a request to the end of its response",
            registry=registry,
            buckets=_BUCKETS,
        )

    async def _respond(self, body: bytes, request: RequestHandle, send: Send) -> None:
        """Send the response to a request with this body."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        status = _CLIENT_CLOSED_REQUEST  # replaced below if there is an answer or an error
        has_started = False

        async def send_response(message: MutableMapping[str, Any]) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            with self.engine.open_request() as request:
                async with request.deadline():
                    body = await self._read_body(Request(scope, receive))
                response = self._respond(body, request, send_response)
                # Leave the only reference to `_respond`, which frees the body before the model runs.
                del body
                await _run_while_connected(
                    receive, response, request.seconds_left + _READ_GRACE, lambda: has_started
                )
            status = 200
        except ClientDisconnect:
            pass
        except Exception as error:
            status, error_body, _ = to_openai_error(error)
            if not has_started:
                raise  # `handle_exception` sends the response
            if status == 500:
                logger.exception("A stream ended with an error.")
            # The status line of the stream has already been sent, so send the error as the last event.
            await send(_event(error_body, more_body=False))
        finally:
            seconds = time.perf_counter() - start
            self._requests.labels(status).inc()
            self._seconds.observe(seconds)
            # For privacy, log nothing of the request's content.
            logger.info("%d in %.2f s", status, seconds)

    async def _read_body(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            HTTPException: The Content-Type is not JSON (415), the body is too large (413), or it arrives too
                slowly (408).
        """
        # Require JSON: browsers let any web page send other content types without a preflight request (CORS).
        content_type = request.headers.get("content-type", "").partition(";")[0]
        if content_type.strip().lower() != "application/json":
            raise HTTPException(415, "The Content-Type must be application/json.")
        max_body = self.limits.max_body
        # Close the connection after this error. Otherwise, the rest of the body would have to be received.
        too_large = HTTPException(
            413, f"The body exceeds {max_body} bytes.", {"connection": "close"}
        )
        if int(request.headers.get("content-length", 0)) > max_body:
            raise too_large
        # Also count the bytes, since a chunked body has no Content-Length.
        body = bytearray()
        start = time.monotonic()
        chunks = request.stream()
        try:
            while True:
                seconds_left = BODY_SECONDS + len(body) / _BODY_RATE - (time.monotonic() - start)
                async with timeout(seconds_left):
                    body += await anext(chunks)
                if len(body) > max_body:
                    raise too_large
        except StopAsyncIteration:
            return bytes(body)
        except asyncio.TimeoutError:
            raise HTTPException(
                408, "The body of the request arrives too slowly.", {"connection": "close"}
            ) from None

    async def _parse(self, schema: type[ConversationT], body: bytes) -> ConversationT:
        """Parse and validate a body, including the name of the model."""

        def parse() -> ConversationT:
            check_body(body)
            return schema.model_validate_json(body)

        loop = asyncio.get_running_loop()
        # Parse in a thread, because parsing 20 MB and decoding base64 would block the event loop.
        parsed = await loop.run_in_executor(self.engine.reader_threads, parse)
        if self.limits.strict_model and parsed.model != self.name:
            raise _model_not_found(parsed.model, self.name)
        return parsed

    async def _load_images(self, messages: Sequence[ChatMessage]) -> list[bytes]:
        """Return the files of all images, in the order of the messages.

        Raises:
            RequestError: There are too many images, an image cannot be fetched, or the fetched images exceed
                `max_body` bytes together.
        """
        urls = image_urls(messages)
        if len(urls) > self.limits.max_images:
            raise RequestError(
                f"The conversation has {len(urls)} images; the maximum is {self.limits.max_images}.",
                param="messages",
                code="too_many_images",
            )
        # Fetch one image at a time. Otherwise, images that exceed the limit together could all be in memory before their
        # sizes are known.
        max_bytes = self.limits.max_body
        num_fetched_bytes = 0
        images: list[bytes] = []
        for url in urls:
            image = await self._load_image(url)
            if isinstance(url, str):
                num_fetched_bytes += len(image)
            if num_fetched_bytes > max_bytes:
                raise RequestError(
                    f"The images of the URLs exceed {max_bytes} bytes together. Send fewer or smaller images.",
                    param="messages",
                    code="too_large",
                )
            images.append(image)
        return images

    async def _load_image(self, url: str | bytes) -> bytes:
        """Return the bytes of an image: the content of a data URL, or a fetched file."""
        if isinstance(url, bytes):  # `schemas.ImageURL` has decoded a data URL
            return url
        if self.fetcher is None:
            raise RequestError(
                "Expected images as data URLs (data:image/...;base64,...). To allow http(s) URLs, start the "
                "server with --allow-image-urls.",
                param="messages",
                code="image_url_not_allowed",
            )
        # The fetcher limits sizes and times, and connects to public addresses only.
        fetched = await self.fetcher.fetch(url)
        if fetched.image is None:
            raise RequestError(
                f"An image could not be fetched ({fetched.kind}): {fetched.detail}",
                param="messages",
                code=fetched.kind,
            )
        return fetched.image.data


def _model_not_found(requested: str | None, name: str) -> RequestError:
    """Return the error for a request that names another model, or none (`requested` is None)."""
    return RequestError(
        f"Expected the model {name!r}, the only one of this server, got {requested!r}.",
        param="model",
        code="model_not_found",
        status=404,
    )


class ChatCompletions(ModelEndpoint):
    """POST /v1/chat/completions."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        limits: Limits,
        fetcher: Fetcher | None,
        registry: CollectorRegistry,
    ) -> None:
        super().__init__(engine, name, limits, fetcher, registry)
        self._tokens = Counter(
            "llava_tokens", "Tokens of answered requests", ["kind"], registry=registry
        )
        self._first_token_seconds = Histogram(
            "llava_first_token_seconds",
            "Seconds from a request to the first token of its answer",
            registry=registry,
            buckets=_BUCKETS,
        )

    async def _respond(self, body: bytes, request: RequestHandle, send: Send) -> None:
        """Send the generated answers, as one JSON object or as a stream."""
        chat = await self._submit(body, request)
        del body  # free it while the answer is generated
        if chat.stream:
            await self._send_stream(chat, request, send)
        else:
            await self._send_complete(chat, request, send)

    async def _submit(self, body: bytes, request: RequestHandle) -> ChatRequest:
        """Append a request to the engine's queue, and return it without its messages.

        From here on, only the pixels of the images are needed. The messages contain the image files, which would
        otherwise be in memory until the answer has been generated.
        """
        async with request.deadline():
            chat = await self._parse(ChatRequest, body)
            options = chat.to_generation_options(self.limits.max_tokens)
            messages = chat.to_messages(self.engine.model.instruction)
            images = await self._load_images(chat.messages)
        await request.submit(messages, images, options, chat.stop or ())
        chat.messages.clear()
        return chat

    async def _deltas(
        self, request: RequestHandle, token_counts: list[int]
    ) -> AsyncIterator[Delta]:
        """Yield the deltas of a request, and update the metrics.

        Args:
            request: The request, which has been submitted.
            token_counts: Number of tokens of each sequence; updated with each delta.
        """
        async for delta in request:
            if not any(token_counts):  # this is the first delta
                self._first_token_seconds.observe(request.seconds_elapsed)
            token_counts[delta.index] = delta.num_tokens
            yield delta
        self._tokens.labels("prompt").inc(request.prompt_tokens)
        self._tokens.labels("answer").inc(sum(token_counts))

    async def _send_complete(self, chat: ChatRequest, request: RequestHandle, send: Send) -> None:
        """Send one JSON object when all sequences have finished."""
        count = request.options.num_return_sequences
        texts = [""] * count
        finish_reasons: list[str | None] = [None] * count
        token_counts = [0] * count
        async for delta in self._deltas(request, token_counts):
            texts[delta.index] += delta.text
            finish_reasons[delta.index] = delta.finish_reason
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": finish_reason,
                "logprobs": None,
            }
            for index, (text, finish_reason) in enumerate(zip(texts, finish_reasons))
        ]
        content = {
            **self._header("chat.completion"),
            "choices": choices,
            "usage": _usage(request, token_counts),
            **_warnings(chat, request),
        }
        await _send_json(content, send)

    async def _send_stream(self, chat: ChatRequest, request: RequestHandle, send: Send) -> None:
        """Send server-sent events, each with one chunk, as the text is generated."""
        token_counts = [0] * request.options.num_return_sequences
        header = self._header("chat.completion.chunk")

        async def send_chunk(
            index: int, delta: dict[str, str], finish_reason: str | None = None
        ) -> None:
            choice = {
                "index": index,
                "delta": delta,
                "finish_reason": finish_reason,
                "logprobs": None,
            }
            await send(_event({**header, **extra, "choices": [choice]}))

        # Only the first chunk of each choice contains the warnings: `send_chunk` adds `extra`, which is empty later.
        extra = _warnings(chat, request)
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM_HEADERS})
        # As in OpenAI's API, the first chunk of each choice has the role, the last one the finish reason.
        for index in range(len(token_counts)):
            await send_chunk(index, {"role": "assistant", "content": ""})
        extra = {}
        async for delta in self._deltas(request, token_counts):
            if delta.text:
                await send_chunk(delta.index, {"content": delta.text})
            if delta.finish_reason:
                await send_chunk(delta.index, {}, delta.finish_reason)
        if chat.stream_options and chat.stream_options.include_usage:
            usage = _usage(request, token_counts)
            await send(_event({**header, "choices": [], "usage": usage}))
        await send(_event("[DONE]", more_body=False))

    def _header(self, kind: str) -> dict[str, Any]:
        """Return the fields that all chunks of a response share."""
        return {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }


class Attention(ModelEndpoint):
    """POST /v1/attention, an extension of OpenAI's API: the attention map of each word of an answer."""

    metrics_prefix = "llava_attention"

    async def _respond(self, body: bytes, request: RequestHandle, send: Send) -> None:
        """Send the words of an answer, each with its attention map."""
        answer_ids, (height, width) = await self._prepare(body, request)
        del body  # free it while the model runs
        async with request.deadline():
            words, grids = await self.engine.run_on_model(
                lambda model: _word_attention(model, request, answer_ids)
            )
        content = {
            "object": "attention",
            "model": self.name,
            "region": self.engine.model.vision_tower.transform.visible_region(height, width),
            "words": [{"word": word, "grid": grid} for word, grid in zip(words, grids)],
        }
        await _send_json(content, send)

    async def _prepare(
        self, body: bytes, request: RequestHandle
    ) -> tuple[list[int], tuple[int, int]]:
        """Prepare the prompt and the image of a request.

        Nothing else of the request is kept, for the same reason as in `ChatCompletions._submit`.

        Returns:
            The token ids of the answer, and (height, width) of the image.
        """
        loop = asyncio.get_running_loop()
        readers = self.engine.reader_threads
        async with request.deadline():
            attention = await self._parse(AttentionRequest, body)
            messages = attention.to_messages(self.engine.model.instruction)
            images = await self._load_images(attention.messages)
            if len(images) != 1:
                raise RequestError(
                    f"Attention maps require exactly one image, got {len(images)}.",
                    param="messages",
                )
            answer_ids = await loop.run_in_executor(readers, self._encode_answer, attention.answer)
            image_size = await loop.run_in_executor(readers, _shown_size, images[0])
        # The answer is appended to the prompt, so both together must fit into the context.
        await request.prepare(messages, images, answer_tokens=len(answer_ids))
        return answer_ids, image_size

    def _encode_answer(self, answer: str) -> list[int]:
        """Return the token ids of an answer; raise RequestError if it has no tokens or too many."""
        try:
            answer_ids = encode_answer(self.engine.model, answer)
        except ValueError as error:
            raise RequestError(f"answer: {error}", param="answer") from None
        max_tokens = self.limits.max_tokens
        if not 0 < len(answer_ids) <= max_tokens:
            raise RequestError(
                f"answer: expected 1 to {max_tokens} tokens, got {len(answer_ids)}.", param="answer"
            )
        return answer_ids


def _shown_size(image: bytes) -> tuple[int, int]:
    """Return (height, width) of an image file, with its orientation applied.

    The decoded pixels are not kept: for all requests in flight together, they would need gigabytes of memory.
    """
    width, height = read_image_size(image)
    with DECODING.admit(width * height):
        checked = check_image(image)
    return checked.height, checked.width


def _word_attention(
    model: Llava, request: RequestHandle, answer_ids: list[int]
) -> tuple[list[str], list[list[list[float]]]]:
    """Return the words and, for each, its attention to the image's patches (rows, columns).

    Weights are rounded to 4 significant digits, which halves the size of the response.
    """
    assert request.pixel_values is not None
    try:
        words, grids = word_attention(model, request.prompt, request.pixel_values, answer_ids)
    except ValueError as error:  # there are no words, for example only incomplete characters
        raise RequestError(f"answer: {error}", param="answer") from None
    rounded: list[list[list[float]]] = []
    # (words, 1 image, rows, columns) -> one grid for each word. Replace NaN, which JSON does not support.
    for grid in grids[:, 0].nan_to_num().tolist():
        rounded.append([[float(f"{weight:.4g}") for weight in row] for row in grid])
    return words, rounded


# ---- responses ----


def _warnings(chat: ChatRequest, request: RequestHandle) -> dict[str, list[str]]:
    """Return the field `warnings` of a response, or no field if there are no warnings.

    The field is an extension of OpenAI's API. It warns that the answer is limited to fewer tokens than requested.
    """
    requested = chat.requested_tokens
    granted = request.options.max_new_tokens
    if requested is None or requested <= granted:
        return {}
    name = "max_completion_tokens" if chat.max_completion_tokens else "max_tokens"
    # An integer in JSON may have any number of digits, so do not print a huge one.
    shown = str(requested) if requested < 10**12 else "more than 10^12"
    return {
        "warnings": [f"{name}: {shown} tokens were requested; the answer has at most {granted}."]
    }


def _usage(request: RequestHandle, token_counts: list[int]) -> dict[str, int]:
    """Return the field `usage` of a response."""
    prompt_tokens = request.prompt_tokens
    completion_tokens = sum(token_counts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


async def _send_json(content: object, send: Send) -> None:
    """Send a JSON response with status 200."""
    response = JSONResponse(content)
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


def _event(content: object, more_body: bool = True) -> dict[str, Any]:
    """Return the ASGI message of one server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {
        "type": "http.response.body",
        "body": f"data: {data}\n\n".encode(),
        "more_body": more_body,
    }


async def _run_while_connected(
    receive: Receive,
    response: Coroutine[Any, Any, None],
    seconds: float,
    has_started: Callable[[], bool],
) -> None:
    """Send a response; stop when the client disconnects, or when the time limit is reached.

    Args:
        receive: ASGI function that returns the disconnect message.
        response: Coroutine that sends the response.
        seconds: Time limit. A client that has not read its response by then is treated as disconnected.
            Otherwise, its request could be in flight forever.
        has_started: Function that returns whether the response has started, so that the client can read it.

    Raises:
        ClientDisconnect: The client has disconnected, or it has not read its response within the time limit.
        TimeoutError: The time limit was reached before the response started.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    responding = asyncio.create_task(response)
    watching = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait(
            [responding, watching], timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if not responding.done():
            if watching.done() or has_started():
                raise ClientDisconnect
            raise asyncio.TimeoutError
        responding.result()  # raises the exception of the response, if any
    finally:
        responding.cancel()
        watching.cancel()
        await asyncio.gather(responding, watching, return_exceptions=True)


# ---- the application ----


def create_app(
    engine: Engine,
    name: str,
    key: str = "",
    limits: Limits = Limits(),
    page: Sequence[BaseRoute] = (),
    allowed_hosts: Iterable[str] = (),
) -> Starlette:
    """Return the application. It starts and stops the engine.

    Args:
        engine: The engine, which owns the model.
        name: Name of the model in responses; see also `Limits.strict_model`.
        key: API key; empty if none is required. `security.PUBLIC_PATHS` never require it.
        limits: Limits of one request.
        page: Routes of the web page, from `page.page_routes`.
        allowed_hosts: Additional values of the Host header, see `security.HostCheck`.
    """
    # Do not use the global registry of prometheus_client, which all applications of a process share.
    registry = CollectorRegistry()
    _add_engine_metrics(engine, registry)
    fetcher = _create_fetcher(limits)
    model = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "llava-simplified",
    }

    async def health(_: Request) -> Response:
        if engine.is_running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed"}, 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def list_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def retrieve_model(request: Request) -> Response:
        requested = request.path_params["name"]
        if requested != name:
            raise _model_not_found(requested, name)
        return JSONResponse(model)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with engine, fetcher or nullcontext():
            yield

    endpoint_args = (engine, name, limits, fetcher, registry)
    # Put SecurityHeaders first (outermost), so that the responses of the other middleware have them too.
    middleware = [Middleware(SecurityHeaders), Middleware(HostCheck, allowed_hosts)]
    if key:
        middleware.append(Middleware(KeyCheck, key))
    # The same handler is registered for each class. The first six are expected errors. For any other exception,
    # Starlette sends the response and raises the exception again, so that uvicorn logs it.
    handled = (
        HTTPException,
        QueueFullError,
        asyncio.TimeoutError,
        ValidationError,
        RequestError,
        ImageError,
        Exception,
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(*endpoint_args), methods=["POST"]),
            Route("/v1/attention", Attention(*endpoint_args), methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", retrieve_model),
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


def _add_engine_metrics(engine: Engine, registry: CollectorRegistry) -> None:
    """Add metrics whose values are read from the engine."""
    requests = Gauge(
        "llava_requests_in_flight", "Requests being read, waiting or running", registry=registry
    )
    requests.set_function(lambda: len(engine.requests_in_flight))
    sequences = Gauge(
        "llava_sequences_running", "Sequences in the running batch", registry=registry
    )
    sequences.set_function(lambda: len(engine.sequences_running))


def _create_fetcher(limits: Limits) -> Fetcher | None:
    """Return the fetcher of image URLs; None if they are not allowed."""
    if limits.fetch is None:
        return None
    # Import the fetcher only here, because it requires aiohttp, which the extra `serve` does not install.
    from llava_simplified.prepare.fetch import Fetcher

    return Fetcher(limits.fetch, ban_seconds=_HOST_BAN_SECONDS)
