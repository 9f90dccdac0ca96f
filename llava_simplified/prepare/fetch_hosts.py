"""Fetch many URLs concurrently in one asyncio loop, with limits per host.

In a typical list, one host has most of the URLs, and thousands of hosts have a few. This leads to three rules:

- **Politeness.** A host has at most `per_host` requests in flight, and a pause that it requests is respected.
- **Fairness.** A large host must not delay the small ones.
- **Few connections.** A connection costs a TLS handshake and an open file, so it is reused for all URLs of its host.

The unit of work is a *lane*: the right to send one request at a time to one host, over one connection. Each host has
up to `per_host` lanes. There are `concurrency` workers, which take lanes from a priority queue:

    queue of lanes, lowest first                     workers
    (0, host A) (0, host B) (0, host C) ...          worker 1: lane 0 of A, until A has no URL left
    (1, host A) (1, host B) ...                      worker 2: lane 0 of B, ...
    (2, host A) ...

All first lanes come before any second lane, so a host gets a second connection only when every host has had its
first. A worker keeps its lane until the host has no URL left, or requests a pause; after the pause, the lane goes back
into the queue. Hosts with the most URLs are started first: otherwise the largest host would be the last to finish, with
most workers idle.
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

# Maximum pause in seconds that a host may request. Pauses in consecutive responses count as one, from the first of these
# responses to the end of the last pause. If a host requests more, its remaining URLs fail with "rate_limited", and can be
# retried in another run.
MAX_PAUSE = 60.0
RETRY_PAUSE = 1.0  # seconds before the next attempt after a transient failure
_TRANSIENT_STATUSES = (429, 500, 502, 503, 504)


class _Request(NamedTuple):
    row: Any
    url: str
    attempts: int  # number of earlier attempts


@dataclass
class _Host:
    """The state of one host.

    Attributes:
        requests: Pending requests.
        resume_at: Time of the monotonic clock until which no request is sent to the host: the end of a pause that it
            has requested, or of the wait before a retry.
        pausing_since: Start of an unbroken series of responses with Retry-After; infinity if the last response had none.
        final_result: Result of all remaining URLs if the host has requested too long a pause, otherwise None.
    """

    requests: deque[_Request] = field(default_factory=deque)
    resume_at: float = 0.0
    pausing_since: float = math.inf
    final_result: FetchResult | None = None


def is_transient(fetched: FetchResult) -> bool:
    """Return whether to retry a failed URL in the same run.

    Timeouts are not retried, because another timeout would take as long as the first.
    """
    return fetched.kind == "connection" or fetched.http in _TRANSIENT_STATUSES


class _FetchLoop:
    """The queue of lanes, the workers, and their results."""

    def __init__(self, rows: Iterable[tuple[Any, str]], options: FetchOptions) -> None:
        self._options = options
        self.results: asyncio.Queue[tuple[Any, str, FetchResult] | None] = asyncio.Queue()
        # The second number breaks ties between lanes, so that hosts are never compared.
        self._lanes: asyncio.PriorityQueue[tuple[int, int, _Host]] = asyncio.PriorityQueue()
        self._tie_breaker = count()
        # Treat URLs without a host as one group; the fetcher reports what is wrong with them.
        hosts: dict[str, _Host] = {}
        for row, url in rows:
            host = hosts.setdefault(host_of(url), _Host())
            host.requests.append(_Request(row, url, attempts=0))
        self.unfinished = sum(len(host.requests) for host in hosts.values())
        self._workers = min(self.unfinished, options.concurrency)
        for host in sorted(hosts.values(), key=lambda host: -len(host.requests)):
            for lane in range(min(options.per_host, len(host.requests))):
                self._queue_lane(lane, host)

    def _queue_lane(self, lane: int, host: _Host) -> None:
        self._lanes.put_nowait((lane, next(self._tie_breaker), host))

    async def run(self) -> None:
        """Run all workers until an error or a cancellation ends them, then put None into the results."""
        try:
            async with Fetcher(self._options) as fetcher:
                await asyncio.gather(*(self._work(fetcher) for _ in range(self._workers)))
        finally:
            self.results.put_nowait(None)

    async def _work(self, fetcher: Fetcher) -> None:
        """Process lanes forever. The worker is cancelled when all results are available."""
        while True:
            lane, _, host = await self._lanes.get()
            while host.requests:
                pause = host.resume_at - time.monotonic()
                # No request may be sent to the host yet. Put the lane back into the queue after the pause, so that
                # the worker can process other hosts in the meantime.
                if pause > 0:
                    loop = asyncio.get_running_loop()
                    loop.call_later(pause, self._queue_lane, lane, host)
                    break
                await self._fetch_next(fetcher, host)

    async def _fetch_next(self, fetcher: Fetcher, host: _Host) -> None:
        """Fetch the next URL of a host, and put its result into the queue unless it is retried."""
        request = host.requests.popleft()
        # Close the connection after the last URL. A retry of this URL has to open a new one, but retries are rare.
        is_last = not host.requests
        fetched = host.final_result or await fetcher.fetch(request.url, last=is_last)
        now = time.monotonic()
        self._note_pause(host, fetched, now)
        retry = (
            is_transient(fetched)
            and request.attempts < self._options.retries
            and not host.final_result
        )
        if fetched.pause and not host.final_result:
            host.resume_at = max(host.resume_at, now + fetched.pause)
        elif retry:
            # Retry at once if the server sent Retry-After: 0.
            wait = RETRY_PAUSE if fetched.pause is None else fetched.pause
            host.resume_at = max(host.resume_at, now + wait)
        # Append a retry after the other URLs of the host, so that some time passes before it.
        if retry:
            host.requests.append(request._replace(attempts=request.attempts + 1))
        else:
            self.results.put_nowait((request.row, request.url, fetched))

    def _note_pause(self, host: _Host, fetched: FetchResult, now: float) -> None:
        """Record the pause that a response requests, and give up on a host whose pauses exceed `MAX_PAUSE`."""
        if fetched.pause is None:
            host.pausing_since = math.inf
            return
        # Keep the start of the series. It is infinity if this is the first pause of a series.
        host.pausing_since = min(host.pausing_since, now)
        total = now + fetched.pause - host.pausing_since
        if total > MAX_PAUSE:
            host.final_result = FetchResult(
                "rate_limited", http=0, detail=f"the host requested a pause of {total:.0f} s"
            )


async def fetch_all(
    rows: Iterable[tuple[Any, str]], options: FetchOptions
) -> AsyncIterator[tuple[Any, str, FetchResult]]:
    """Fetch many URLs, and yield each result as soon as it is available.

    When the caller stops iterating, all transfers are cancelled.

    Args:
        rows: Pairs of a row (any object that identifies it) and its URL.
        options: Options of the requests.

    Yields:
        The row, its URL, and the result.
    """
    loop = _FetchLoop(rows, options)
    task = asyncio.create_task(loop.run())
    # Yield the results one by one, so that the caller can store each image immediately.
    try:
        while loop.unfinished:
            result = await loop.results.get()
            if result is None:
                break
            loop.unfinished -= 1
            yield result
    finally:
        # This also runs if the caller stops early or is cancelled. Waiting for the task closes all connections.
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    # Results are missing, so the workers have failed: raise their error.
    if loop.unfinished:
        task.result()
