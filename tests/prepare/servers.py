"""Run the faulty server (`benchmarks/loopback.py`) in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import loopback


class Server:
    """A running server.

    Attributes:
        port: Its port, on every loopback address.
        served: The number of requests by path.
        requests: All requests in the order of their arrival.
        targets: Set by tests: the target of `/redirect/name` by name, and under "robots" the text of robots.txt.
    """

    def __init__(self, port: int, handler: type) -> None:
        self.port = port
        self.served = handler.served
        self.requests = handler.requests
        self.targets = handler.targets

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        """Return the URL of a path, whose first part names the kind of response (see `loopback.EXPECTED`)."""
        return f"{scheme}://{host}:{self.port}/{path}"


@pytest.fixture(name="server")
def loopback_server() -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[int, type]:
        listening, handler = await loopback.start("0.0.0.0", 0, 0.01)
        port = listening.sockets[0].getsockname()[1]
        with contextlib.suppress(OSError):  # a machine without IPv6
            await loop.create_server(handler, "::1", port)
        return port, handler

    yield Server(*asyncio.run_coroutine_threadsafe(start(), loop).result())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
