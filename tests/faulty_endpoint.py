"""A server with OpenAI's API, in a thread, with faults that a test chooses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def caption_of(image: bytes, number: int = 0) -> str:
    """Return the caption of an image file with a sample number. It differs for every image and every number."""
    return f"image {hashlib.sha256(image).hexdigest()[:12]} é {number}"


class FaultyEndpoint:
    """The settings of the server, which a test changes, and the requests that it has received.

    Attributes:
        url: The base URL.
        faults: By image file, the faults of its next requests, one per request. Later requests succeed.
        always: By image file, the fault of all of its requests.
        max_n: Maximum number of answers per request; a larger `n` is ignored. If 0, requests with `n` are rejected.
        before_answer: Called before each answer with the image file.
        text_of: Returns the answer to a request; None to answer with the caption of its image.
        requests: The bodies of all requests, with the image file as "image".
        arrivals: By image file, the times at which its requests arrived.
        headers: The headers of the last request.
        most_in_flight: Maximum number of requests that were in flight at the same time.
    """

    def __init__(self) -> None:
        self.url = ""
        self.faults: dict[bytes, list[str]] = {}
        self.always: dict[bytes, str] = {}
        self.max_n = 100
        self.before_answer: Callable[[bytes], None] = lambda image: None
        self.text_of: Callable[[dict[str, Any]], str] | None = None
        self.requests: list[dict[str, Any]] = []
        self.arrivals: dict[bytes, list[float]] = defaultdict(list)
        self.headers: dict[str, str] = {}
        self.most_in_flight = 0
        self.in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def captioned(self) -> list[bytes]:
        """Return the images of all requests, in the order of their arrival."""
        return [request["image"] for request in self.requests]


def completion(texts: list[str | None], **choice: Any) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            **choice,
        }
        for index, text in enumerate(texts)
    ]
    return {"id": "1", "object": "chat.completion", "choices": choices}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    endpoint: FaultyEndpoint

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        endpoint = self.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image = image_of(body)
        with endpoint.lock:
            endpoint.in_flight += 1
            endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
            endpoint.requests.append({**body, "image": image})
            endpoint.arrivals[image].append(time.monotonic())
            endpoint.headers = dict(self.headers)
            fault = endpoint.always.get(image, "")
            if endpoint.faults.get(image):
                fault = endpoint.faults[image].pop(0)
        try:
            endpoint.before_answer(image)
        finally:
            # Do this before answering: the client's next request may arrive before `send` has returned.
            with endpoint.lock:
                endpoint.in_flight -= 1
        try:
            self.answer(fault, body, image)
        except OSError:
            self.close_connection = True  # the client has disconnected

    def answer(self, fault: str, body: dict[str, Any], image: bytes) -> None:
        n = body.get("n", 1)
        if "n" in body and self.endpoint.max_n == 0:
            self.send(400, {"error": {"message": "n is not supported"}})
            return
        count = min(n, max(1, self.endpoint.max_n))
        first = body.get("seed", 0)
        texts: list[str | None] = [caption_of(image, first + k) for k in range(count)]
        if self.endpoint.text_of is not None:
            texts = [self.endpoint.text_of(body)]
        good = completion(texts)
        if fault.isdecimal():
            self.send(int(fault), {"error": {"message": f"failed with {fault}"}})
        elif fault.startswith("429 "):
            self.send(429, {"error": "slow down"}, {"Retry-After": fault.split()[1]})
        elif fault == "hang":
            self.endpoint.closing.wait(30)
            self.close_connection = True
        elif fault == "cut":
            self.send(200, good, cut=20)
        elif fault == "wrong length":  # the body is longer than its Content-Length
            self.send(200, good, announced=40)
        elif fault == "two answers":  # the second looks like the answer to the next request
            self.send(200, good)
            self.send(200, completion(["the caption of another image"] * n))
        elif fault == "bad json":
            self.send(200, b"<html>Bad gateway</html>")
        elif fault in ANSWERS:
            self.send(200, ANSWERS[fault])
        else:
            assert not fault, fault
            self.send(200, good)

    def send(
        self,
        status: int,
        content: Any,
        headers: dict[str, str] | None = None,
        announced: int | None = None,
        cut: int = 0,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(announced or len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        self.wfile.flush()
        if cut:
            self.close_connection = True


# Bodies with status 200 that contain no usable caption.
ANSWERS: dict[str, Any] = {
    "no choices": {"choices": []},
    "endless text": {"choices": [{"message": {"content": "a " * 1_000_000}}]},
    "a list": [1, 2],
    "no message": {"choices": [{"text": "old API"}]},
    "number": completion([7]),  # type: ignore[list-item]
    "deep": b'{"choices":' + b"[" * 100_000,
    "not utf-8": b'{"choices": "\xff"}',
    "refusal": {
        "choices": [
            {"message": {"content": None, "refusal": "I can't help"}, "finish_reason": "stop"}
        ]
    },
    "filter": completion([""], finish_reason="content_filter"),
    "null": completion([None]),
    "blank": completion([" \n"]),
    "length": completion(["a long"], finish_reason="length"),
}


def image_of(body: dict[str, Any]) -> bytes:
    """Return the file of the only image in a conversation; empty if there is none."""
    for message in body["messages"]:
        if isinstance(message["content"], str):
            continue
        for part in message["content"]:
            if part["type"] == "image_url":
                return base64.b64decode(part["image_url"]["url"].partition(";base64,")[2])
    return b""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def faulty_endpoint() -> Iterator[FaultyEndpoint]:
    """Run a server on a free port of this machine."""
    endpoint = FaultyEndpoint()
    handler = type("Handler", (_Handler,), {"endpoint": endpoint})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        endpoint.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
