"""A local web server with all faults of real servers that a downloader must handle. It counts the requests.

In a URL such as `http://127.0.3.7:8000/ok/123.jpg`, the first part of the path selects the kind of response, and the
second part the image. `expected(kind, number)` is the outcome that a downloader should report.

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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# All addresses in 127.0.0.0/8 are this machine. Use many of them as hosts, so that a downloader's limits per host do not
# determine its speed.
HOSTS = [f"127.0.{i // 16}.{i % 16 + 1}" for i in range(250)]
# Kind of response -> the outcome that a downloader should report.
EXPECTED = {
    "ok": "ok",
    "png": "ok",
    "webp": "ok",
    "moved": "ok",
    "deflate": "ok",
    "not_deflated": "ok",  # the header Content-Encoding is set, but the body is not encoded
    "missing": "http_404",
    "forbidden": "http_403",
    "broken": "http_500",
    "rude": "http_404",  # the reason phrase is not UTF-8
    "busy": "http_429",
    "html": "html",
    "empty": "empty",
    "cut": "truncated",  # the body is shorter than its Content-Length
    "short": "truncated",  # the body is complete, but it is a truncated file
    "corrupt": "corrupt",  # some bytes of the compressed pixels are changed
    "loop": "redirect",
    "hang": "timeout",
    "drip": "too_slow",  # one byte per second
    "reset": "connection",
    "optout": "opt_out",  # the header X-Robots-Tag
    "reserved": "opt_out",  # the header TDM-Reservation
    "endless": "too_large",
    "bomb": "too_large",  # a small file of a huge image
    "deflatebomb": "too_large",  # a small body that is huge when decoded
    "to_file": "scheme",  # a redirect to a file: URL
    "not_http": "protocol",  # the answer of an SSH server
}
# How often the benchmark requests each kind (relative weights). This is similar to an old list of URLs, but with fewer
# hanging URLs, so that a run does not consist of waiting for them.
MIX = {
    "ok": 620,
    "png": 20,
    "webp": 20,
    "moved": 60,
    "missing": 150,
    "forbidden": 30,
    "broken": 15,
    "html": 40,
    "cut": 10,
    "short": 10,
    "corrupt": 10,
    "reset": 5,
    "empty": 5,
    "optout": 2,
    "hang": 3,
}
POOL = 48  # number of different images
SIZES = [(500, 375), (640, 427), (400, 500), (800, 600), (320, 240), (1024, 683)]


# ---- bodies ----


def images() -> list[bytes]:
    """Return photo-like JPEGs of 20 to 130 kB: smooth shapes with fine grain."""
    return [_image(number) for number in range(POOL)]


@cache
def _image(number: int) -> bytes:
    """Return one of the `POOL` images. Each has its own random generator, so that no other has to be drawn for it."""
    random = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    coarse = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    resized = coarse.resize((width, height), Image.Resampling.BICUBIC)
    smooth = np.asarray(resized, np.float32)
    grain = 9 * random.standard_normal((height, width, 1), dtype=np.float32)
    pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def body_of(kind: str, number: int) -> bytes:
    """Return the complete body of the response to a URL. Faults of the connection may shorten it later."""
    return _body(kind, number % POOL)


@cache
def _body(kind: str, number: int) -> bytes:
    """Return the body for one of the `POOL` images."""
    data = _image(number)
    if kind in ("png", "webp"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).resize((300, 200)).save(buffer, kind, quality=80)
        return buffer.getvalue()
    if kind == "short":
        return data[: len(data) * 2 // 3]
    if kind == "corrupt":
        # Overwrite bytes in the middle of the compressed pixels with end-of-image markers and starts of tables.
        middle = len(data) // 2
        return data[:middle] + b"\xff\xd9\x00\xff\xc4" * 3 + data[middle + 15 :]
    if kind == "html":
        return b"<!DOCTYPE html><html><body>This picture has moved.</body></html>"
    if kind == "empty":
        return b""
    if kind == "bomb":
        return bomb_png(60_000, 60_000)
    return data


def bomb_png(width: int, height: int) -> bytes:
    """Return a PNG of a few kB whose header claims a huge size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = zlib.compress(b"\0" * 1_000_000)
    chunks = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", lines) + _png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file: length, kind, data and checksum."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def expected(kind: str, number: int) -> tuple[str, str]:
    """Return the outcome that a downloader should report, and the SHA-256 of the image ("" for a failure)."""
    outcome = EXPECTED[kind]
    if outcome != "ok":
        return outcome, ""
    # After redirects and decoding, the bytes are those of the kind "ok".
    body = body_of(kind if kind in ("png", "webp") else "ok", number)
    return outcome, hashlib.sha256(body).hexdigest()


# ---- server ----


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
    """One connection.

    These attributes are shared by all connections of a server, because `start` creates a subclass for each server.

    Attributes:
        latency: Seconds between a request and its response.
        served: Path -> number of requests.
        targets: Set by tests: NAME -> location to which /redirect/NAME redirects; "robots" -> content of robots.txt.
        requests: The heads of all requests, in the order of their arrival.
    """

    latency = 0.1
    served: dict[str, int]
    targets: dict[str, str]
    requests: list[str]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with an empty buffer."""
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        """Schedule the response to every complete request, after the latency."""
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            request, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
            path = request.split(b" ", 2)[1].decode()
            self.requests.append(request.decode("latin-1"))
            self.served[path] = self.served.get(path, 0) + 1
            self.closes = b"\nconnection: close" in request.lower()
            asyncio.get_running_loop().call_later(self.latency, self.answer, path)

    def answer(self, path: str) -> None:
        """Send the kind of response that the first part of the path selects."""
        if self.transport.is_closing():
            return
        kind, _, name = path.strip("/").partition("/")
        stem, _, _ = name.partition(".")
        number = int(stem) if stem.isdigit() else 0
        if kind == "hang":
            return  # keep the connection open, and send nothing
        if kind == "reset":
            self.transport.abort()
        elif kind == "not_http":
            self.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        elif kind == "drip":
            self.start_image()
            self.pour(b"\xff", left=100_000, pause=1.0)
        elif kind == "endless":
            self.start_image()
            self.pour(b"\xff\xd8\xff" + b"\0" * 200_000, left=1 << 40, pause=0.001)
        else:
            self.respond(kind, number, name)

    def start_image(self) -> None:
        """Write the head of a response of unknown length."""
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")

    def respond(self, kind: str, number: int, name: str) -> None:
        """Write a complete response, or half of its body for the kind "cut"."""
        status = _STATUS.get(kind, "200 OK")
        body = self.encoded_body(kind, number)
        headers = self.extra_headers(kind, number, name)
        content_type = "text/html" if kind == "html" else "image/jpeg"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{headers}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        if kind == "cut":
            body = body[: len(body) // 2]
        # "\udce9" in a header becomes the byte E9, which is not UTF-8.
        self.transport.write(head.encode(errors="surrogateescape") + body)
        if kind == "cut" or self.closes:
            self.transport.close()

    def encoded_body(self, kind: str, number: int) -> bytes:
        """Return the body with its Content-Encoding applied."""
        if kind == "robots.txt":
            return self.targets.get("robots", "").encode()
        if kind in _STATUS:
            return b"no image here"
        if kind == "deflate":
            return zlib.compress(body_of(kind, number))
        if kind == "deflatebomb":
            return zlib.compress(b"\0" * 60_000_000)
        return body_of(kind, number)

    def extra_headers(self, kind: str, number: int, name: str) -> str:
        """Return the header lines that only some kinds have."""
        headers = {
            "optout": "X-Robots-Tag: noai, noimageai, \udce9\r\n",
            "reserved": "TDM-Reservation: 1\r\n",
            "busy": f"Retry-After: {number}\r\n",
            "moved": f"Location: /ok/{number}.jpg\r\n",
            "loop": f"Location: /loop/{number + 1}.jpg\r\n",
            "to_file": "Location: file:///etc/passwd\r\n",
            "redirect": f"Location: {self.targets.get(name, '')}\r\n",
            "deflate": "Content-Encoding: deflate\r\n",
            "not_deflated": "Content-Encoding: deflate\r\n",
            "deflatebomb": "Content-Encoding: deflate\r\n",
        }
        extra = headers.get(kind, "")
        if self.closes:
            extra += "Connection: close\r\n"
        return extra

    def pour(self, piece: bytes, left: int, pause: float) -> None:
        """Write a piece repeatedly, until `left` bytes have been written or the client has disconnected."""
        if self.transport.is_closing() or left <= 0:
            return
        self.transport.write(piece)
        loop = asyncio.get_running_loop()
        loop.call_later(pause, self.pour, piece, left - len(piece), pause)


async def start(
    host: str | None, port: int, latency: float, context: ssl.SSLContext | None = None
) -> tuple[asyncio.Server, type[_Handler]]:
    """Start a server; return it and its handler class, whose `served` counts requests."""
    attributes = {"latency": latency, "served": {}, "targets": {}, "requests": []}
    handler = type("Handler", (_Handler,), attributes)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(handler, host, port, ssl=context, backlog=4096)
    return server, handler


def make_certificate(folder: Path) -> Path:
    """Write a temporary certificate for all hosts of this server, and return its path."""
    certificate = folder / "cert.pem"
    names = ",".join(f"IP:{host}" for host in HOSTS)
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=loopback"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", f"subjectAltName={names}"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate


def trust_store(folder: Path) -> Path:
    """Write a file for SSL_CERT_FILE: the temporary certificate, and those that this machine trusts.

    Loading hundreds of trusted certificates is a cost of real TLS connections, which the measurement must include.
    """
    store = folder / "trusted.pem"
    certificates = make_certificate(folder).read_text()
    usual = ssl.get_default_verify_paths().cafile
    if usual:
        certificates += Path(usual).read_text()
    store.write_text(certificates)
    return store


@contextmanager
def running(
    latency: float = 0.1, tls: Path | None = None, encode_first: bool = True
) -> Iterator[int]:
    """Run the server in a separate process, and yield its port.

    Args:
        latency: Seconds between a request and its response.
        tls: Folder of a certificate, for https.
        encode_first: Encode all images before the first request, so that encoding does not slow the server down while
            a downloader is measured. Otherwise, an image is encoded when it is first requested.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--latency", str(latency)]
    if tls:
        command += ["--tls", str(tls)]
    if encode_first:
        command.append("--encode-first")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def urls(
    count: int, port: int, scheme: str = "http", mix: dict[str, int] = MIX
) -> list[tuple[str, str, int]]:
    """Return (URL, kind, number) of each URL. They are spread over all hosts, and the kinds have the weights of `mix`."""
    random = np.random.default_rng(1)
    weights = np.array(list(mix.values()))
    kinds = random.choice(list(mix), size=count, p=weights / weights.sum())
    jobs = []
    for number, kind in enumerate(kinds):
        host = HOSTS[number % len(HOSTS)]
        jobs.append((f"{scheme}://{host}:{port}/{kind}/{number}.jpg", str(kind), number))
    return jobs


async def serve(args: argparse.Namespace) -> None:
    """Serve until this process is killed; print the port when the server is ready."""
    context = None
    if args.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(args.tls / "cert.pem", args.tls / "key.pem")
    if args.encode_first:
        # Fill the cache of `_body`.
        for kind in EXPECTED:
            for number in range(POOL):
                body_of(kind, number)
    server, _ = await start("0.0.0.0", args.port, args.latency, context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="Port; 0 selects a free one")
    parser.add_argument(
        "--latency", type=float, default=0.1, help="Seconds between a request and its response"
    )
    parser.add_argument("--tls", type=Path, help="Folder with cert.pem and key.pem, for https")
    parser.add_argument(
        "--encode-first", action="store_true", help="Encode all images before the first request"
    )
    asyncio.run(serve(parser.parse_args()))
