"""Values and connections of an attacker, and a healthy client that an attack must not affect."""

from __future__ import annotations

import contextlib
import copy
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from live_server import LiveServer, chat_body

from llava_simplified.model.llava import Llava

# One value of each type of JSON, and unusual values that are easily forgotten.
OTHER_TYPES: Sequence[Any] = (
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    1.5,
    "",
    "\x00\u202e",
    [],
    [None],
    {},
    {"a": {"b": 1}},
)
HUGE: Sequence[Any] = (
    "x" * 300_000,
    list(range(20_000)),
    {str(number): 0 for number in range(5_000)},
)


def nested(depth: int) -> Any:
    """Return lists within lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key of a JSON value, and of the first entry of every list."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield (*prefix, key)
            yield from paths(child, (*prefix, key))
    elif isinstance(value, list) and value:
        yield (*prefix, 0)
        yield from paths(value[0], (*prefix, 0))


def replaced(value: Any, path: Sequence[Any], new: Any) -> Any:
    """Return a copy of a JSON value in which one entry is replaced."""
    result = copy.deepcopy(value)
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = new
    return result


def deleted(value: Any, path: Sequence[Any]) -> Any:
    """Return a copy of a JSON value without one entry."""
    result = copy.deepcopy(value)
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return result


def expected_text(model: Llava, photo: bytes) -> str:
    """Return the greedy answer to the request of a `HealthyClient`, without a server."""
    return model.caption(photo, "What?", max_new_tokens=6)


class HealthyClient:
    """Ask for the same greedy answer again and again, in a thread, while the server is attacked."""

    def __init__(self, server: LiveServer, expected: str, photo: bytes) -> None:
        self.expected = expected
        self.answers: list[str] = []
        self._server = server
        self._body = chat_body(photo, max_tokens=6)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set() or not self.answers:
            response = self._server.post(self._body)
            # Record errors as answers, too: they differ from the expected answer.
            if response.status_code == 200:
                self.answers.append(response.json()["choices"][0]["message"]["content"])
            else:
                self.answers.append(response.text)
            self._stop.wait(0.05)

    def __enter__(self) -> HealthyClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def connect(server: LiveServer) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def exchange(server: LiveServer, *chunks: bytes, pause: float = 0.0) -> bytes:
    """Send bytes unchanged; return all bytes that arrive until the server closes the connection."""
    received = b""
    with connect(server) as connection:
        # The server may close the connection before everything is sent.
        with contextlib.suppress(OSError):
            for chunk in chunks:
                connection.sendall(chunk)
                time.sleep(pause)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                received += chunk
    return received


def statuses(received: bytes) -> list[int]:
    """Return the status codes of all responses in the bytes of a connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
