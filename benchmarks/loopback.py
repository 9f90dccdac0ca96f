"""A web server on this machine that misbehaves in every way that matters, and knows what it did.

The first part of a URL's path is what happens, the second is which image:
`http://127.0.3.7:8000/ok/123.jpg`. `expected(kind)` is the outcome a downloader should report.

    python benchmarks/loopback.py --port 8000 --latency 0.1 [--tls FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import ssl
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

HOSTS = [f"127.0.{i // 16}.{i % 16 + 1}" for i in range(250)]
EXPECTED = {
    "ok": "ok",
    "png": "ok",
    "webp": "ok",
    "moved": "ok",
    "gzip": "ok",
    "ungzipped": "ok",  # says that it is packed, and is not
    "missing": "http_404",
    "forbidden": "http_403",
    "broken": "http_500",
    "rude": "http_404",  # a reason with a byte that is no UTF-8
    "busy": "http_429",
    "html": "html",
    "empty": "empty",
    "cut": "truncated",  # the body ends before its Content-Length
    "short": "truncated",  # the file ends before the image
    "corrupt": "corrupt",  # bytes changed in mid-scan
    "loop": "redirect",
    "hang": "timeout",
    "drip": "too_slow",
    "reset": "connection",
    "optout": "opt_out",
    "reserved": "opt_out",
    "endless": "too_large",
    "bomb": "too_large",
    "gzipbomb": "too_large",
    "to_file": "scheme",
    "not_http": "protocol",
}
# What the benchmark asks for: the shares are those of an old list of links, hangs kept rare.
MIX = dict(ok=620, png=20, webp=20, moved=60, missing=150, forbidden=30, broken=15, html=40, cut=10)
MIX |= dict(short=10, corrupt=10, reset=5, empty=5, optout=2, hang=3)
POOL = 48


@cache
def images() -> list[bytes]:
    """Photo-like JPEGs, 20 to 130 kB: smooth shapes with fine grain."""
    rng, made = np.random.default_rng(0), []
    for index in range(POOL):
        width, height = [(500, 375), (640, 427), (400, 500), (800, 600), (320, 240), (1024, 683)][
            index % 6
        ]
        small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 9, (height, width, 1)).astype(np.float32)
        buffer = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(
            buffer, "JPEG", quality=80
        )
        made.append(buffer.getvalue())
    return made


def body_of(kind: str, number: int) -> bytes:
    """The bytes that a URL of this kind and number serves, before the connection has its say."""
    return _body(kind, number % POOL)


@cache
def _body(kind: str, number: int) -> bytes:
    data = images()[number]
    if kind in ("png", "webp"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).resize((300, 200)).save(buffer, kind, quality=80)
        return buffer.getvalue()
    if kind == "short":
        return data[: len(data) * 2 // 3]
    if kind == "corrupt":
        middle = len(data) // 2
        return data[:middle] + b"\xff\xd9\x00\xff\xc4" * 3 + data[middle + 15 :]
    if kind == "html":
        return b"<!DOCTYPE html><html><body>This picture has moved.</body></html>"
    if kind == "empty":
        return b""
    return bomb_png(60_000, 60_000) if kind == "bomb" else data


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few kB that says it is 60,000 pixels wide."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = zlib.compress(b"\0" * 1_000_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    )


def expected(kind: str, number: int) -> tuple[str, str]:
    """(outcome, sha256 of the image or "") that a downloader should report."""
    outcome = EXPECTED[kind]
    known = body_of(kind if kind in ("png", "webp") else "ok", number)
    return outcome, hashlib.sha256(known).hexdigest() if outcome == "ok" else ""


_STATUS = {
    "missing": "404 Not Found",
    "forbidden": "403 Forbidden",
    "rude": "404 Non trouv\udce9",
    "broken": "500 Internal Server Error",
    "busy": "429 Too Many Requests",
    "moved": "302 Found",
    "loop": "302 Found",
    "to_file": "302 Found",
    "redirect": "302 Found",
}


class _Handler(asyncio.Protocol):
    latency = 0.1
    served: dict[str, int]  # requests by path
    targets: dict[str, str]  # redirects that a test sets up: /redirect/name -> its location
    requests: list[str]  # as they came, in order

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            request, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
            path = request.split(b" ", 2)[1].decode()
            self.requests.append(request.decode("latin-1"))
            self.served[path] = self.served.get(path, 0) + 1
            self.last = b"\nconnection: close" in request.lower()
            asyncio.get_running_loop().call_later(self.latency, self.answer, path)

    def answer(self, path: str) -> None:
        if self.transport.is_closing():
            return
        kind, _, name = path.strip("/").partition("/")
        number = int(name.partition(".")[0] or 0) if name.partition(".")[0].isdigit() else 0
        if kind == "hang":
            return
        if kind == "reset":
            self.transport.abort()
        elif kind == "not_http":
            self.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        elif kind in ("drip", "endless"):
            length = 100_000 if kind == "drip" else 1 << 40
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
            self.pour(
                b"\xff" if kind == "drip" else b"\xff\xd8\xff" + b"\0" * 200_000,
                length,
                kind == "drip",
            )
        else:
            self.respond(kind, number, name)

    def respond(self, kind: str, number: int, name: str) -> None:
        status = _STATUS.get(kind, "200 OK")
        body = b"no image here" if kind in _STATUS else body_of(kind, number)
        extra = {
            "optout": "X-Robots-Tag: noai, noimageai, \udce9\r\n",
            "reserved": "TDM-Reservation: 1\r\n",
            "busy": f"Retry-After: {number}\r\n",
            "moved": f"Location: /ok/{number}.jpg\r\n",
            "loop": f"Location: /loop/{number + 1}.jpg\r\n",
            "to_file": "Location: file:///etc/passwd\r\n",
            "redirect": f"Location: {self.targets.get(name, '')}\r\n",
        }.get(kind, "")
        if kind == "robots.txt":
            body = self.targets.get("robots", "").encode()
        if kind in ("gzip", "gzipbomb"):
            body = zlib.compress(b"\0" * 60_000_000 if kind == "gzipbomb" else body)
        if kind in ("gzip", "ungzipped", "gzipbomb"):
            extra = "Content-Encoding: deflate\r\n"
        content = "text/html" if kind == "html" else "image/jpeg"
        extra += "Connection: close\r\n" if self.last else ""
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content}\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        if kind == "cut":
            body = body[: len(body) // 2]
        self.transport.write(head.encode(errors="surrogateescape") + body)
        if kind == "cut" or self.last:
            self.transport.close()

    def pour(self, piece: bytes, left: int, slowly: bool) -> None:
        if not self.transport.is_closing() and left > 0:
            self.transport.write(piece)
            wait = 1.0 if slowly else 0.001
            asyncio.get_running_loop().call_later(wait, self.pour, piece, left - len(piece), slowly)


async def start(
    host: str | None, port: int, latency: float, context: ssl.SSLContext | None = None
) -> tuple[asyncio.Server, type[_Handler]]:
    """A server and its handler class, whose `served` counts requests."""
    handler = type(
        "Handler", (_Handler,), {"latency": latency, "served": {}, "targets": {}, "requests": []}
    )
    loop = asyncio.get_running_loop()
    server = await loop.create_server(handler, host, port, ssl=context, backlog=4096)
    return server, handler


def make_certificate(folder: Path) -> Path:
    """A throw-away certificate for every host of this server; to be trusted through SSL_CERT_FILE."""
    certificate, names = folder / "cert.pem", ",".join(f"IP:{host}" for host in HOSTS)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", "/CN=loopback", "-addext", f"subjectAltName={names}",
         "-keyout", str(folder / "key.pem"), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate


def trust_store(folder: Path) -> Path:
    """What a machine trusts, and the throw-away certificate: one alone would make contexts cheaper than they are."""
    store, usual = folder / "trusted.pem", ssl.get_default_verify_paths().cafile
    store.write_text(
        make_certificate(folder).read_text() + (Path(usual).read_text() if usual else "")
    )
    return store


@contextmanager
def running(latency: float = 0.1, tls: Path | None = None) -> Iterator[int]:
    """The server in a process of its own; yields its port."""
    command = [sys.executable, str(Path(__file__).resolve()), "--latency", str(latency)]
    process = subprocess.Popen(
        [*command, *(["--tls", str(tls)] if tls else [])], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def urls(
    count: int, port: int, scheme: str = "http", mix: dict[str, int] = MIX
) -> list[tuple[str, str, int]]:
    """(url, kind, number), mixed by `mix`, over all hosts."""
    rng = np.random.default_rng(1)
    kinds = rng.choice(list(mix), size=count, p=np.array(list(mix.values())) / sum(mix.values()))
    return [
        (f"{scheme}://{HOSTS[i % len(HOSTS)]}:{port}/{kind}/{i}.jpg", str(kind), i)
        for i, kind in enumerate(kinds)
    ]


async def _serve(arguments: argparse.Namespace, told: Callable[[int], None]) -> None:
    context = None
    if arguments.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(arguments.tls / "cert.pem", arguments.tls / "key.pem")
    for kind in EXPECTED:
        for index in range(POOL):
            body_of(kind, index)
    server, _ = await start("0.0.0.0", arguments.port, arguments.latency, context)
    told(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--tls", type=Path)
    asyncio.run(_serve(parser.parse_args(), lambda port: print(port, flush=True)))
