"""Run a server that has OpenAI's API, send requests for captions to it, and measure its memory."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from workload import peak_memory


class Server(NamedTuple):
    """A running server.

    Attributes:
        url: URL of the server, without a path.
        memory: Peak resident memory in bytes. The list is empty while the server runs, and has one item afterward.
    """

    url: str
    memory: list[int]


class Answer(NamedTuple):
    """The answer of a server to one request.

    Attributes:
        texts: The text of each choice.
        prompt_tokens: Number of positions of the prompt, image tokens included.
        seconds: Seconds from the request to the complete answer.
    """

    texts: list[str]
    prompt_tokens: int
    seconds: float


# ---- servers ----


@contextmanager
def running_server(command: Sequence[str]) -> Iterator[Server]:
    """Run a server on a free port; yield when it answers, and stop it when the block ends.

    Args:
        command: The command without `--port`, which is appended.
    """
    # With port 0, the operating system selects a free port.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    server = Server(f"http://127.0.0.1:{port}", [])
    with tempfile.TemporaryFile() as log:
        # The requests have no key, so a key of the user must not apply here.
        environment = dict(os.environ, LLAVA_API_KEY="")
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log
        )
        try:
            if not wait_until_healthy(process, server.url):
                log.seek(0)
                text = log.read().decode(errors="replace")
                raise SystemExit(f"{Path(command[0]).name} did not start:\n{text[-3000:]}")
            yield server
        finally:
            server.memory.append(_stop(process))


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait for a server. Return True when it answers, or False when its process has ended."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return True
        # A server that is still loading its model refuses the connection, drops it, or answers 503.
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError):
            time.sleep(0.2)
    return False


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Stop a server, and return its peak resident memory in bytes; 0 if it has already ended."""
    if process.poll() is not None:
        return 0
    memory = peak_memory(process.pid)
    process.terminate()
    process.wait()
    return memory


# ---- requests ----


def make_body(
    image: bytes, instruction: str, max_tokens: int, choices: int = 1, temperature: float = 0.0
) -> dict[str, Any]:
    """Return the body of a request for captions of a PNG image."""
    data_uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_uri}}]
    content.append({"type": "text", "text": instruction})
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "n": choices,
        "temperature": temperature,
    }


def request_captions(url: str, body: dict[str, Any]) -> Answer:
    """Request the captions of one image."""
    request = _make_request(url, body)
    start = time.perf_counter()
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    seconds = time.perf_counter() - start
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    return Answer(texts, answer["usage"]["prompt_tokens"], seconds)


def measure_first_token(url: str, body: dict[str, Any]) -> float:
    """Return the seconds from a request until the first text of its answer arrives."""
    request = _make_request(url, body | {"n": 1, "stream": True})
    start = time.perf_counter()
    with urllib.request.urlopen(request) as response:
        for line in response:
            if _has_text(line.decode()):
                seconds = time.perf_counter() - start
                response.read()  # otherwise, the server would still be busy during the next measurement
                return seconds
    raise SystemExit(
        f"{url}: the streamed answer contains no text, so the time to the first token cannot be measured."
    )


def _make_request(url: str, body: dict[str, Any]) -> urllib.request.Request:
    """Return the POST request with a body from `make_body`."""
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    return request


def _has_text(line: str) -> bool:
    """Return whether a line of server-sent events contains text of the answer."""
    data = line.strip().removeprefix("data:").strip()
    if not data.startswith("{"):  # an empty line, or the end of the stream: [DONE]
        return False
    choices = json.loads(data)["choices"]
    return any(choice["delta"].get("content") for choice in choices)
