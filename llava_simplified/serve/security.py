"""Middleware for security: API key, allowed hosts and origins, and response headers."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_simplified.serve.errors import error_response

# Paths that do not require the API key. The page contains no secrets, and asks the user for the key.
PUBLIC_PATHS = frozenset(
    {
        "/health",
        "/",
        "/page.css",
        "/page.json",
        "/page.js",
        "/page_attention.js",
        "/page_client.js",
        "/page_image.js",
    }
)

# A host name or an IP literal (IPv6 in brackets), optionally followed by a port.
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_ORIGIN = re.compile(r"(https?)://([^/?#@]+)", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}

# Default headers of every response. A response may replace them; the page has its own
# Content-Security-Policy.
SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def split_authority(text: str) -> tuple[str, int | None]:
    """Split `host:port` into the host in lower case and the port. Without a port, return None in its place.

    Raises:
        ValueError: The host is neither a host name nor an IP literal, or the port is above 65535.
    """
    match = _AUTHORITY.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a host name")
    port = int(match[2]) if match[2] else None
    if port is not None and port > 65535:
        raise ValueError(f"{text!r}: the port must be at most 65535")
    host = match[1].lower().removesuffix(".")  # "localhost." is the same name, fully qualified
    if not host:
        raise ValueError(f"{text!r} is not a host name")
    return host, port


def check_host_names(names: Iterable[str]) -> None:
    """Raise ValueError unless each value of `--allowed-hosts` is a host name, without a port."""
    for name in names:
        try:
            _, port = split_authority(name)
        except ValueError:
            port = 0  # any number but None, so that the name is rejected below
        if port is not None:
            raise ValueError(
                f"--allowed-hosts {name}: expected a host name such as llava.example.org, "
                "without scheme, port or wildcard"
            )


class SecurityHeaders:
    """Add `SECURITY_HEADERS` to every response that does not set them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers)


# Every web page that is open in a browser on the same network could send requests to a server on a private
# address. Two checks prevent this:
#
# - Requests for foreign host names are rejected. In DNS rebinding, a page at `evil.example` changes the
#   address of its own name to 127.0.0.1. The browser then treats the server as part of that page's site, but
#   still sends `Host: evil.example`.
# - Requests with a foreign `Origin` are rejected. Browsers send this header with every POST of a page.


class HostCheck:
    """Reject requests for foreign hosts and from foreign origins.

    `Host` must be an IP literal, `localhost`, a subdomain of `localhost`, the name of this machine, or one
    of `allowed_hosts`. IP literals are safe, since no DNS lookup is involved. `Origin`, if present, must
    have the same host and port. Only `/health` accepts any origin.

    Args:
        app: The protected application.
        allowed_hosts: Additional host names.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str] = ()) -> None:
        self.app = app
        names = {*allowed_hosts, socket.gethostname()}
        self._allowed = {name.lower().removesuffix(".") for name in names if name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            try:
                self._check(scope)
            except HTTPException as error:
                app = error_response(error)
        await app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raise HTTPException if the request must be rejected."""
        headers = Request(scope).headers
        # Reject several Host headers: a proxy may have checked a different one than this server would use.
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise HTTPException(400, f"Expected one Host header, got {len(hosts)}.")
        try:
            host, port = split_authority(hosts[0])
        except ValueError as error:
            raise HTTPException(400, f"The Host header is malformed: {error}.") from None
        if not self._is_allowed(host):
            raise HTTPException(
                421,
                f"Requests for the host {host!r} are not allowed. To allow them, start the server with "
                f"--allowed-hosts {host}.",
            )
        # Accept requests without Origin, which come from clients other than browsers. Accept any origin for
        # /health, which monitoring pages may request.
        origins = headers.getlist("origin")
        if origins and scope["path"] != "/health":
            is_same = len(origins) == 1 and _is_same_origin(origins[0], host, port)
            if not is_same:
                raise HTTPException(
                    403, "Requests from web pages of other origins are not allowed."
                )

    def _is_allowed(self, host: str) -> bool:
        """Return whether requests for this host are allowed."""
        if host == "localhost" or host.endswith(".localhost") or host in self._allowed:
            return True
        try:
            ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True


def _is_same_origin(origin: str, host: str, port: int | None) -> bool:
    """Return whether an Origin header names this host and port.

    The scheme is not compared: with a proxy that terminates TLS, the page uses https and the server http.
    """
    match = _ORIGIN.fullmatch(origin)
    if not match:  # "null", or a scheme such as chrome-extension://
        return False
    default_port = _DEFAULT_PORTS[match[1].lower()]
    try:
        origin_host, origin_port = split_authority(match[2])
    except ValueError:
        return False
    return (origin_host, origin_port or default_port) == (host, port or default_port)


class KeyCheck:
    """Reject requests without the API key, except those for `PUBLIC_PATHS`.

    Args:
        app: The protected application.
        key: The key that `Authorization: Bearer KEY` must contain.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        needs_key = scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS
        if needs_key and not self._has_key(scope):
            headers = {"www-authenticate": "Bearer"}
            message = (
                "The API key is missing or wrong. Send it in the header Authorization: Bearer KEY."
            )
            app = error_response(HTTPException(401, message, headers))
        await app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        """Return whether a request contains the API key."""
        header = Request(scope).headers.get("authorization", "")
        scheme, _, key = header.partition(" ")
        # Compare in constant time, so that the duration reveals nothing about the key. Starlette decodes headers as
        # Latin-1, so encode as Latin-1 to get the original bytes. Strip only ASCII white space: decoded as Latin-1,
        # a byte of a UTF-8 character may look like white space.
        is_equal = hmac.compare_digest(key.strip(" \t").encode("latin-1"), self._key)
        return scheme.lower() == "bearer" and is_equal
