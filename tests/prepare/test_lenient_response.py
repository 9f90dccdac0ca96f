"""Responses that curl accepts are accepted, in large and small pieces. The kind of a refusal names its cause."""

from __future__ import annotations

import asyncio
import inspect
import io

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from PIL import Image

from llava_simplified.prepare.fetch import FetchResult
from llava_simplified.prepare.fetch_hosts import fetch_all
from llava_simplified.prepare.fetch_options import FetchOptions

OPTIONS = FetchOptions(allow_private=True, timeout=5, retries=0)


def make_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = make_jpeg()
LENGTH = b"Content-Length: %d" % len(JPEG)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(JPEG), JPEG)
BODY = LENGTH + b"\r\n\r\n" + JPEG

ACCEPTED = {
    "long header": OK + b"X-A: " + b"a" * 60_000 + b"\r\n" + BODY,
    "many headers": OK + b"".join(b"X-%d: a\r\n" % i for i in range(1000)) + BODY,
    "no reason": b"HTTP/1.1 200\r\n" + BODY,
    "long reason": b"HTTP/1.1 200 " + b"x" * 20_000 + b"\r\n" + BODY,
    "line feeds": b"HTTP/1.1 200 OK\n" + LENGTH + b"\n\n" + JPEG,
    "mixed line ends": OK + b"X: y\n" + BODY,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + JPEG,
    "HTTP/2": b"HTTP/2 200\r\n" + BODY,
    "lower case": b"http/1.1 200 ok\r\n" + BODY,
    "empty line before": b"\r\n" + OK + BODY,
    "space in a name": OK + b"Foo Bar: x\r\nFoo : x\r\n: x\r\n" + BODY,
    "space before the colon": OK + LENGTH.replace(b":", b" :") + b"\r\n\r\n" + JPEG,
    "no colon": OK + b"Garbage\r\n" + BODY,
    "not ASCII": OK + "Ü: ü\r\n".encode() + b"X: \xe9\xff\r\n" + BODY,
    "control characters": OK + b"X: a\0\x01\x7f\rb\r\n" + BODY,
    "continued line": OK + b"X: a\r\n b\r\n" + BODY,
    "repeated length": OK + LENGTH + b"\r\n" + BODY,
    "length in a list": OK + LENGTH + b", %d\r\n\r\n" % len(JPEG) + JPEG,
    "length with a sign": OK + LENGTH.replace(b": ", b": +") + b"\r\n\r\n" + JPEG,
    "chunked": OK + CHUNKED + b"\r\n" + CHUNKS,
    "chunked and a length": OK + CHUNKED + b"Content-Length: 5\r\n\r\n" + CHUNKS,
    "identity": OK + b"Transfer-Encoding: identity\r\n" + BODY,
    "more after the body": OK + BODY + b"more",
    "100 and 103 before": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
    + OK
    + BODY,
    "cookies": OK
    + b'Set-Cookie: a"=\x01;; expires=Fri, 31 Dec 99999999999999 23:59:59 GMT\r\n'
    + BODY,
    "upgrade": OK + b"Upgrade: h2\r\nConnection: Upgrade\r\n" + BODY,
}
REFUSED = {
    "HTTP/0.9": (JPEG, "protocol"),
    "garbage": (b"\0\1\2\3" * 100, "protocol"),
    "nothing": (b"", "connection"),
    "different lengths": (OK + b"Content-Length: 5\r\n" + BODY, "protocol"),
    "negative length": (OK + b"Content-Length: -1\r\n\r\n" + JPEG, "protocol"),
    "length is not a number": (OK + b"Content-Length: abc\r\n\r\n" + JPEG, "protocol"),
    "body too short": (OK + LENGTH + b"0\r\n\r\n" + JPEG, "truncated"),
    "chunks too short": (OK + CHUNKED + b"\r\n" + CHUNKS[:-7], "truncated"),
    "endless head": (OK + b"X: a\r\n" * 100_000, "protocol"),
    "status of four digits": (b"HTTP/1.1 0200 OK\r\n" + BODY, "protocol"),
    "opt-out before a control character": (OK + b"X-Robots-Tag: noai\0\r\n" + BODY, "opt_out"),
    "opt-out in a second header": (
        OK + b"X-Robots-Tag: all\r\nX-Robots-Tag: noai\r\n" + BODY,
        "opt_out",
    ),
    "bad target": (b"HTTP/1.1 302 Found\r\nLocation: http://[]@/1.jpg\r\n\r\n", "bad_url"),
    "other scheme": (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "scheme"),
    "huge year": (
        b"HTTP/1.1 404 No\r\nRetry-After: Fri, 31 Dec 99999999999999999999 23:59:59 GMT\r\n\r\n",
        "http_404",
    ),
}


def fetch_response(response: bytes, piece: int) -> FetchResult:
    """Return the result of one request that is answered with these bytes, sent in pieces."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for start in range(0, len(response), piece):
            writer.write(response[start : start + piece])
            await asyncio.sleep(0)
        writer.close()

    async def run() -> FetchResult:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            url = f"http://127.0.0.1:{port}/1.jpg"
            (result,) = [result async for _, _, result in fetch_all([(0, url)], OPTIONS)]
        return result

    return asyncio.run(run())


@pytest.mark.parametrize("piece", [1 << 20, 700])
@pytest.mark.parametrize("name", ACCEPTED)
def test_fetch_accepts_what_curl_accepts(name: str, piece: int) -> None:
    result = fetch_response(ACCEPTED[name], piece)
    assert result.kind == "ok", result
    assert result.image is not None
    assert result.image.data == JPEG


@pytest.mark.parametrize("piece", [1 << 20, 700])
@pytest.mark.parametrize("name", REFUSED)
def test_fetch_reports_the_kind_of_each_refused_response(name: str, piece: int) -> None:
    response, kind = REFUSED[name]
    assert fetch_response(response, piece).kind == kind


def test_fetch_names_damaged_chunks_at_once() -> None:
    """The head of the response is valid, so the code that waits for the body must receive the error."""
    response = OK + CHUNKED + b"\r\n" + b"%x\r\n" % len(JPEG) + JPEG + b"\r\nno size\r\n"
    result = fetch_response(response, len(response) - 20)
    assert result.kind in ("truncated", "protocol")


def test_aiohttp_has_the_hooks_of_the_lenient_protocol() -> None:
    assert "self._factory(" in inspect.getsource(aiohttp.TCPConnector)
    assert {"data_received", "set_response_params", "force_close"} <= set(vars(ResponseHandler))
