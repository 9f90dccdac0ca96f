"""A real server in a thread, and the requests that the tests send to it."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn
from PIL import Image
from starlette.routing import Route

from llava_simplified.model.llava import Llava
from llava_simplified.serve.api import Limits, create_app
from llava_simplified.serve.connections import TimedH11Protocol
from llava_simplified.serve.engine import Engine
from llava_simplified.serve.page import page_routes

CHAT = "/v1/chat/completions"
ATTENTION = "/v1/attention"
DEFAULT_LIMITS = Limits()


@dataclass
class LiveServer:
    """A running server."""

    url: str
    engine: Engine

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, body: Any, path: str = CHAT) -> httpx.Response:
        # httpx refuses to write NaN, which some tests send.
        headers = {"content-type": "application/json"}
        return httpx.post(self.url + path, content=json.dumps(body), headers=headers, timeout=60)

    def metric(self, name: str) -> float:
        """Return the value of a metric, 0 if it has not been set."""
        text = httpx.get(f"{self.url}/metrics").text
        match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(match[1]) if match else 0.0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(3000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("the condition did not become true within 30 s")


def assert_idle(engine: Engine) -> None:
    """Assert that the engine keeps no data of finished requests."""
    assert not engine.requests_in_flight
    assert not engine.sequences_running
    batch = engine._batch
    assert batch is None or not (batch.generated_ids or batch.active or batch.errors)


@contextmanager
def live_server(
    model: Llava,
    key: str = "",
    limits: Limits = DEFAULT_LIMITS,
    examples: Sequence[bytes] | None = None,
    allowed_hosts: Sequence[str] = (),
    **engine_options: Any,
) -> Iterator[LiveServer]:
    """Run a server, with the page if `examples` is given. At the end, assert that it is idle."""
    engine = Engine(model, **engine_options)
    page: list[Route] = []
    if examples is not None:
        page = page_routes(
            "tiny", model.instruction, limits, engine.batch_size, bool(key), examples
        )
    app = create_app(engine, "tiny", key, limits, page, allowed_hosts)
    config = uvicorn.Config(
        app,
        "127.0.0.1",
        0,
        http=TimedH11Protocol,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=30,  # so that a connection left open cannot stop the tests
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has ended"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    live = LiveServer(f"http://127.0.0.1:{port}", engine)
    try:
        yield live
        live.wait_until(lambda: not engine.requests_in_flight and not engine.sequences_running)
        assert_idle(engine)
    finally:
        server.should_exit = True
        thread.join()


# ---- faulty models ----


@contextmanager
def without_end_tokens(model: Llava) -> Iterator[None]:
    """Make all answers as long as their maximum."""
    stop_ids = model.prompt.stop_ids
    model.prompt.stop_ids = [10**6]
    try:
        yield
    finally:
        model.prompt.stop_ids = stop_ids


@contextmanager
def paused_after(
    model: Llava, steps: int, begin: Callable[[], bool] = lambda: True
) -> Iterator[threading.Event]:
    """Pause the language model after `steps` forward passes, until the event is set or the block ends.

    This makes tests of timeouts and disconnections independent of the machine's speed.

    Args:
        model: The model.
        steps: Number of forward passes before the pause.
        begin: The first forward pass waits until this function returns True, for example when all requests have
            arrived.
    """
    resume = threading.Event()
    calls = 0

    def wait(*_: object) -> None:
        nonlocal calls
        while not (begin() or resume.is_set()):
            time.sleep(0.001)
        calls += 1
        if calls > steps:
            resume.wait()

    handle = model.language_model.register_forward_pre_hook(wait)
    try:
        yield resume
    finally:
        resume.set()
        handle.remove()


# ---- requests ----


def wide_photo() -> bytes:
    """Return an image that is twice as wide as high, of which the vision tower receives the middle half."""
    pixels = np.random.default_rng(7).integers(0, 255, (4, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((400, 200)).save(file, "PNG")
    return file.getvalue()


def data_url(photo: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(photo).decode()


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user_message(*photos: bytes, text: str = "What?") -> list[Any]:
    """Return a conversation of one message, with the text before the image, as most clients send it."""
    images = [image_part(data_url(photo)) for photo in photos]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *images]}]


def chat_body(photo: bytes, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": user_message(photo), **options}


def attention_body(photo: bytes, answer: str) -> dict[str, Any]:
    return {"model": "tiny", "messages": user_message(photo), "answer": answer}


def open_connection(
    server: LiveServer, body: dict[str, Any], send_half: bool = False, path: str = CHAT
) -> socket.socket:
    """Send a request, or half of one, and return the connection without reading the response."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    if send_half:
        content = content[: len(content) // 2]
    connection.sendall(head.encode() + content)
    return connection
