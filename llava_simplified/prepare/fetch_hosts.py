"""Fetch many URLs at once, fairly and politely, in one asyncio loop.

A list of URLs often contains one host with most of the URLs, and thousands of hosts with a few. Three rules follow:

- **Politeness.** A host has at most `per_host` requests in flight, and a pause that it asks for is kept.
- **Fairness.** A large host must not keep the small ones waiting.
- **Few connections.** A connection costs a TLS handshake and an open file, so it is used until its host is done.

The unit of work is a *lane*: the right to send one request at a time to one host, over one connection. Each host has
up to `per_host` lanes. Workers (`concurrency` of them) take lanes from a priority queue:

    queue of lanes, lowest first                     workers
    (0, host A) (0, host B) (0, host C) ...          worker 1: lane 0 of A, until A has no URL left
    (1, host A) (1, host B) ...                      worker 2: lane 0 of B, ...
    (2, host A) ...

All first lanes come before any second lane, so a host gets a second connection only when every host has had its
first. A worker keeps its lane until the host has no URL left, or asks for a pause; then the lane goes back into the
queue after the pause. Hosts with most URLs are started first: started last, the largest would end alone, with most
workers idle.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from llava_simplified.prepare.fetch import Fetcher, FetchResult
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prepare.request_url import host_of

# Seconds that a host may ask to wait, added up over consecutive answers, before its other URLs are left for another run.
MAX_PAUSE = 60.0
RETRY_PAUSE = 1.0  # seconds before an attempt that may succeed a moment later
_TRANSIENT_STATUSES = (429, 500, 502, 503, 504)


class _Request(NamedTuple):
    row: Any
    url: str
    attempts: int  # that were made before this one


@dataclass
class _Host:
    """The state of one host.

    Attributes:
        requests: What is still to be requested.
        resume_at: The host is left alone until this time of the monotonic clock.
        pausing_since: Since when it has answered with nothing but Retry-After; infinity if its last answer had none.
        given_up: The result of all its other URLs, once it has asked for too long a pause.
    """

    requests: deque[_Request] = field(default_factory=deque)
    resume_at: float = 0.0
    pausing_since: float = math.inf
    given_up: FetchResult | None = None


def is_transient(fetched: FetchResult) -> bool:
    """Return whether another attempt in the same run is worthwhile. A timeout is not: it would cost as much again."""
    return fetched.kind == "connection" or fetched.http in _TRANSIENT_STATUSES


class _FetchLoop:
    """The queue of lanes, the workers, and their results."""

    def __init__(self, rows: Iterable[tuple[Any, str]], options: FetchOptions) -> None:
        self._options = options
        self.results: asyncio.Queue[tuple[Any, str, FetchResult] | None] = asyncio.Queue()
        # The second number keeps lanes with the same priority in order, so that hosts are never compared.
        self._lanes: asyncio.PriorityQueue[tuple[int, int, _Host]] = asyncio.PriorityQueue()
        self._turn = count()
        # URLs without a host are one group as well: the fetcher names what is wrong with them.
        hosts: dict[str, _Host] = {}
        for row, url in rows:
            host = hosts.setdefault(host_of(url), _Host())
            host.requests.append(_Request(row, url, 0))
        self.unfinished = sum(len(host.requests) for host in hosts.values())
        # More workers than URLs would only wait.
        self._workers = min(self.unfinished, options.concurrency)
        for host in sorted(hosts.values(), key=lambda host: -len(host.requests)):
            for lane in range(min(options.per_host, len(host.requests))):
                self._queue_lane(lane, host)

    def _queue_lane(self, lane: int, host: _Host) -> None:
        self._lanes.put_nowait((lane, next(self._turn), host))

    async def run(self) -> None:
        """Run all workers. A None in the results tells that they have ended, for example by an error."""
        try:
            async with Fetcher(self._options) as fetcher:
                await asyncio.gather(*(self._work(fetcher) for _ in range(self._workers)))
        finally:
            self.results.put_nowait(None)

    async def _work(self, fetcher: Fetcher) -> None:
        """Take one lane after the other. A worker never returns; it is cancelled when all results are there."""
        while True:
            lane, _, host = await self._lanes.get()
            while host.requests:
                pause = host.resume_at - time.monotonic()
                # Another lane of this host was asked to pause. The worker is free for other hosts
                # meanwhile.
                if pause > 0:
                    loop = asyncio.get_running_loop()
                    loop.call_later(pause, self._queue_lane, lane, host)
                    break
                await self._fetch_next(fetcher, host)

    async def _fetch_next(self, fetcher: Fetcher, host: _Host) -> None:
        """Fetch the next URL of a host, and put its result into the queue unless it is tried again."""
        request = host.requests.popleft()
        # A retry may still follow; then a new connection is opened, which is rare.
        is_last = not host.requests
        fetched = host.given_up or await fetcher.fetch(request.url, last=is_last)
        now = time.monotonic()
        self._note_pause(host, fetched, now)
        retry = (
            is_transient(fetched) and request.attempts < self._options.retries and not host.given_up
        )
        if fetched.pause and not host.given_up:
            host.resume_at = max(host.resume_at, now + fetched.pause)
        elif retry:
            wait = RETRY_PAUSE if fetched.pause is None else fetched.pause
            host.resume_at = max(host.resume_at, now + wait)
        # Behind the other URLs of the host, so that time passes before the next attempt.
        if retry:
            host.requests.append(request._replace(attempts=request.attempts + 1))
        else:
            self.results.put_nowait((request.row, request.url, fetched))

    def _note_pause(self, host: _Host, fetched: FetchResult, now: float) -> None:
        """Give a host up that asks for a long pause, or for one short pause after the other."""
        if fetched.pause is None:
            host.pausing_since = math.inf
            return
        # Answers that overtake each other must not extend the pause: the earliest counts.
        host.pausing_since = min(host.pausing_since, now)
        total = now + fetched.pause - host.pausing_since
        if total > MAX_PAUSE:
            host.given_up = FetchResult(
                "rate_limited", 0, f"its host asked for a pause of {total:.0f} s"
            )


async def fetch_all(
    rows: Iterable[tuple[Any, str]], options: FetchOptions
) -> AsyncIterator[tuple[Any, str, FetchResult]]:
    """Fetch many URLs, and yield each result as soon as it is there.

    When the caller stops iterating, all transfers are cancelled.

    Args:
        rows: Pairs of anything that identifies a row, and its URL.
        options: How to fetch.

    Yields:
        The row, its URL, and the result.
    """
    loop = _FetchLoop(rows, options)
    task = asyncio.create_task(loop.run())
    # Results are yielded one by one, so that the caller can store an image before the next is
    # there.
    try:
        while loop.unfinished:
            result = await loop.results.get()
            if result is None:
                break
            loop.unfinished -= 1
            yield result
    finally:
        # Also when the caller stops early, or is cancelled itself. Waiting closes all connections.
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if loop.unfinished:
        task.result()  # raises what has ended the workers
