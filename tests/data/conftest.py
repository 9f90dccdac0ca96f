"""The server that misbehaves, in a thread of the tests' own process."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import loopback


class Server:
    """Its port, what was asked of it, and the redirects and robots.txt that a test sets up."""

    def __init__(self, port: int, handler: type) -> None:
        self.port, self.served, self.targets, self.requests = port, handler.served, handler.targets, handler.requests

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/{path}"


@pytest.fixture
def server() -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening, handler = asyncio.run_coroutine_threadsafe(loopback.start(None, 0, 0.01), loop).result()
    yield Server(listening.sockets[0].getsockname()[1], handler)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
