"""Read the heads of HTTP responses as leniently as curl does, where that is harmless.

aiohttp's parser is as strict as a proxy must be: if clients share a connection, and two programs disagree about where a
response ends, one client can send a forged response to another one. The downloader shares its connections with no other
program, every response belongs to its own request, and every image is decoded before it is kept. So the head of a
response is rewritten before aiohttp's parser reads it:

    status line      HTTP/2 200, http/1.1 200 and HTTP/1.1 200 without a reason become HTTP/1.1 200
    headers          those that are not used are dropped, whatever their number and names
    header lines     may end without a carriage return, continue on the next line, or contain control characters
    Content-Length   may be repeated with the same value, and is ignored with Transfer-Encoding: chunked
    after the body   bytes beyond Content-Length are dropped, and the connection is closed

A response is still rejected if it has no status line (HTTP/0.9), a head of more than 300 kB, more than 100 interim
responses before it, different Content-Lengths, damaged chunks, or a body that ends too early.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aiohttp import ClientPayloadError
from aiohttp.client_proto import ResponseHandler

MAX_HEAD_BYTES = 300_000  # as in curl
MAX_INTERIM_RESPONSES = 100  # 100 Continue, 103 Early Hints; servers send one or two
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(
    rb"[\r\n]*http/(?P<version>[123](?:\.[0-9])?) (?P<status>[0-9]{3})(?P<reason>[ \t].*)?\r?(?=\n|\Z)",
    re.IGNORECASE,
)
_CONTINUED_LINE = re.compile(rb"\r?\n[ \t]+")
_CONTROL_CHARACTERS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_MAX_REASON = 200  # maximum length of a reason in bytes
_MAX_DIGITS = 20  # number of digits of a Content-Length that are read
# The headers that the fetcher or aiohttp reads.
_USED_HEADERS = {
    b"connection",
    b"content-encoding",
    b"content-length",
    b"location",
    b"retry-after",
    b"tdm-reservation",
    b"transfer-encoding",
    b"x-robots-tag",
}
# The lines of these headers must stay separate: a line may begin with the name of a robot, and is only for that robot.
_ONE_PER_LINE = {b"x-robots-tag"}


class LenientResponseHandler(ResponseHandler):
    """aiohttp's protocol of a client connection, with rewritten heads."""

    def __init__(self, loop: Any) -> None:
        super().__init__(loop)
        # The bytes of the current response's head that have arrived; None while no head is expected.
        self._head: bytes | None = None
        # Number of interim responses (status 1xx) to the current request.
        self._num_interim = 0
        # Number of bytes of the body that are still to come; None if its length is not known.
        self._bytes_left: int | None = None
        self._is_draining = False

    def set_response_params(self, **params: Any) -> None:
        """Prepare for the response to the next request."""
        super().set_response_params(**params)
        self._head = b""
        self._num_interim = 0
        self._bytes_left = None

    def _drain_tail(self) -> None:
        # aiohttp calls `data_received` again with bytes that it has held back. They are already rewritten.
        self._is_draining = True
        super()._drain_tail()
        self._is_draining = False

    def data_received(self, data: bytes) -> None:
        """Pass received bytes to aiohttp's parser. The bytes of a head are held back until it is complete."""
        if self._is_draining:
            super().data_received(data)
            return
        if self._head is not None:
            data = self._read_head(self._head, data)
        elif self._bytes_left is not None:
            data = self._cut_body(data)
        if not data:
            return
        super().data_received(data)
        # aiohttp raises this error for code that waits for the head, but not for code that waits for the body.
        error = self.exception()
        if error is not None and self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(ClientPayloadError(f"damaged body: {error}"))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Pass the beginning of an incomplete head to aiohttp, which reports what is missing."""
        if self._head:
            head, self._head = self._head, None
            super().data_received(head)
        super().connection_lost(exc)

    def _cut_body(self, data: bytes) -> bytes:
        """Return the bytes that belong to the body, and drop those after it."""
        assert self._bytes_left is not None
        if len(data) > self._bytes_left:
            data = data[: self._bytes_left]
            self.force_close()
        self._bytes_left -= len(data)
        return data

    def _read_head(self, known: bytes, new: bytes) -> bytes:
        """Return the rewritten head and the bytes of the body after it, or no bytes while the head is incomplete.

        Args:
            known: The part of the head that was received before.
            new: The bytes that were received now.
        """
        data = known + new
        # Do not search the known part again for each new piece, because a head may arrive byte by byte. Only its last
        # 3 bytes can be the beginning of the end mark, which has up to 4 bytes.
        start = max(0, len(known) - 3)
        while True:
            match = _END_OF_HEAD.search(data, start)
            start = 0
            if match is None:
                # The head is too long: pass on the incomplete head, which aiohttp rejects.
                is_too_long = len(data) > MAX_HEAD_BYTES
                self._head = None if is_too_long else data
                return data if is_too_long else b""
            head, data = data[: match.start()], data[match.end() :]
            status = _STATUS_LINE.match(head)
            # Skip interim responses (100 Continue, 103 Early Hints). The response follows them.
            if status is None or not status["status"].startswith(b"1"):
                break
            self._num_interim += 1
            if self._num_interim > MAX_INTERIM_RESPONSES:
                # Replace the head with a text that is not a status line, so that aiohttp rejects the response.
                status, head = None, b"more than %d interim responses" % MAX_INTERIM_RESPONSES
                break
        self._head = None
        # Let aiohttp reject a head without a status line.
        if status is None:
            return head + b"\r\n\r\n" + data
        headers = read_headers(head[status.end() :])
        length = headers.get(b"content-length", b"")
        if status["status"] in (b"204", b"304"):
            # These have no body (RFC 9112, section 6.3). Drop all bytes after the head: they cannot be the next
            # response, because its request has not been sent yet.
            self._bytes_left = 0
        elif length.isdigit():
            self._bytes_left = int(length[:_MAX_DIGITS])
        if self._bytes_left is not None:
            data = self._cut_body(data)
        return _encode_head(status, headers) + data


def read_headers(text: bytes) -> dict[bytes, bytes]:
    """Return the headers that are used, by their names in lower case.

    The values of repeated headers are joined with commas (RFC 9110, section 5.3), with two exceptions: only the first
    `Location` and `Retry-After` are kept, and the headers of `_ONE_PER_LINE` are joined with line feeds.
    """
    headers: dict[bytes, bytes] = {}
    for line in _CONTINUED_LINE.sub(b" ", text).split(b"\n"):
        name, colon, value = line.partition(b":")
        name = name.strip().lower()
        if not colon or name not in _USED_HEADERS:
            continue
        value = _CONTROL_CHARACTERS.sub(b" ", value).strip()
        if name in headers and name in (b"location", b"retry-after"):
            continue
        separator = b"\n" if name in _ONE_PER_LINE else b", "
        headers[name] = headers[name] + separator + value if name in headers else value
    codings = [
        coding.strip().lower() for coding in headers.get(b"transfer-encoding", b"").split(b",")
    ]
    # "identity" means that the body is not encoded, so Content-Length is valid. With any other coding, it is not.
    if codings == [b"identity"]:
        del headers[b"transfer-encoding"]
    elif b"transfer-encoding" in headers:
        headers.pop(b"content-length", None)
    # Keep one of several equal lengths, and let aiohttp reject different ones.
    if b"content-length" in headers:
        lengths = {
            length.strip().removeprefix(b"+") for length in headers[b"content-length"].split(b",")
        }
        if len(lengths) == 1:
            headers[b"content-length"] = lengths.pop()
    return headers


def _encode_head(status: re.Match[bytes], headers: Mapping[bytes, bytes]) -> bytes:
    """Return a head as bytes. All versions become HTTP/1.1, except for 1.0, whose connections are closed by default."""
    version = b"1.0" if status["version"] == b"1.0" else b"1.1"
    reason = _CONTROL_CHARACTERS.sub(b" ", status["reason"] or b"").strip()[:_MAX_REASON]
    lines = [b"HTTP/" + version + b" " + status["status"] + b" " + reason]
    for name, values in headers.items():
        # Write repeated lines once, because aiohttp limits the number of lines.
        lines += [name + b": " + value for value in dict.fromkeys(values.split(b"\n"))]
    return b"\r\n".join(lines) + b"\r\n\r\n"
