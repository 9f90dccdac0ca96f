"""Fetch one image from a URL safely, and classify every failure.

In addition to errors of the network, a fetch fails

    before the request      for schemes other than http and https; if robots.txt forbids it and --robots is set
    when connecting         to addresses that are not public (see `address_guard`)
    after the headers       for statuses other than 200, and if the server opts out of training
    while the body streams  if the body is too large (also after decompression) or too slow
    after the transfer      if the body cannot be decoded as an image in time (see `decode_pool`)

Redirects are checked in the same way.

The URL is sent unchanged (see `request_url`). Responses are parsed as leniently as curl parses them, where that is
harmless (see `lenient_response`).

`fetch_hosts` uses this module for lists of URLs. `llava serve` uses it for the image URLs in requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import ssl
import sys
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import aiohttp
from yarl import URL

from llava_simplified.data.images import EncodedImage, ImageError, check_image, shrink_image
from llava_simplified.prepare.address_guard import ADDRESS_REFUSED, guard_address
from llava_simplified.prepare.decode_pool import DecodePool
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prepare.lenient_response import MAX_HEAD_BYTES, LenientResponseHandler
from llava_simplified.prepare.request_url import UrlError, parse_url, resolve_redirect
from llava_simplified.prepare.robots import RobotsRules

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

logger = logging.getLogger(__name__)

# Before Python 3.11, asyncio.TimeoutError and the built-in TimeoutError are different classes.
TIMEOUT_ERRORS = (TimeoutError, asyncio.TimeoutError)
AGENT = "llava-simplified"
MAX_REDIRECTS = 5
# After this many timeouts in a row, ban a host. Otherwise a host that is down would cost one timeout per URL.
MAX_CONSECUTIVE_TIMEOUTS = 10
SLOW_AFTER = 3.0  # seconds after which the average rate of a body is checked
SLOW_RATE = 1000  # minimum average rate of a body, in bytes per second
MAX_DETAIL_LENGTH = 300
# A redirect gets only the time that the requests before it have left over. If that is less than this share of the
# timeout, a timeout is not counted against the host of the redirect, because that host may have had too little time.
FAIR_SHARE = 0.5

_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
# Values of zlib's `wbits`, which select the format. Some servers send "deflate" data without the zlib header that the
# standard requires, because browsers accept it.
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS  # detect the format by its header
_NO_HEADER = -zlib.MAX_WBITS
_CLOSE_CONNECTION = {"Connection": "close"}
_ROBOTS_TIMEOUT = 5  # seconds
_ROBOTS_MAX_BYTES = 500_000  # RFC 9309 requires at least 500 KiB
_OPT_OUT_DIRECTIVES = {"noai", "noimageai", "noindex", "noimageindex", "noml", "none"}


class FetchError(Exception):
    """The reason why no image could be fetched from a URL.

    Attributes:
        kind: One of `FAILURE_KINDS`, or http_NNN.
        http: Status code of the response; 0 if there was none.
        pause: Seconds to wait, as requested by the server (`Retry-After`), or None.
    """

    def __init__(self, kind: str, detail: str, http: int = 0, pause: float | None = None) -> None:
        super().__init__(detail)
        self.kind = kind
        self.http = http
        self.pause = pause


class FetchResult(NamedTuple):
    """The outcome of one URL.

    Attributes:
        kind: "ok", or the kind of the failure.
        http: Status code of the response; 0 if there was none.
        detail: Description of the failure.
        image: The image, or None after a failure.
        received: Size of the received image file in bytes, before the image was shrunk.
        seconds: Duration of the fetch.
        pause: Seconds to wait, as requested by the server (`Retry-After`), or None.
    """

    kind: str
    http: int
    detail: str
    image: EncodedImage | None = None
    received: int = 0
    seconds: float = 0.0
    pause: float | None = None


@dataclass
class _HostState:
    """The state that all URLs of a host share, including redirects to it. Times are on the monotonic clock.

    Attributes:
        slots: Limits the number of requests in flight.
        users: Number of URLs that hold a slot or wait for one.
        consecutive_timeouts: Number of timeouts since the last response.
        banned_until: End of the ban that the last timeout would start or extend; see `MAX_CONSECUTIVE_TIMEOUTS`.
        paused_until: End of the pause that the host has requested; only for hosts that a redirect led to.
    """

    slots: asyncio.Semaphore
    users: int = 0
    consecutive_timeouts: int = 0
    banned_until: float = 0.0
    paused_until: float = 0.0


class Fetcher:
    """A pool of connections with the rules of this module. Use it as an async context manager.

    Args:
        options: Options of the requests.
        ban_seconds: Duration of the ban of a host after `MAX_CONSECUTIVE_TIMEOUTS`, and maximum duration of a pause that
            the target of a redirect requests. By default, both are unlimited, which suits a download. A server runs for
            months, so its bans must end.
    """

    def __init__(self, options: FetchOptions, ban_seconds: float = math.inf) -> None:
        self.options = options
        self._ban_seconds = ban_seconds
        contact = f"(+{options.contact})" if options.contact else "(image dataset research)"
        self._headers = {
            "User-Agent": f"{AGENT}/{version('llava-simplified')} {contact}",
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",  # images are compressed already
        }
        # One task per origin, so that robots.txt is read once for all URLs of an origin. The result is an error if the
        # file cannot be read; the task does not raise it, because every URL of the origin needs an error of its own.
        self._robots: dict[URL, asyncio.Task[RobotsRules | FetchError]] = {}
        self._hosts: dict[str, _HostState] = {}  # without idle hosts, see `_is_idle`
        self._next_cleanup = 0.0  # on the monotonic clock

    async def __aenter__(self) -> Fetcher:
        guard = None if self.options.allow_private else guard_address
        # Do not limit connections in the connector: `fetch_hosts` and the slots of each host limit them. Cache DNS
        # answers for ten minutes, since most hosts occur many times in a shard.
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=600, socket_factory=guard)
        loop = asyncio.get_running_loop()
        connector._factory = partial(LenientResponseHandler, loop=loop)  # type: ignore[assignment]
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None),  # `_get` has its own timeout
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            auto_decompress=False,  # `_decompress` limits the size
        )
        self._decode_pool = DecodePool(self.options.timeout, self.options.max_pixels)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._decode_pool.close()
        await self._session.close()

    async def fetch(self, url: str, last: bool = False) -> FetchResult:
        """Fetch and check one image. Every failure is returned as a result, even an internal error.

        Args:
            url: The URL.
            last: This is the last request to the host, so its connection (100 kB with TLS) can be closed.
        """
        start = time.perf_counter()
        try:
            data, http = await self._get(url, _CLOSE_CONNECTION if last else None)
            image = await self._check(data)
            return FetchResult(
                "ok",
                http,
                detail="",
                image=image,
                received=len(data),
                seconds=time.perf_counter() - start,
            )
        except FetchError as error:
            failure = error
        # The request succeeded, but the response is not a usable image.
        except ImageError as error:
            failure = FetchError(error.kind, str(error), http=200)
        except UrlError as error:
            failure = FetchError(error.kind, str(error))
        except TIMEOUT_ERRORS as error:
            detail = str(error) or f"not finished in {self.options.timeout:g} s"
            failure = FetchError("timeout", detail)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = FetchError(name_failure(error), f"{type(error).__name__}: {error}")
        # Catch errors of this package or of a library too, so that only this row fails.
        except Exception as error:
            logger.exception("internal error while fetching %s", url)
            failure = FetchError("internal", f"{type(error).__name__}: {error}")
        # Replace bytes that are not UTF-8: headers may contain any bytes, but the journal is a UTF-8 file.
        detail = str(failure)[:MAX_DETAIL_LENGTH].encode(errors="replace").decode()
        seconds = time.perf_counter() - start
        return FetchResult(failure.kind, failure.http, detail, seconds=seconds, pause=failure.pause)

    async def _check(self, data: bytes) -> EncodedImage:
        """Decode the image, and shrink it if `options.resize` is set."""
        options = self.options

        def decode(file: bytes) -> EncodedImage:
            if options.resize:
                return shrink_image(file, options.resize, options.max_pixels)
            return check_image(file, options.max_pixels)

        return await self._decode_pool.run(decode, data)

    async def _get(self, text: str, headers: dict[str, str] | None) -> tuple[bytes, int]:
        """Return body and status code of a URL, following redirects.

        Every redirect is checked like the original URL. `timeout` covers all requests together, but not the time that
        the URL waits for a free slot of a host, which may be long if many hosts redirect to the same one.
        """
        url = parse_url(text)
        first_name = str(url.raw_host)
        seconds_left = self.options.timeout
        for _ in range(MAX_REDIRECTS + 1):
            if self.options.robots:
                await self._check_robots(url)
            name = str(url.raw_host)
            is_redirected = name != first_name
            # Acquire a slot for every redirect, because it may lead to a different host.
            async with self._slot(name) as host:
                start = time.monotonic()
                self._check_ban(host, name, start)
                # `fetch_hosts` waits if the host of the URL requests a pause. Check here only the hosts of redirects.
                if is_redirected and host.paused_until > start:
                    raise FetchError("rate_limited", f"not requested: {name} has requested a pause")
                try:
                    # Do not use `asyncio.wait_for`, which can lose a cancellation before Python 3.12.
                    async with timeout(seconds_left):
                        answer = await self._request(url, headers)
                except TIMEOUT_ERRORS:
                    if seconds_left >= FAIR_SHARE * self.options.timeout:
                        host.consecutive_timeouts += 1
                        host.banned_until = time.monotonic() + self._ban_seconds
                    raise
                except FetchError as error:
                    if error.pause is not None and is_redirected:
                        pause = min(error.pause, self._ban_seconds)
                        host.paused_until = time.monotonic() + pause
                        error.pause = None
                    raise
                # Subtract only the time of the request, and not the time that it waited for the slot.
                seconds_left -= time.monotonic() - start
            if not isinstance(answer, URL):
                return answer
            url = answer
        raise FetchError("redirect", f"more than {MAX_REDIRECTS} redirects", http=302)

    @contextlib.asynccontextmanager
    async def _slot(self, name: str) -> AsyncIterator[_HostState]:
        """Hold one of the slots of a host, and forget the host afterward if it is idle.

        In `llava serve`, clients choose the hosts, so their number must not grow without limit.
        """
        now = time.monotonic()
        if now >= self._next_cleanup:
            self._next_cleanup = now + self._ban_seconds
            self._hosts = {
                name: host for name, host in self._hosts.items() if not self._is_idle(host)
            }
        host = self._hosts.setdefault(name, _HostState(asyncio.Semaphore(self.options.per_host)))
        host.users += 1
        try:
            async with host.slots:
                yield host
        finally:
            host.users -= 1
            if self._is_idle(host):
                del self._hosts[name]

    def _is_idle(self, host: _HostState) -> bool:
        """Return whether a host has no users, and there is nothing to remember about it."""
        if host.users:
            return False
        remember_until = host.paused_until
        if host.consecutive_timeouts:
            # Remember the timeouts beyond the ban, so that `_check_ban` then allows one request only.
            remember_until = max(remember_until, host.banned_until + self._ban_seconds)
        return time.monotonic() >= remember_until

    def _check_ban(self, host: _HostState, name: str, now: float) -> None:
        """Raise FetchError if a host is banned. When a ban ends, allow one request, which shows whether it is up."""
        if host.consecutive_timeouts < MAX_CONSECUTIVE_TIMEOUTS:
            return
        if now < host.banned_until:
            raise FetchError(
                "timeout",
                f"not requested: the last {MAX_CONSECUTIVE_TIMEOUTS} requests to {name} timed out",
            )
        host.banned_until = now + self._ban_seconds

    async def _request(self, url: URL, headers: dict[str, str] | None) -> URL | tuple[bytes, int]:
        """Send one request. Return the target of a redirect, or body and status code."""
        async with self._session.get(url, allow_redirects=False, headers=headers) as response:
            # Reset the count of timeouts after any response.
            self._hosts[str(url.raw_host)].consecutive_timeouts = 0
            if response.status in _REDIRECT_STATUSES:
                location = response.headers.get("Location")
                if not location:
                    raise FetchError("redirect", "redirect without a target", http=response.status)
                return resolve_redirect(url, location)
            if response.status != 200:
                pause = parse_retry_after(response.headers.get("Retry-After"))
                kind = f"http_{response.status}"
                raise FetchError(kind, str(response.reason), http=response.status, pause=pause)
            # Check for an opt-out before reading the body, to avoid a useless transfer.
            reason = opted_out(response.headers)
            if reason:
                raise FetchError("opt_out", reason, http=response.status)
            return await self._read_body(response), response.status

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        """Return the body; raise FetchError as soon as it is too large or too slow."""
        max_bytes = self.options.max_bytes
        announced = response.content_length or 0
        if announced > max_bytes:
            raise FetchError(
                "too_large",
                f"Content-Length is {announced} bytes; the limit is {max_bytes}",
                http=200,
            )
        chunks: list[bytes] = []
        size = 0
        start = time.perf_counter()
        async for chunk in response.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise FetchError("too_large", f"over {max_bytes} bytes", http=200)
            seconds = time.perf_counter() - start
            if seconds > SLOW_AFTER and size < SLOW_RATE * seconds:
                raise FetchError("too_slow", f"{size} bytes in {seconds:.1f} s", http=200)
        # Join the chunks once: appending to one bytes object would copy it for every chunk.
        data = _decompress(b"".join(chunks), response, max_bytes)
        if len(data) > max_bytes:
            raise FetchError("too_large", f"over {max_bytes} bytes when decompressed", http=200)
        if not data:
            raise FetchError("empty", "no bytes", http=200)
        return data

    # ---- robots.txt ----

    async def _check_robots(self, url: URL) -> None:
        """Raise FetchError if robots.txt does not allow a request. The file is read once per origin (scheme, host, port)."""
        origin = url.origin()
        if origin not in self._robots:
            self._robots[origin] = asyncio.create_task(self._read_robots(origin))
        # Shield the task, which other URLs wait for too: a timeout of this URL must not cancel it.
        rules = await asyncio.shield(self._robots[origin])
        if isinstance(rules, FetchError):
            raise FetchError(rules.kind, str(rules))
        if not rules.allow(url.raw_path_qs):
            raise FetchError("robots", f"robots.txt of {url.raw_host} forbids it")

    async def _read_robots(self, origin: URL) -> RobotsRules | FetchError:
        """Read the robots.txt of an origin (RFC 9309).

        A missing file (4xx) allows everything. If the server cannot be reached or reports an error (5xx), nothing may be
        requested; then the reason is returned.
        """
        try:
            async with timeout(_ROBOTS_TIMEOUT):
                lines = await self._read_robots_lines(origin / "robots.txt")
        except FetchError as error:
            return error
        except TIMEOUT_ERRORS:
            return FetchError("timeout", f"robots.txt was not received in {_ROBOTS_TIMEOUT} s")
        except (aiohttp.ClientError, OSError) as error:
            return FetchError(name_failure(error), f"robots.txt: {type(error).__name__}: {error}")
        # A redirect to something that is not a URL. The URL of the image may be valid.
        except ValueError as error:
            return FetchError("robots", f"robots.txt: {error}")
        return RobotsRules(lines, AGENT)

    async def _read_robots_lines(self, url: URL) -> list[str]:
        """Return the lines of a robots.txt file, after at most `MAX_REDIRECTS` redirects."""
        for _ in range(MAX_REDIRECTS + 1):
            async with self._session.get(url, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status in _REDIRECT_STATUSES and location:
                    url = resolve_redirect(url, location)
                    continue
                if response.status >= 500:
                    raise FetchError("robots", f"robots.txt has status {response.status}")
                if response.status != 200:
                    return []
                data = b""
                while len(data) < _ROBOTS_MAX_BYTES:
                    chunk = await response.content.readany()
                    if not chunk:
                        break
                    data += chunk
                # Use the beginning of a file that is too large.
                text = _decompress(data, response, _ROBOTS_MAX_BYTES).decode("utf-8-sig", "replace")
                return text.splitlines()
        # Too many redirects count as a missing file.
        return []


def _decompress(data: bytes, response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Decompress a body that the server compressed without being asked, but return at most `max_bytes` + 1 bytes.

    The limit protects against small bodies that are huge when decompressed ("zip bombs").
    """
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return data
    formats = [_GZIP_OR_ZLIB]
    if encoding == "deflate":
        formats.append(_NO_HEADER)
    for window_bits in formats:
        # Some servers announce a compression but send plain bytes: use the bytes as they are.
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(window_bits).decompress(data, max_bytes + 1)
    return data


# ---- errors and headers ----


def name_failure(error: BaseException) -> str:
    """Return the kind of failure for an exception of aiohttp or of the operating system.

    The order of the checks matters, because aiohttp's exceptions are derived from each other.
    """
    connection_errors = (aiohttp.ClientConnectorError, ConnectionRefusedError)
    tls_errors = (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch, ssl.SSLError)
    if isinstance(error, aiohttp.ClientConnectorError | OSError) and ADDRESS_REFUSED in str(error):
        return "blocked_address"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns"
    if isinstance(error, tls_errors):
        return "tls"
    if isinstance(error, connection_errors):
        is_refused = getattr(error, "errno", 0) == errno.ECONNREFUSED
        return "refused" if is_refused else "connect"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "truncated"
    if isinstance(error, aiohttp.InvalidURL):
        return "bad_url"
    if isinstance(error, aiohttp.ClientResponseError):
        return "protocol"
    if isinstance(error, ValueError):
        return "bad_url"
    return "connection"  # reset or closed during the transfer


def opted_out(headers: Any) -> str:
    """Return the header that opts the image out of training, or an empty string.

    Two conventions are supported:

    - `X-Robots-Tag: noai` (DeviantArt's directive), and the directives for search engines that forbid indexing. A value
      with a robot's name (`otherbot: noai`) applies to this robot only.
    - `TDM-Reservation: 1`, the text and data mining reservation protocol of the W3C community group.

    Args:
        headers: Headers of a response, a case-insensitive multidict.
    """
    reservations = ",".join(headers.getall("TDM-Reservation", ())).split(",")
    if any(value.strip() == "1" for value in reservations):
        return "TDM-Reservation: 1"
    for value in headers.getall("X-Robots-Tag", ()):
        agent, colon, directives = value.partition(":")
        agent = agent.strip().lower()
        # The text before a colon is a robot's name, or a directive with a value such as "max-snippet: 20".
        has_agent = (
            bool(colon) and "," not in agent and not agent.startswith(("unavailable_after", "max-"))
        )
        if not has_agent:
            directives = value
        elif agent not in (AGENT, "*"):
            continue
        names = {name.strip().lower() for name in directives.split(",")}
        if names & _OPT_OUT_DIRECTIVES:
            return f"X-Robots-Tag: {value}"
    return ""


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds to wait for a Retry-After header (a number or an HTTP date), or None if it cannot be parsed."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value.strip())
    # The parser accepts years and time zones of any size, which can overflow in `timestamp`.
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return None
