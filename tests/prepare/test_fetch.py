"""Fetch from a server that produces the faults that the downloader must withstand."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import re
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from servers import Server, loopback, loopback_server  # noqa: F401 - a fixture

from llava_simplified.data.images import ImageError, check_image
from llava_simplified.prepare import address_guard, fetch_hosts
from llava_simplified.prepare.address_guard import is_public
from llava_simplified.prepare.fetch import Fetcher, FetchResult, opted_out, parse_retry_after
from llava_simplified.prepare.fetch_hosts import fetch_all
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prepare.request_url import host_of

OPEN = FetchOptions(allow_private=True, timeout=3, retries=0)

Headers = dict[str, str] | None


def fetch(urls: str | list[str], options: FetchOptions = OPEN) -> list[FetchResult]:
    """Fetch URLs, and return the results in their order."""
    url_list = [urls] if isinstance(urls, str) else urls

    async def run() -> list[FetchResult]:
        results = {
            row: fetched async for row, _, fetched in fetch_all(enumerate(url_list), options)
        }
        return [results[row] for row in range(len(url_list))]

    return asyncio.run(run())


def kinds_of(results: list[FetchResult]) -> set[str]:
    return {fetched.kind for fetched in results}


# ---- outcomes of one URL ----


@pytest.mark.parametrize(
    "kind", [kind for kind in loopback.EXPECTED if kind not in ("drip", "busy")]
)
def test_fetch_names_every_outcome_by_its_cause(server: Server, kind: str) -> None:
    timeout = 1 if kind == "hang" else 20
    options = FetchOptions(allow_private=True, timeout=timeout, retries=0)
    (fetched,) = fetch(server.url(f"{kind}/3.jpg"), options)
    outcome, digest = loopback.expected(kind, 3)
    assert fetched.kind == outcome, fetched
    if digest:
        assert fetched.image is not None
        assert hashlib.sha256(fetched.image.data).hexdigest() == digest, "kept byte by byte"
    else:
        assert fetched.image is None
        assert fetched.detail.encode(), "can be written to a file"


def test_fetch_gives_up_early_on_one_byte_a_second(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_simplified.prepare.fetch.SLOW_AFTER", 0.5)
    start = time.monotonic()
    (fetched,) = fetch(server.url("drip/1.jpg"), FetchOptions(allow_private=True, timeout=60))
    assert fetched.kind == "too_slow"
    assert time.monotonic() - start < 5


def test_fetch_stops_an_endless_body_at_the_limit(server: Server) -> None:
    options = FetchOptions(allow_private=True, timeout=20, max_bytes=1_000_000)
    (fetched,) = fetch(server.url("endless/1.jpg"), options)
    assert fetched.kind == "too_large"
    assert "1000000" in fetched.detail


@pytest.mark.parametrize("size", [(60_000, 60_000), (8_000, 8_000)])
def test_check_image_refuses_a_bomb_by_its_header(size: tuple[int, int]) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"pixels") as error:
        check_image(loopback.bomb_png(*size))
    assert error.value.kind == "too_large"
    assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.org/1.jpg", "data:image/png;base64,AAAA", "javascript:x"],
)
def test_fetch_refuses_other_schemes(url: str) -> None:
    assert fetch(url)[0].kind == "scheme"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "no url",
        "http://",
        "http:///1.jpg",
        "http://a b/1.jpg",
        "http://[::1/1.jpg",
        "http://x:99999/",
    ],
)
def test_fetch_of_a_malformed_url_is_an_outcome_and_not_an_exception(url: str) -> None:
    assert fetch(url)[0].kind in ("bad_url", "scheme", "dns")


def test_fetch_names_unknown_hosts_and_closed_ports() -> None:
    assert fetch("http://no-such-host.invalid/1.jpg")[0].kind == "dns"
    assert fetch("http://127.0.0.1:9/1.jpg")[0].kind == "refused"


SIGNED_PATHS = [
    "ok/hmac=abc/300x200/smart/http%3A%2F%2Fcdn.example%2Fp.jpg",
    "ok/a%28b%29.jpg",
    "ok/Wiki%26Co.jpg?a=%2B&b=1+2",
    "ok/a/../b//c.jpg?",
]


def test_fetch_sends_urls_as_they_are(server: Server) -> None:
    """Signed URLs in the list and in redirects are only valid if no byte is changed."""
    fetch([server.url(path) for path in SIGNED_PATHS])
    sent = {request.split(" ")[1] for request in server.requests}
    assert sent == {f"/{path}" for path in SIGNED_PATHS}
    server.requests.clear()
    for number, path in enumerate(SIGNED_PATHS):
        server.targets[str(number)] = server.url(path)
    fetch([server.url(f"redirect/{number}") for number in range(len(SIGNED_PATHS))])
    sent = {request.split(" ")[1] for request in server.requests}
    assert {f"/{path}" for path in SIGNED_PATHS} <= sent


@pytest.mark.parametrize("location", ["http://[]@/1.jpg", "//[/", "//[]@/", "http://a b/"])
def test_fetch_of_a_bad_redirect_costs_only_its_row(server: Server, location: str) -> None:
    server.targets["bad"] = location
    urls = [location, server.url("redirect/bad"), server.url("ok/1.jpg")]
    kinds = [fetched.kind for fetched in fetch(urls)]
    assert kinds == ["bad_url", "bad_url", "ok"]


def test_fetch_records_an_internal_error_and_continues(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    get = Fetcher._get

    async def faulty_get(self: Fetcher, url: str, headers: Headers) -> tuple[bytes, int]:
        if "bad" in url:
            raise LookupError("unexpected")
        return await get(self, url, headers)

    monkeypatch.setattr(Fetcher, "_get", faulty_get)
    results = fetch([server.url("ok/bad.jpg"), server.url("ok/1.jpg")])
    assert [fetched.kind for fetched in results] == ["internal", "ok"]
    assert "LookupError: unexpected" in results[0].detail
    assert "Traceback" in caplog.text
    assert "bad.jpg" in caplog.text


def test_fetch_obeys_the_readable_lines_of_a_damaged_robots_txt(server: Server) -> None:
    server.targets["robots"] = "User-agent: *\nDisallow: //[\nDisallow: /png/\n"
    urls = [server.url("ok/1.jpg"), server.url("png/1.jpg")]
    results = fetch(urls, FetchOptions(allow_private=True, robots=True))
    assert [fetched.kind for fetched in results] == ["ok", "robots"]


# ---- addresses that are not public ----

# Notations of local addresses -> allowed outcomes: aiohttp or the resolver may refuse some of them before the guard.
PRIVATE_HOSTS = {
    "127.0.0.1": ["blocked_address"],
    "localhost": ["blocked_address"],
    "[::1]": ["blocked_address"],
    "[::ffff:127.0.0.1]": ["blocked_address"],
    "0.0.0.0": ["blocked_address"],
    "2130706433": ["blocked_address", "dns", "bad_url"],
    "0x7f000001": ["blocked_address", "dns", "bad_url"],
    "0177.0.0.1": ["blocked_address", "dns", "bad_url"],
    "127.1": ["blocked_address", "dns", "bad_url"],
}


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_fetch_refuses_private_addresses_in_every_notation(server: Server, host: str) -> None:
    options = FetchOptions(timeout=5, retries=0)
    (fetched,) = fetch(f"http://{host}:{server.port}/ok/1.jpg", options)
    assert fetched.kind in PRIVATE_HOSTS[host], fetched
    assert not server.served, "no request was sent"


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_fetch_refuses_a_redirect_to_a_private_address(
    server: Server, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.2 counts as public here. It redirects to an address that must be refused."""

    def is_public_or_first_hop(address: str) -> bool:
        return address == "127.0.0.2" or is_public(address)

    monkeypatch.setattr(address_guard, "is_public", is_public_or_first_hop)
    server.targets["there"] = f"http://{host}:{server.port}/ok/secret.jpg"
    url = server.url("redirect/there", "127.0.0.2")
    (fetched,) = fetch(url, FetchOptions(timeout=5, retries=0))
    assert fetched.kind in ("blocked_address", "dns", "bad_url"), fetched
    assert list(server.served) == ["/redirect/there"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("224.0.0.1", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("2001:0:0:0:0:0:80ff:fffe", False),  # Teredo of 127.0.0.1
        # A local NAT64 prefix: only the translator knows which bits are the IPv4 address.
        ("64:ff9b:1:7f00:0:100:808:808", False),
        ("fec0::1", False),
        ("::7f00:1", False),
        ("::ffff:0:7f00:1", False),
        ("5f00::1", False),
    ],
)
def test_is_public(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_aiohttp_has_the_hook_of_the_address_guard() -> None:
    assert "socket_factory" in inspect.signature(aiohttp.TCPConnector.__init__).parameters


# ---- opt-outs, robots.txt and the user agent ----


@pytest.mark.parametrize(
    ("headers", "forbids"),
    [
        ([("X-Robots-Tag", "noai")], True),
        ([("X-Robots-Tag", "nofollow, NoImageAI")], True),
        ([("X-Robots-Tag", "none")], True),
        ([("X-Robots-Tag", "otherbot: noai")], False),
        ([("X-Robots-Tag", "llava-simplified: noml")], True),
        ([("X-Robots-Tag", "unavailable_after: 25 Jun 2030 15:00:00 GMT, noindex")], True),
        ([("X-Robots-Tag", "nofollow"), ("X-Robots-Tag", "noimageindex")], True),
        ([("X-Robots-Tag", "all")], False),
        ([("TDM-Reservation", "1")], True),
        ([("TDM-Reservation", "0")], False),
    ],
)
def test_opted_out_reads_both_conventions(headers: list[tuple[str, str]], forbids: bool) -> None:
    assert bool(opted_out(CIMultiDict(headers))) == forbids


def test_fetch_obeys_robots_txt_with_the_robots_option(server: Server) -> None:
    # This text is too long to arrive in one piece.
    comment = "# comment\n" * 30_000
    server.targets["robots"] = f"User-agent: *\n{comment}Disallow: /png/\n"
    urls = [server.url("ok/1.jpg"), server.url("png/1.jpg"), server.url("png/2.jpg")]
    results = fetch(urls, FetchOptions(allow_private=True, robots=True))
    assert [fetched.kind for fetched in results] == ["ok", "robots", "robots"]
    assert server.served == {"/robots.txt": 1, "/ok/1.jpg": 1}


def test_fetch_sends_a_user_agent_with_the_program_and_the_contact(server: Server) -> None:
    options = FetchOptions(allow_private=True, contact="https://lab.example/crawl")
    fetch(server.url("ok/1.jpg"), options)
    lines = server.requests[0].splitlines()
    (agent,) = [line for line in lines if line.startswith("User-Agent: ")]
    assert agent.startswith("User-Agent: llava-simplified/")
    assert "(+https://lab.example/crawl)" in agent


# ---- many URLs: fairness between hosts ----


def test_fetch_all_limits_requests_per_host_and_lets_hosts_take_turns(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One host has 60 URLs, which come first in the list; ten others have one each."""
    in_flight: Counter[str] = Counter()
    most: Counter[str] = Counter()
    order: list[str] = []
    get = Fetcher._get

    async def watched_get(self: Fetcher, url: str, headers: Headers) -> tuple[bytes, int]:
        host = host_of(url)
        order.append(host)
        in_flight[host] += 1
        most[host] = max(most[host], in_flight[host])
        try:
            return await get(self, url, headers)
        finally:
            in_flight[host] -= 1

    monkeypatch.setattr(Fetcher, "_get", watched_get)
    small_hosts = [f"127.0.0.{number}" for number in range(2, 12)]
    many = [server.url(f"ok/{number}.jpg", "127.0.0.1") for number in range(60)]
    few = [server.url("ok/1.jpg", host) for host in small_hosts]
    results = fetch([*many, *few], FetchOptions(allow_private=True, concurrency=32))
    assert kinds_of(results) == {"ok"}
    assert most["127.0.0.1"] == 4
    assert set(order[:16]) >= set(small_hosts), "the small hosts did not wait"


def test_fetch_all_connects_to_every_host_before_it_opens_second_connections(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ten hosts and five workers, no host gets a second connection before each host has one.

    The last request to each host closes its connection.
    """
    connected: list[str] = []
    create_connection = aiohttp.TCPConnector._create_connection

    async def noted_connection(self: Any, request: Any, *rest: Any) -> Any:
        connected.append(request.url.host)
        return await create_connection(self, request, *rest)

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", noted_connection)
    hosts = [f"127.0.0.{number}" for number in range(1, 11)]
    urls = []
    for number in range(4):
        urls += [server.url(f"ok/{number}.jpg", host) for host in hosts]
    results = fetch(urls, replace(OPEN, concurrency=5))
    assert kinds_of(results) == {"ok"}
    assert sorted(connected[:10]) == sorted(hosts)
    assert len(connected) < 20, "connections are reused"
    closing = [request for request in server.requests if "connection: close" in request.lower()]
    closed_hosts = [re.search(r"Host: ([\d.]+)", request)[1] for request in closing]
    assert sorted(closed_hosts) == sorted(hosts)


def test_fetch_all_starts_with_the_host_that_has_the_most_urls(server: Server) -> None:
    """If this host were started last, only its four connections would be busy at the end."""
    few = [server.url("ok/1.jpg", f"127.0.0.{number}") for number in range(2, 12)]
    many = [server.url(f"ok/{number}.jpg", "127.0.0.1") for number in range(12)]
    assert kinds_of(fetch([*few, *many], replace(OPEN, concurrency=4))) == {"ok"}
    assert "Host: 127.0.0.1:" in "".join(server.requests[:4])


def test_fetch_all_limits_requests_to_a_host_that_many_hosts_redirect_to(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for a free slot does not count toward the timeout of a row: forty rows, four at a time, take longer."""
    in_flight = most = 0
    request_once = Fetcher._request

    async def watched_request(self: Fetcher, url: Any, headers: Headers) -> Any:
        nonlocal in_flight, most
        is_target = url.host == "127.0.0.1"
        in_flight += is_target
        most = max(most, in_flight)
        await asyncio.sleep(0.1)
        try:
            return await request_once(self, url, headers)
        finally:
            in_flight -= is_target

    # The server draws its images at the first request, which is slow.
    assert fetch(server.url("ok/1.jpg"))[0].kind == "ok"
    monkeypatch.setattr(Fetcher, "_request", watched_request)
    server.targets["there"] = f"http://127.0.0.1:{server.port}/ok/1.jpg"
    urls = [server.url("redirect/there", f"127.0.2.{number}") for number in range(1, 41)]
    assert kinds_of(fetch(urls, replace(OPEN, timeout=0.8))) == {"ok"}
    assert most == 4


@pytest.mark.medium
def test_fetch_all_keeps_few_connections_open(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are three rows on each of eighty hosts. Connections must not stay open until the next row of their host.

    A process may open only a limited number of files.
    """
    count = most = 0
    connection_made = loopback._Handler.connection_made

    def count_made(handler: Any, transport: asyncio.BaseTransport) -> None:
        nonlocal count, most
        count += 1
        most = max(most, count)
        connection_made(handler, transport)

    def count_lost(handler: Any, error: Exception | None) -> None:
        nonlocal count
        count -= 1

    monkeypatch.setattr(loopback._Handler, "connection_made", count_made)
    monkeypatch.setattr(loopback._Handler, "connection_lost", count_lost)
    hosts = [f"127.0.1.{number % 80 + 1}" for number in range(240)]
    urls = [server.url(f"ok/{number}.jpg", host) for number, host in enumerate(hosts)]
    assert kinds_of(fetch(urls, replace(OPEN, concurrency=8, timeout=20))) == {"ok"}
    assert most <= 16


def test_fetch_all_cancels_all_transfers_when_the_caller_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No cancellation may be lost, even if a transfer ends at the same moment."""

    async def end_soon(self: Fetcher, url: str, headers: Headers) -> tuple[bytes, int]:
        await asyncio.sleep(0)
        return b"no image", 200

    async def run() -> None:
        for wanted in range(1, 21):
            urls = [f"http://{number % 64}.test/{number}" for number in range(640)]
            results = fetch_all(enumerate(urls), replace(OPEN, concurrency=64))
            for _ in range(wanted):
                assert (await anext(results))[2].kind == "not_image"
            closing = asyncio.create_task(results.aclose())  # type: ignore[attr-defined]
            done, _ = await asyncio.wait([closing], timeout=5)
            assert done, "a worker goes on"

    monkeypatch.setattr(Fetcher, "_get", end_soon)
    asyncio.run(run())


# ---- hosts that are down or request pauses ----


def test_fetch_all_gives_up_on_a_host_that_is_down(server: Server) -> None:
    """Otherwise each row of this host would wait for a timeout. A host that answers some requests is kept."""
    down = [server.url(f"hang/{number}.jpg", "127.0.0.2") for number in range(100)]
    mixed = []
    for number in range(30):
        kind = "hang" if number % 3 else "missing"
        mixed.append(server.url(f"{kind}/{number}.jpg", "127.0.0.3"))
    results = fetch([*down, *mixed], replace(OPEN, timeout=0.2))
    assert kinds_of(results[:100]) == {"timeout"}
    sent_down = ["/hang/" in text and "127.0.0.2" in text for text in server.requests]
    assert sum(sent_down) <= 10 + OPEN.per_host
    assert "10 requests to 127.0.0.2 timed out" in results[99].detail
    assert sum("127.0.0.3" in request for request in server.requests) == 30


def test_fetcher_tries_a_host_again_when_its_ban_ends(server: Server) -> None:
    """A server runs for months, so a host that was down for a minute must not stay banned."""
    hang = server.url("hang/1.jpg")
    missing = server.url("missing/1.jpg")

    async def run() -> None:
        async with Fetcher(replace(OPEN, timeout=0.2), ban_seconds=1.0) as fetcher:
            for _ in range(10):
                assert (await fetcher.fetch(hang)).kind == "timeout"
            assert "10 requests to 127.0.0.1 timed out" in (await fetcher.fetch(missing)).detail
            assert server.served == {"/hang/1.jpg": 10}
            await asyncio.sleep(1.0)
            # One request finds out whether the host is still down; the others do not wait for a timeout.
            details = [fetched.detail for fetched in await fetch_four_times(fetcher)]
            assert sum("not requested" in detail for detail in details) == 3
            assert server.served == {"/hang/1.jpg": 11}
            await asyncio.sleep(1.0)
            kinds = [(await fetcher.fetch(missing)).kind for _ in range(3)]
            assert kinds == ["http_404"] * 3

    async def fetch_four_times(fetcher: Fetcher) -> list[FetchResult]:
        return await asyncio.gather(*(fetcher.fetch(hang) for _ in range(4)))

    asyncio.run(run())


def test_fetcher_limits_the_pause_of_a_redirect_target_to_the_ban(server: Server) -> None:
    server.targets["there"] = server.url("busy/3600.jpg", "127.0.0.2")
    url = server.url("redirect/there", "127.0.0.1")

    async def run() -> None:
        async with Fetcher(OPEN, ban_seconds=0.5) as fetcher:
            assert (await fetcher.fetch(url)).kind == "http_429"
            assert (await fetcher.fetch(url)).kind == "rate_limited"
            await asyncio.sleep(0.5)
            assert (await fetcher.fetch(url)).kind == "http_429"

    asyncio.run(run())


def test_fetcher_forgets_idle_hosts(server: Server) -> None:
    """Clients of `llava serve` choose the hosts, so hosts must not accumulate."""

    async def run() -> None:
        async with Fetcher(replace(OPEN, timeout=0.2), ban_seconds=0.2) as fetcher:
            for number in range(1, 6):
                await fetcher.fetch(server.url("missing/1.jpg", f"127.0.1.{number}"))
                await fetcher.fetch(f"http://127.0.2.{number}:9/1.jpg")  # a closed port
            assert not fetcher._hosts
            down = [server.url("hang/1.jpg", f"127.0.3.{number}") for number in range(1, 6)]
            await asyncio.gather(*map(fetcher.fetch, down))
            assert len(fetcher._hosts) == 5, "their timeouts are counted"
            await asyncio.sleep(0.5)
            await fetcher.fetch(server.url("missing/1.jpg"))
            assert not fetcher._hosts

    asyncio.run(run())


def test_fetch_all_does_not_give_up_on_a_host_because_of_slow_redirects_to_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The redirecting hosts use up the time of their rows; the target of the redirects answers quickly."""
    request_once = Fetcher._request
    target = "127.0.0.1"

    async def slow_request(self: Fetcher, url: Any, headers: Headers) -> Any:
        await asyncio.sleep(0.15 if url.host == target else 0.95)
        return await request_once(self, url, headers)

    assert fetch(server.url("ok/1.jpg"))[0].kind == "ok"
    monkeypatch.setattr(Fetcher, "_request", slow_request)
    server.targets["there"] = server.url("ok/1.jpg", target)
    slow = [server.url("redirect/there", f"127.0.2.{number}") for number in range(1, 25)]
    healthy = [server.url(f"ok/{number}.jpg", target) for number in range(24)]
    results = fetch([*slow, *healthy], replace(OPEN, timeout=1, per_host=2))
    assert kinds_of(results[: len(slow)]) == {"timeout"}
    assert kinds_of(results[len(slow) :]) == {"ok"}


def test_fetch_all_does_not_give_up_on_a_host_because_of_the_pause_of_another(
    server: Server,
) -> None:
    """Some URLs of a host redirect to another host, which requests a long pause."""
    server.targets["there"] = server.url("busy/3600.jpg", "127.0.0.2")
    urls = []
    for number in range(20):
        path = "redirect/there" if number % 4 == 0 else f"ok/{number}.jpg"
        urls.append(server.url(path, "127.0.0.1"))
    kinds = Counter(fetched.kind for fetched in fetch(urls, replace(OPEN, per_host=1)))
    assert kinds == {"ok": 15, "http_429": 1, "rate_limited": 4}
    assert server.served["/busy/3600.jpg"] == 1


def test_fetch_all_waits_for_the_time_in_retry_after(server: Server) -> None:
    start = time.monotonic()
    (fetched,) = fetch(server.url("busy/1.jpg"), FetchOptions(allow_private=True, retries=1))
    assert (fetched.kind, fetched.http) == ("http_429", 429)
    assert server.served == {"/busy/1.jpg": 2}
    assert time.monotonic() - start >= 1


def test_fetch_all_gives_up_on_a_host_that_requests_a_long_pause(server: Server) -> None:
    urls = [server.url(f"ok/{number}.jpg") for number in range(20)]
    options = FetchOptions(allow_private=True, per_host=1)
    results = fetch([server.url("busy/3600.jpg"), *urls], options)
    kinds = Counter(fetched.kind for fetched in results)
    assert kinds == {"http_429": 1, "rate_limited": 20}
    assert sum(server.served.values()) == 1


def test_fetch_all_gives_up_on_a_host_that_requests_many_pauses(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause is short, but one pause for each row of a long list would add up to hours."""
    monkeypatch.setattr(fetch_hosts, "MAX_PAUSE", 1.5)
    kinds = Counter(fetched.kind for fetched in fetch([server.url("busy/1.jpg")] * 50))
    assert kinds["rate_limited"] > 30
    assert kinds["http_429"] == 50 - kinds["rate_limited"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("\u00b2", None),
        ("-5", None),
        ("soon", None),
        ("Mon, 01 Jan 0001 00:00:00 -0000", 0),
        ("9" * 400, float("inf")),
        ("Mon, 01 Jan 2001 00:00:00 +9999", None),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
        (", ::", None),
    ],
)
def test_parse_retry_after(value: str, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


DATE_PIECES = [
    "Fri,",
    "31",
    "Dec",
    "9" * 25,
    "23:59:59",
    "GMT",
    "-0000",
    "+9999",
    ":",
    ",",
    "1e9",
    "-",
]


@given(st.lists(st.sampled_from(DATE_PIECES) | st.text(max_size=4), max_size=8).map(" ".join))
def test_parse_retry_after_of_any_text_is_a_pause_or_none(value: str) -> None:
    pause = parse_retry_after(value)
    assert pause is None or pause >= 0


def test_fetch_all_retries_resets_and_server_errors_but_not_timeouts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_hosts, "RETRY_PAUSE", 0.3)
    kinds = ("reset", "broken", "missing", "hang")
    urls = [server.url(f"{kind}/1.jpg") for kind in kinds]
    fetch(urls, FetchOptions(allow_private=True, timeout=1, retries=2))
    # aiohttp repeats a request by itself if the server has closed the reused connection.
    resets = server.served.pop("/reset/1.jpg")
    assert 3 <= resets <= 6
    assert server.served == {"/broken/1.jpg": 3, "/missing/1.jpg": 1, "/hang/1.jpg": 1}
