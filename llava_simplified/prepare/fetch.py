"""Fetch pictures politely and safely: one asyncio loop, one connection pool, every failure by its true name.

What is refused, and where: other schemes than http(s), at each hop; private addresses, at connect time,
after every trick with names is over; bodies that are too large or too slow, while they stream; everything
that does not decode as a picture, before it is kept; pictures whose server opts out of their use for
training.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import math
import socket
import ssl
import sys
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import count
from typing import Any, NamedTuple
from urllib.robotparser import RobotFileParser

import aiohttp
from yarl import URL

from llava_simplified.data.images import (
    MAX_PIXELS,
    EncodedImage,
    ImageError,
    check_image,
    shrink_image,
)

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

AGENT = "llava-simplified"
KINDS = (
    *(
        "bad_url",
        "scheme",
        "blocked_address",
        "robots",
        "dns",
        "connect",
        "refused",
        "tls",
        "connection",
        "protocol",
    ),
    *(
        "timeout",
        "too_slow",
        "rate_limited",
        "redirect",
        "opt_out",
        "empty",
        "html",
        "not_image",
        "too_large",
    ),
    *("truncated", "corrupt"),
)
"""Why a URL gives no picture; besides, http_404 and what else a server answers."""
_OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "noml", "none"}
_NOTHING = ["User-agent: *", "Disallow: /"]
_REDIRECTS = 5
_LONGEST_PAUSE = (
    60.0  # seconds that a host may ask for, in a row, before its rows are left for another run
)
MAX_CONSECUTIVE_TIMEOUTS = 10  # a host that is down would cost a timeout for each of its rows
_SLOW_AFTER, _SLOW_RATE = (
    3.0,
    1000,
)  # a body must bring so many bytes a second after so many seconds
_CLOSE = {"Connection": "close"}
_UNICAST, _NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")
_INLINE_BYTES = 400_000  # larger files are decoded in a thread, so that other transfers go on


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch; `timeout`: seconds for all hops and the body together, `resize`: pixels, shorter side."""

    concurrency: int = 256
    per_host: int = 4
    timeout: float = 10.0
    max_bytes: int = 20_000_000
    max_pixels: int = MAX_PIXELS
    resize: int = 0
    retries: int = 1
    contact: str = ""
    robots: bool = False
    allow_private: bool = False


class FetchError(Exception):
    """Why a URL gave no picture: `kind`, of KINDS or `http_404`, is what reports count and `--retry` names."""

    def __init__(self, kind: str, detail: str, http: int = 0, pause: float | None = None) -> None:
        super().__init__(detail)
        self.kind, self.http, self.pause = kind, http, pause


class FetchResult(NamedTuple):
    """What came of one URL. `kind`: "ok" or the cause of the failure; `pause`: what Retry-After asked for."""

    kind: str
    http: int
    detail: str
    picture: EncodedImage | None = None
    received: int = 0
    seconds: float = 0.0
    pause: float | None = None


def guard_address(info: tuple[Any, ...]) -> socket.socket:
    """Make the socket for an address, unless the address is private, loopback, link-local, multicast or
    reserved.

    It runs for every connection with the address that will be connected to: no name, redirect, number
    format or late change of a DNS answer gets around it.
    """
    family, kind, protocol, _, address = info
    if not _is_public(str(address[0])):
        raise OSError(errno.EPERM, f"address refused: {address[0]} is not public")
    return socket.socket(family, kind, protocol)


@lru_cache(maxsize=65536)
def _is_public(text: str) -> bool:
    address: Any = ipaddress.ip_address(text.partition("%")[0])
    if address.version == 6:
        translated = ipaddress.ip_address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        inner = (
            address.ipv4_mapped
            or address.sixtofour
            or (address.teredo or (None, None))[1]
            or translated
        )
        if (
            inner is None
        ):  # Python calls much global that nobody routes: what is not unicast is somebody's own
            return address in _UNICAST and address.is_global
        address = inner
    return address.is_global and not address.is_multicast


class Fetcher:
    """A connection pool and the rules. Use as an async context manager."""

    def __init__(self, options: FetchOptions) -> None:
        self.options = options
        contact = f" (+{options.contact})" if options.contact else " (image dataset research)"
        self._headers = {"User-Agent": f"{AGENT}/{version('llava-simplified')}{contact}",
                         "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}  # fmt: skip
        self._robots: dict[URL, asyncio.Task[RobotFileParser]] = {}
        self._slots = defaultdict[str, asyncio.Semaphore](
            lambda: asyncio.Semaphore(options.per_host)
        )
        self._silent = Counter[str]()  # timeouts in a row, by host

    async def __aenter__(self) -> Fetcher:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the host queue limits
                ttl_dns_cache=600,
                socket_factory=None if self.options.allow_private else guard_address,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self, url: str, last: bool = False) -> FetchResult:
        """Fetch and check one picture; never raises for what a URL or a server does.

        Args:
            last: nothing more is wanted of this host: the connection, 100 kB with TLS, need not stay open.
        """
        start = time.perf_counter()
        try:
            data, http = await self._get(url, _CLOSE if last else None)
            picture = await self._check(data)
            return FetchResult("ok", http, "", picture, len(data), time.perf_counter() - start)
        except FetchError as error:
            kind, http, pause, detail = error.kind, error.http, error.pause, str(error)
        except ImageError as error:
            kind, http, pause, detail = error.kind, 200, None, str(error)
        except (TimeoutError, asyncio.TimeoutError):
            kind, http, pause, detail = (
                "timeout",
                0,
                None,
                f"not done in {self.options.timeout:g} s",
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            kind, http, pause, detail = (
                name_failure(error),
                0,
                None,
                f"{type(error).__name__}: {error}",
            )
        detail = (
            detail[:300].encode(errors="replace").decode()
        )  # headers may hold any bytes, the journal may not
        return FetchResult(kind, http, detail, None, 0, time.perf_counter() - start, pause)

    async def _check(self, data: bytes) -> EncodedImage:
        resize, most = self.options.resize, self.options.max_pixels
        work = (
            partial(shrink_image, data, resize, most)
            if resize
            else partial(check_image, data, most)
        )
        return work() if len(data) < _INLINE_BYTES else await asyncio.to_thread(work)

    async def _get(self, text: str, headers: dict[str, str] | None) -> tuple[bytes, int]:
        url, left = URL(text), self.options.timeout
        for _ in range(_REDIRECTS + 1):
            if url.scheme not in ("http", "https"):
                kind = "scheme" if url.scheme else "bad_url"
                raise FetchError(
                    kind, f"only http and https are fetched, not {url.scheme or text[:40]!r}"
                )
            if not url.host:
                raise FetchError("bad_url", f"no host in {text[:100]!r}")
            if self.options.robots and not await self._allowed(url):
                raise FetchError("robots", f"robots.txt of {url.host} does not allow it")
            async with self._slots[
                url.host
            ]:  # many hosts may send to one; to wait for it takes none of the row's time
                if self._silent[url.host] >= MAX_CONSECUTIVE_TIMEOUTS:
                    raise FetchError(
                        "timeout",
                        f"not asked for: {url.host} was silent {MAX_CONSECUTIVE_TIMEOUTS} times in a row",
                    )
                begun = time.monotonic()
                try:
                    async with timeout(left):  # before Python 3.12, wait_for loses cancellations
                        answer = await self._ask(url, headers)
                except (TimeoutError, asyncio.TimeoutError):
                    self._silent[url.host] += 1
                    raise
                left -= time.monotonic() - begun
            if not isinstance(answer, URL):
                return answer
            url = answer
        raise FetchError("redirect", f"more than {_REDIRECTS} redirects", 302)

    async def _ask(self, url: URL, headers: dict[str, str] | None) -> URL | tuple[bytes, int]:
        """Where to go on, or the body and the status."""
        async with self._session.get(url, allow_redirects=False, headers=headers) as response:
            self._silent.pop(str(url.host), None)
            if response.status in (301, 302, 303, 307, 308):
                if not (location := response.headers.get("Location")):
                    raise FetchError("redirect", "a redirect to nowhere", response.status)
                return url.join(URL(location))
            if response.status != 200:
                pause = _retry_after(response.headers.get("Retry-After"))
                raise FetchError(
                    f"http_{response.status}", str(response.reason), response.status, pause
                )
            if reason := opted_out(response.headers):
                raise FetchError("opt_out", reason, response.status)
            return await self._body(response), response.status

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        most, chunks, size, start = self.options.max_bytes, list[bytes](), 0, time.perf_counter()
        if (response.content_length or 0) > most:
            raise FetchError(
                "too_large", f"{response.content_length} bytes announced, the limit is {most}", 200
            )
        async for chunk in response.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise FetchError("too_large", f"over {most} bytes", 200)
            seconds = time.perf_counter() - start
            if seconds > _SLOW_AFTER and size < _SLOW_RATE * seconds:
                raise FetchError("too_slow", f"{size} bytes in {seconds:.1f} s", 200)
        data = b"".join(chunks)
        if response.headers.get("Content-Encoding", "identity").lower() in (
            "gzip",
            "deflate",
        ):  # not asked for
            with contextlib.suppress(
                zlib.error
            ):  # some say so of what is not packed: the decoder will see
                data = zlib.decompressobj(47).decompress(data, most + 1)
            if len(data) > most:
                raise FetchError("too_large", f"over {most} bytes when unpacked", 200)
        if not data:
            raise FetchError("empty", "no bytes", 200)
        return data

    async def _allowed(self, url: URL) -> bool:
        origin = url.origin()
        if origin not in self._robots:
            self._robots[origin] = asyncio.create_task(self._read_robots(origin))
        return (await asyncio.shield(self._robots[origin])).can_fetch(AGENT, str(url))

    async def _read_robots(self, origin: URL) -> RobotFileParser:
        """RFC 9309: no such file allows everything, a server that fails to answer allows nothing."""
        rules = RobotFileParser()
        try:
            async with self._session.get(
                origin / "robots.txt", timeout=aiohttp.ClientTimeout(5)
            ) as response:
                text = b""
                while (
                    response.status == 200
                    and len(text) < 500_000
                    and (chunk := await response.content.readany())
                ):
                    text += chunk
                rules.parse(text.decode("utf-8", "replace").splitlines())
                if response.status >= 500:
                    rules.parse(_NOTHING)
        except (aiohttp.ClientError, OSError, TimeoutError, asyncio.TimeoutError):
            rules.parse(_NOTHING)
        return rules


def name_failure(error: BaseException) -> str:
    """The true cause of a connection or protocol error."""
    if isinstance(error, aiohttp.ClientConnectorError | OSError) and "address refused" in str(
        error
    ):
        return "blocked_address"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns"
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.ServerFingerprintMismatch | ssl.SSLError):
        return "tls"
    if isinstance(error, aiohttp.ClientConnectorError | ConnectionRefusedError):
        return "refused" if getattr(error, "errno", 0) == errno.ECONNREFUSED else "connect"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "truncated"
    if isinstance(error, aiohttp.InvalidURL | ValueError) and not isinstance(
        error, aiohttp.ClientResponseError
    ):
        return "bad_url"
    if isinstance(error, aiohttp.ClientResponseError):
        return "protocol"
    return "connection"  # reset or closed in the middle


def opted_out(headers: Any) -> str:
    """The header that forbids training on the picture, or "".

    `X-Robots-Tag: noai` speaks to everybody, `X-Robots-Tag: otherbot: noai` to another; `TDM-Reservation:
    1` is the W3C group's text and data mining protocol.
    """
    if headers.get("TDM-Reservation", "").strip() == "1":
        return "TDM-Reservation: 1"
    for value in headers.getall("X-Robots-Tag", ()):
        agent, colon, rest = value.partition(":")
        agent = agent.strip().lower()
        named = (
            bool(colon) and "," not in agent and not agent.startswith(("unavailable_after", "max-"))
        )
        if named and agent not in (AGENT, "*"):
            continue
        if {word.strip().lower() for word in (rest if named else value).split(",")} & _OPT_OUT:
            return f"X-Robots-Tag: {value}"
    return ""


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


@dataclass
class _Host:
    """What one host is still to be asked for, and the pause that it has asked for itself."""

    rows: deque[tuple[Any, str, int]] = field(default_factory=deque)  # (row, URL, tries so far)
    resume: float = 0.0  # it is left alone until then, by the monotonic clock
    asked: float = math.inf  # since when it has answered with nothing but Retry-After
    closed: FetchResult | None = None  # what its other rows are left with, for another run


@lru_cache(maxsize=4096)
def _host(start: str) -> str:
    try:
        return URL(start).host or ""
    except ValueError:
        return ""


def host_of(url: str) -> str:
    """The host that a URL asks, "" where there is none to ask."""
    return _host("/".join(url.split("/", 3)[:3]))


async def fetch_all(
    rows: Iterable[tuple[Any, str]], options: FetchOptions
) -> AsyncIterator[tuple[Any, str, FetchResult]]:
    """Fetch many (row, url); yields (row, url, result) as they come.

    Each host has up to `per_host` lanes, and each lane its connection. A lane goes on to the host's last row, or until the
    host asks for a pause, so that few connections wait unused: they are dear, and a process may open only so many. Second
    and further lanes get what the first ones leave free, so that no large host keeps the small ones waiting.
    """
    hosts: dict[str, _Host] = {}
    for row, url in rows:
        hosts.setdefault(host_of(url), _Host()).rows.append((row, url, 0))
    results: asyncio.Queue[tuple[Any, str, FetchResult] | None] = asyncio.Queue()
    lanes: asyncio.PriorityQueue[tuple[int, int, _Host]] = asyncio.PriorityQueue()
    turn, left = count(), sum(len(host.rows) for host in hosts.values())

    async def serve(fetcher: Fetcher, host: _Host) -> None:
        row, url, tries = host.rows.popleft()
        fetched = host.closed or await fetcher.fetch(url, last=not host.rows)
        now = time.monotonic()
        host.asked = math.inf if fetched.pause is None else min(host.asked, now)
        if fetched.pause is not None and now + fetched.pause > host.asked + _LONGEST_PAUSE:
            pause = now + fetched.pause - host.asked
            host.closed = FetchResult(
                "rate_limited", 0, f"its host asked for a pause of {pause:.0f} s"
            )
        again = is_transient(fetched) and tries < options.retries and not host.closed
        if again or (fetched.pause and not host.closed):
            host.resume = max(host.resume, now + (1.0 if fetched.pause is None else fetched.pause))
        if again:
            host.rows.append((row, url, tries + 1))
        else:
            results.put_nowait((row, url, fetched))

    async def work(fetcher: Fetcher) -> None:
        while True:
            lane, _, host = await lanes.get()
            while host.rows and (wait := host.resume - time.monotonic()) <= 0:
                await serve(fetcher, host)
            if host.rows:  # else the lane ends
                asyncio.get_running_loop().call_later(
                    wait, lanes.put_nowait, (lane, next(turn), host)
                )

    async def run() -> None:
        try:
            async with Fetcher(options) as fetcher:
                await asyncio.gather(
                    *(work(fetcher) for _ in range(min(left, options.concurrency)))
                )
        finally:
            results.put_nowait(None)

    for host in sorted(
        hosts.values(), key=lambda host: -len(host.rows)
    ):  # begun last, the largest would end alone
        for lane in range(min(options.per_host, len(host.rows))):
            lanes.put_nowait((lane, next(turn), host))
    task = asyncio.create_task(run())
    try:
        while left and (result := await results.get()) is not None:
            left -= 1
            yield result
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if left:
        task.result()


def is_transient(fetched: FetchResult) -> bool:
    """Worth another request in the same run. A timeout is not: it would cost as much again."""
    return fetched.kind == "connection" or fetched.http in (429, 500, 502, 503, 504)
