"""Attacks on the downloader by a server that breaks HTTP (RFC 9110, RFC 9112) in every way that a client can meet.

The rule: each row ends with one outcome, a success or a counted failure, in bounded time. The next request to the same
host, which may be sent over the same connection, gets its own image.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import logging
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

import pytest
from PIL import Image

from llava_simplified.prepare.fetch import FetchResult
from llava_simplified.prepare.fetch_hosts import fetch_all
from llava_simplified.prepare.fetch_options import FetchOptions

OPTIONS = FetchOptions(
    allow_private=True,
    timeout=6,  # enough for responses that are sent at once, even on a busy machine
    retries=0,
    per_host=1,
    concurrency=32,
    max_bytes=1_000_000,
)
MAX_SECONDS = 120.0  # for all rows together, on a machine that is busy


def make_jpeg(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = make_jpeg("red")
NEXT_JPEG = make_jpeg("blue")  # what the next request to the host gets
LENGTH = b"Content-Length: %d\r\n" % len(JPEG)
OK = b"HTTP/1.1 200 OK\r\n"
CLOSE = b"Connection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ONE_CHUNK = b"%x\r\n%s\r\n" % (len(JPEG), JPEG)
WHOLE = OK + LENGTH + b"\r\n" + JPEG

Pieces = Callable[[], AsyncIterator[bytes]]


class Fault(NamedTuple):
    """A faulty response of the server.

    Attributes:
        response: The bytes that it sends, or an iterator of bytes, which may wait and need not end.
        kinds: The correct outcomes, separated by spaces. "redirected" is the outcome "ok" with the image at `/next`.
        end: What the server does with the connection afterward: "keep" it open for the next request, "hang" (keep it,
            but read nothing), "close" it, "half" (close the sending side only) or "reset" it.
    """

    response: bytes | Pieces
    kinds: str
    end: str = "keep"


def answer(head: bytes, body: bytes = JPEG, status: bytes = OK) -> bytes:
    return status + head + b"\r\n" + body


def repeat(first: bytes, piece: bytes, seconds: float = 0.0) -> Pieces:
    """Return an iterator function that yields `first`, and then the same piece forever."""

    async def pieces() -> AsyncIterator[bytes]:
        yield first
        while True:
            yield piece
            await asyncio.sleep(seconds)

    return pieces


def byte_by_byte(data: bytes, seconds: float) -> Pieces:
    async def pieces() -> AsyncIterator[bytes]:
        for index in range(len(data)):
            yield data[index : index + 1]
            await asyncio.sleep(seconds)

    return pieces


def redirect(location: bytes, status: bytes = b"302 Found") -> bytes:
    head = b"Location: " + location + b"\r\nContent-Length: 0\r\n"
    return answer(head, b"", b"HTTP/1.1 " + status + b"\r\n")


def encoded(name: bytes, body: bytes) -> bytes:
    return answer(b"Content-Encoding: %s\r\nContent-Length: %d\r\n" % (name, len(body)), body)


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


BOMB = bytes(20_000_000)
FAULTS: dict[str, Fault] = {
    # ---- status lines ----
    "nothing": Fault(b"", "connection", "close"),
    "no status": Fault(b"HTTP/1.1\r\n\r\n", "protocol", "close"),
    "status is a word": Fault(b"HTTP/1.1 two OK\r\n\r\n", "protocol", "close"),
    "status of two digits": Fault(b"HTTP/1.1 20 OK\r\n\r\n", "protocol", "close"),
    "status of five digits": Fault(b"HTTP/1.1 20000 OK\r\n\r\n", "protocol", "close"),
    "status 000": Fault(
        b"HTTP/1.1 000 No\r\n" + LENGTH + b"\r\n" + JPEG, "http_0 http_000 protocol"
    ),
    "status 999": Fault(b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n", "http_999"),
    "negative status": Fault(b"HTTP/1.1 -20 OK\r\n\r\n", "protocol", "close"),
    "unknown version": Fault(answer(LENGTH, JPEG, b"HTTP/9.9 200 OK\r\n"), "protocol", "close"),
    "other protocol": Fault(answer(LENGTH, JPEG, b"ICY 200 OK\r\n"), "protocol", "close"),
    "HTTP/0.9": Fault(JPEG, "protocol", "close"),
    "frames of HTTP/2": Fault(b"\0\0\x12\4\0\0\0\0\0" + bytes(18), "protocol", "close"),
    "alert of TLS": Fault(b"\x15\x03\x01\0\x02\x02\x28", "protocol", "close"),
    "NUL in the status line": Fault(answer(LENGTH, JPEG, b"HTTP/1.1 200 O\0K\r\n"), "ok"),
    "carriage returns only": Fault(b"HTTP/1.1 200 OK\rContent-Length: 1\r\rx", "protocol", "close"),
    "endless status line": Fault(repeat(b"HTTP/1.1 200 ", b"x" * 65536), "protocol"),
    # ---- interim responses ----
    "interim only": Fault(b"HTTP/1.1 100 Continue\r\n\r\n", "connection", "close"),
    "switching protocols": Fault(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "connection", "close"
    ),
    "interim before": Fault(b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" * 3 + WHOLE, "ok"),
    "endless interim": Fault(repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 5000), "protocol"),
    "slow interim": Fault(repeat(b"", b"HTTP/1.1 102 Wait\r\n\r\n", 0.2), "timeout"),
    # ---- statuses whose body is not the image ----
    "204 with a body": Fault(answer(LENGTH, JPEG, b"HTTP/1.1 204 No Content\r\n"), "http_204"),
    "205 with a body": Fault(answer(LENGTH, JPEG, b"HTTP/1.1 205 Reset\r\n"), "http_205"),
    "304 with a body": Fault(answer(LENGTH, JPEG, b"HTTP/1.1 304 Not Modified\r\n"), "http_304"),
    "206 unasked": Fault(
        answer(b"Content-Range: bytes 0-9/99\r\n" + LENGTH, JPEG, b"HTTP/1.1 206 Partial\r\n"),
        "http_206",
    ),
    "range with status 200": Fault(answer(b"Content-Range: bytes 5-9/99\r\n" + LENGTH), "ok"),
    "endless body of an error": Fault(repeat(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 65536), "http_500"),
    # ---- length ----
    "short body": Fault(answer(b"Content-Length: 99999\r\n"), "truncated", "close"),
    "short body, then silence": Fault(answer(b"Content-Length: 99999\r\n"), "timeout too_slow"),
    "long body": Fault(WHOLE + b"more", "ok"),
    "a second response behind the body": Fault(WHOLE + answer(LENGTH), "ok"),
    "no length": Fault(answer(CLOSE), "ok", "close"),
    "no length, half-closed": Fault(answer(CLOSE), "ok", "half"),
    "no body": Fault(answer(b"Content-Length: 0\r\n", b""), "empty"),
    "different lengths": Fault(answer(LENGTH + b"Content-Length: 5\r\n"), "protocol", "close"),
    "different lengths in a list": Fault(answer(b"Content-Length: 5, 6\r\n"), "protocol", "close"),
    "equal lengths": Fault(answer(LENGTH + LENGTH), "ok"),
    "hexadecimal length": Fault(answer(b"Content-Length: 0x10\r\n"), "protocol", "close"),
    "length with a fraction": Fault(answer(b"Content-Length: 5.0\r\n"), "protocol", "close"),
    "digits beyond ASCII": Fault(
        answer("Content-Length: \u0661\u0662\r\n".encode()), "protocol", "close"
    ),
    "empty length": Fault(answer(b"Content-Length:\r\n"), "protocol ok", "close"),
    "announced too large": Fault(answer(b"Content-Length: 1000001\r\n"), "too_large", "hang"),
    "length beyond 64 bits": Fault(
        answer(b"Content-Length: 99999999999999999999999\r\n"), "protocol too_large", "close"
    ),
    "endless body": Fault(repeat(OK + b"\r\n", b"x" * 65536), "too_large"),
    # ---- chunks ----
    "chunks": Fault(answer(CHUNKED, ONE_CHUNK + b"0\r\n\r\n"), "ok"),
    "chunks of one byte": Fault(
        answer(CHUNKED, b"".join(b"1\r\n%c\r\n" % byte for byte in JPEG) + b"0\r\n\r\n"), "ok"
    ),
    "chunks and a length": Fault(
        answer(CHUNKED + b"Content-Length: 3\r\n", ONE_CHUNK + b"0\r\n\r\n"), "ok"
    ),
    "chunk size is a word": Fault(answer(CHUNKED, b"zz\r\n" + JPEG), "protocol truncated", "close"),
    "negative chunk size": Fault(answer(CHUNKED, b"-5\r\n" + JPEG), "protocol truncated", "close"),
    "empty chunk size": Fault(answer(CHUNKED, b"\r\n" + JPEG), "protocol truncated", "close"),
    "chunk size with 0x": Fault(
        answer(CHUNKED, b"0x5\r\nabcde\r\n0\r\n\r\n"), "protocol truncated", "close"
    ),
    "chunk beyond 64 bits": Fault(
        answer(CHUNKED, b"F" * 30 + b"\r\n" + JPEG), "protocol truncated", "close"
    ),
    "chunk larger than its body": Fault(answer(CHUNKED, b"FFFF\r\n" + JPEG), "truncated", "close"),
    "chunk smaller than its body": Fault(
        answer(CHUNKED, b"5\r\n" + JPEG), "protocol truncated", "close"
    ),
    "no last chunk": Fault(answer(CHUNKED, ONE_CHUNK), "truncated", "close"),
    "no last chunk, then silence": Fault(answer(CHUNKED, ONE_CHUNK), "timeout"),
    "no end of the trailer": Fault(answer(CHUNKED, ONE_CHUNK + b"0\r\n"), "truncated", "close"),
    "no chunks at all": Fault(answer(CHUNKED, b"0\r\n\r\n"), "empty"),
    "chunk extension": Fault(
        answer(CHUNKED, ONE_CHUNK.replace(b"\r", b";a=b\r", 1) + b"0\r\n\r\n"), "ok"
    ),
    "huge chunk extension": Fault(
        answer(CHUNKED, b"5;" + b"x" * 2_000_000 + b"\r\nabcde\r\n0\r\n\r\n"),
        "protocol truncated not_image",
        "close",
    ),
    "endless chunk extension": Fault(
        # Pauses, because it is read until the timeout: without them, one of the cores would be busy for 6 s.
        repeat(answer(CHUNKED, b"5;"), b"x" * 65536, 0.01),
        "protocol truncated too_large timeout",
    ),
    "trailers": Fault(answer(CHUNKED, ONE_CHUNK + b"0\r\nX: y\r\nY: z\r\n\r\n"), "ok"),
    "a length among the trailers": Fault(
        answer(CHUNKED, ONE_CHUNK + b"0\r\nContent-Length: 3\r\n\r\n"), "ok protocol", "close"
    ),
    "trailer without a colon": Fault(
        answer(CHUNKED, ONE_CHUNK + b"0\r\nxxx\r\n\r\n"), "ok protocol truncated", "close"
    ),
    "endless trailers": Fault(
        repeat(answer(CHUNKED, ONE_CHUNK + b"0\r\n"), b"X: y\r\n" * 5000),
        "ok protocol truncated timeout",
    ),
    "a second response behind the chunks": Fault(
        answer(CHUNKED, ONE_CHUNK + b"0\r\n\r\n" + WHOLE), "ok"
    ),
    "chunked twice": Fault(
        answer(b"Transfer-Encoding: chunked, chunked\r\n", ONE_CHUNK + b"0\r\n\r\n"),
        "ok protocol truncated not_image",
        "close",
    ),
    "unknown transfer coding": Fault(
        answer(b"Transfer-Encoding: xchunked\r\n" + LENGTH), "ok protocol not_image", "close"
    ),
    "chunks in HTTP/1.0": Fault(
        answer(CHUNKED, ONE_CHUNK + b"0\r\n\r\n", b"HTTP/1.0 200 OK\r\n"), "ok not_image", "close"
    ),
    # ---- headers ----
    "NUL in a header": Fault(answer(b"X: a\0b\r\n" + LENGTH), "ok"),
    "NUL in a header's name": Fault(answer(b"X\0: a\r\n" + LENGTH), "ok"),
    "NUL in the length": Fault(
        answer(b"Content-Length: 1\0\r\n"), "protocol empty not_image", "close"
    ),
    "continued line": Fault(answer(b"X: a\r\n\tb\r\n" + LENGTH), "ok"),
    "continued line first": Fault(answer(b" X: a\r\n" + LENGTH), "ok"),
    "continued length": Fault(answer(LENGTH.replace(b": ", b":\r\n ")), "ok"),
    "no colon": Fault(answer(b"xxx\r\n" + LENGTH), "ok"),
    "no name": Fault(answer(b": x\r\n" + LENGTH), "ok"),
    "many headers": Fault(answer(b"X: y\r\n" * 10_000 + LENGTH), "ok"),
    "endless headers": Fault(repeat(OK, b"X: y\r\n" * 10_000), "protocol"),
    "endless header": Fault(repeat(OK + b"X: ", b"y" * 65536), "protocol"),
    "another robot, then all": Fault(
        answer(b"X-Robots-Tag: otherbot: all\r\nX-Robots-Tag: noai\r\n" + LENGTH), "opt_out"
    ),
    "another robot, then ours": Fault(
        answer(b"X-Robots-Tag: a: all\r\nX-Robots-Tag: llava-simplified: noai\r\n" + LENGTH),
        "opt_out",
    ),
    "two reservations": Fault(
        answer(b"TDM-Reservation: 0\r\nTDM-Reservation: 1\r\n" + LENGTH), "opt_out"
    ),
    "many robots": Fault(answer(b"X-Robots-Tag: a: noai\r\n" * 10_000 + LENGTH), "ok"),
    "close, but open": Fault(answer(CLOSE + LENGTH), "ok", "hang"),
    "keep-alive, but closed": Fault(answer(b"Connection: keep-alive\r\n" + LENGTH), "ok", "close"),
    # ---- redirects ----
    "redirect without a target": Fault(
        answer(b"Content-Length: 0\r\n", b"", b"HTTP/1.1 302 Found\r\n"), "redirect"
    ),
    "redirect to nothing": Fault(redirect(b""), "redirect"),
    "redirect to itself": Fault(redirect(b"/fault/redirect to itself"), "redirect"),
    "redirect to a relative path": Fault(redirect(b"next"), "redirected"),
    "redirect to a path": Fault(redirect(b"/next"), "redirected"),
    "redirect to a parent": Fault(redirect(b"../../../next"), "redirected"),
    "redirect to a query": Fault(redirect(b"/next?a=b"), "redirected"),
    "redirect with a fragment": Fault(redirect(b"/next#frag"), "redirected"),
    "redirect to a fragment": Fault(redirect(b"#frag"), "redirect"),
    "redirect with a user": Fault(redirect(b"http://%FF%00:%0d%0aX: y@127.0.0.1:9/"), "refused"),
    "redirect to a zone": Fault(redirect(b"http://[fe80::1%25eth0]:9/"), "connect blocked_address"),
    "redirect to a long zone": Fault(
        redirect(b"http://[fe80::1%25" + b"a" * 5000 + b"]/"), "bad_url"
    ),
    "redirect to bad punycode": Fault(redirect(b"http://xn--a-ecp.invalid/"), "dns"),
    "redirect with 30,000 parents": Fault(redirect(b"/" + b"../" * 30_000 + b"next"), "redirected"),
    "redirect with status 308": Fault(redirect(b"/next", b"308 Permanent"), "redirected"),
    "redirect with status 300": Fault(redirect(b"/next", b"300 Multiple"), "http_300"),
    "redirect to ftp": Fault(redirect(b"ftp://127.0.0.1/x"), "scheme"),
    "redirect to a file": Fault(redirect(b"file:///etc/passwd"), "scheme"),
    "redirect to data": Fault(redirect(b"data:image/png;base64,AAAA"), "scheme"),
    "redirect to a script": Fault(redirect(b"javascript:alert(1)"), "scheme"),
    "redirect to gopher": Fault(redirect(b"gopher://127.0.0.1/"), "scheme"),
    "redirect to no host": Fault(redirect(b"http:///x"), "bad_url"),
    "redirect to a bad port": Fault(redirect(b"http://127.0.0.1:99999/"), "bad_url"),
    "redirect to bytes": Fault(redirect(b"http://\xff\xfe\x80/"), "bad_url dns"),
    "redirect to an unknown host": Fault(redirect(b"http://no-such-host.invalid/"), "dns"),
    "redirect to a closed port": Fault(redirect(b"http://127.0.0.1:9/"), "refused"),
    "redirect of 200 kB": Fault(redirect(b"/" + b"a" * 200_000), "ok http_404 connection"),
    "redirect with controls": Fault(redirect(b"/ne\x0b\x00xt"), "http_404"),
    "redirect with a continued line": Fault(redirect(b"\r\n /next"), "redirected"),
    "two targets": Fault(redirect(b"/next\r\nLocation: file:///etc/passwd"), "redirected"),
    "redirect with an endless body": Fault(
        repeat(b"HTTP/1.1 302 Found\r\nLocation: /next\r\n\r\n", b"x" * 65536), "redirected"
    ),
    # ---- content codings ----
    "gzip": Fault(encoded(b"gzip", gzip.compress(JPEG)), "ok"),
    "x-gzip": Fault(encoded(b"x-gzip", gzip.compress(JPEG)), "ok"),
    "deflate": Fault(encoded(b"deflate", zlib.compress(JPEG)), "ok"),
    "deflate without its header": Fault(encoded(b"deflate", raw_deflate(JPEG)), "ok"),
    "plain, but called gzip": Fault(encoded(b"gzip", JPEG), "ok"),
    "plain, but called br": Fault(encoded(b"br", JPEG), "ok"),
    "plain, but of an unknown coding": Fault(encoded(b"x-foo", JPEG), "ok"),
    "br": Fault(encoded(b"br", b"\x8b\x03\x80" + bytes(30)), "not_image"),
    "torn gzip": Fault(encoded(b"gzip", gzip.compress(JPEG)[:200]), "truncated corrupt"),
    "damaged gzip": Fault(
        encoded(b"gzip", gzip.compress(JPEG)[:50] + bytes(99)), "not_image corrupt truncated"
    ),
    "two codings": Fault(
        encoded(b"gzip, gzip", gzip.compress(gzip.compress(JPEG))), "ok not_image"
    ),
    "gzip bomb": Fault(encoded(b"gzip", gzip.compress(BOMB)), "too_large"),
    "deflate bomb": Fault(encoded(b"deflate", zlib.compress(BOMB)), "too_large"),
    "deflate bomb without its header": Fault(encoded(b"deflate", raw_deflate(BOMB)), "too_large"),
    # ---- time and connections ----
    "silence": Fault(b"", "timeout", "hang"),
    "silence behind the head": Fault(answer(LENGTH, b""), "timeout", "hang"),
    "slow head": Fault(byte_by_byte(WHOLE, 0.1), "timeout"),
    "slow body": Fault(repeat(OK + b"\r\n", b"x", 0.1), "timeout too_slow"),
    "reset at once": Fault(b"", "connection", "reset"),
    "reset in the head": Fault(b"HTTP/1.1 200", "connection protocol", "reset"),
    "reset behind the head": Fault(answer(LENGTH, b""), "connection truncated", "reset"),
    "reset in the body": Fault(WHOLE[:-50], "connection truncated", "reset"),
    "head byte by byte": Fault(byte_by_byte(WHOLE, 0), "ok"),
    "half-closed at once": Fault(b"", "connection", "half"),
    "half-closed in the head": Fault(b"HTTP/1.1 200", "connection protocol", "half"),
    "half-closed in the body": Fault(WHOLE[:-50], "truncated", "half"),
}


class FaultServer:
    """Serves each of the `FAULTS` at `/fault/NAME`, and an image at `/next`. All other paths return status 404."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ")[1].partition(b"?")[0].decode()
                if path.endswith("/next"):
                    length = b"Content-Length: %d\r\n" % len(NEXT_JPEG)
                    writer.write(answer(length, NEXT_JPEG))
                elif path.startswith("/fault/"):
                    fault = FAULTS[path.removeprefix("/fault/").replace("%20", " ")]
                    await self._send(fault.response, writer)
                    await self._end(fault.end, reader, writer)
                else:
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
        # The client has closed the connection.
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.close()

    async def _send(self, response: bytes | Pieces, writer: asyncio.StreamWriter) -> None:
        if isinstance(response, bytes):
            writer.write(response)
            return
        async for piece in response():
            writer.write(piece)
            await writer.drain()
            if writer.is_closing():
                raise ConnectionResetError

    async def _end(
        self, end: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if end == "keep":
            return
        await writer.drain()
        if end == "close":
            writer.close()
        elif end == "half":
            writer.write_eof()
        elif end == "reset":
            # Let the client read what was sent: a reset discards it.
            await asyncio.sleep(0.1)
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        # Do not answer any more. The request after the fault needs another connection.
        await reader.read()
        raise ConnectionResetError


async def fetch_faults() -> dict[str, tuple[FetchResult, FetchResult]]:
    """Request each fault from an address of its own, and then an image from the same address."""
    names = list(FAULTS)
    server = await asyncio.start_server(FaultServer(), "0.0.0.0", 0, limit=1_000_000)
    port = server.sockets[0].getsockname()[1]
    urls: list[str] = []
    for number, name in enumerate(names):
        origin = f"http://127.0.3.{number + 1}:{port}"
        urls += [f"{origin}/fault/{name}", f"{origin}/next"]
    results: dict[int, FetchResult] = {}

    async def fetch() -> None:
        async for row, _, result in fetch_all(enumerate(urls), OPTIONS):
            assert row not in results, "a row must have only one outcome"
            results[row] = result

    async with server:
        await asyncio.wait_for(fetch(), MAX_SECONDS)
    assert len(results) == len(urls), "a row has no outcome"
    return {name: (results[2 * n], results[2 * n + 1]) for n, name in enumerate(names)}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, tuple[FetchResult, FetchResult]]]:
    logger = logging.getLogger("llava_simplified")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield asyncio.run(fetch_faults())
    finally:
        logger.removeHandler(handler)
    assert not messages, "nothing may be logged, because every fault is expected"


@pytest.mark.medium
@pytest.mark.xdist_group("http_faults")
@pytest.mark.parametrize("name", FAULTS)
def test_fault_affects_only_its_own_row(
    outcomes: dict[str, tuple[FetchResult, FetchResult]], name: str
) -> None:
    result, following = outcomes[name]
    kinds = FAULTS[name].kinds.split()
    assert result.kind in ("ok" if kind == "redirected" else kind for kind in kinds), result
    if result.kind == "ok":
        assert result.image is not None
        assert result.image.data == (NEXT_JPEG if kinds == ["redirected"] else JPEG)
    else:
        assert result.image is None
        assert "\0" not in result.detail
    assert following.kind == "ok", following
    assert following.image is not None
    assert following.image.data == NEXT_JPEG
