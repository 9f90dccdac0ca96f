"""The downloader under attack: every threat, by a server that really does it."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict
from servers import Server, loopback, loopback_server  # noqa: F401 - a fixture

from llava_simplified.prepare import fetch
from llava_simplified.prepare.fetch import FetchOptions, FetchResult, fetch_all, opted_out

OPEN = FetchOptions(allow_private=True, timeout=3, retries=0)


def get(urls: str | list[str], options: FetchOptions = OPEN) -> list[FetchResult]:
    """Results in the order of the URLs."""
    urls = [urls] if isinstance(urls, str) else urls

    async def run() -> list[FetchResult]:
        found = {row: fetched async for row, _, fetched in fetch_all(enumerate(urls), options)}
        return [found[i] for i in range(len(urls))]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "kind", [kind for kind in loopback.EXPECTED if kind not in ("drip", "busy")]
)
def test_every_outcome_is_reported_by_its_true_cause(server: Server, kind: str) -> None:
    options = FetchOptions(allow_private=True, timeout=1 if kind == "hang" else 20, retries=0)
    (fetched,) = get(server.url(f"{kind}/3.jpg"), options)
    outcome, digest = loopback.expected(kind, 3)
    assert fetched.kind == outcome, fetched
    if digest:
        assert hashlib.sha256(fetched.picture.data).hexdigest() == digest, "kept byte by byte"
    else:
        assert fetched.picture is None
        assert fetched.detail.encode(), "can be written down"


def test_one_byte_a_second_is_given_up_early(server: Server) -> None:
    start = time.monotonic()
    (fetched,) = get(server.url("drip/1.jpg"), FetchOptions(allow_private=True, timeout=60))
    assert fetched.kind == "too_slow"
    assert time.monotonic() - start < 8


def test_an_endless_body_stops_at_the_limit(server: Server) -> None:
    (fetched,) = get(
        server.url("endless/1.jpg"),
        FetchOptions(allow_private=True, timeout=20, max_bytes=1_000_000),
    )
    assert fetched.kind == "too_large"
    assert "1000000" in fetched.detail


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.org/1.jpg", "data:image/png;base64,AAAA", "javascript:x"],
)
def test_other_schemes_are_refused(url: str) -> None:
    assert get(url)[0].kind == "scheme"


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
def test_what_is_no_url_is_an_outcome_and_no_exception(url: str) -> None:
    assert get(url)[0].kind in ("bad_url", "scheme", "dns")


PRIVATE = ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0"]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_however_they_are_written(server: Server, host: str) -> None:
    (fetched,) = get(f"http://{host}:{server.port}/ok/1.jpg", FetchOptions(timeout=5, retries=0))
    assert fetched.kind in ("blocked_address", "dns", "bad_url"), fetched
    assert not server.served, "nobody was asked"
    if host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"):
        assert fetched.kind == "blocked_address", fetched


@pytest.mark.parametrize("host", PRIVATE)
def test_a_redirect_to_a_private_address_is_refused(
    server: Server, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hop is let through as if 127.0.0.2 were a public server, the second must not be."""
    public = fetch._is_public
    monkeypatch.setattr(
        fetch, "_is_public", lambda address: address == "127.0.0.2" or public(address)
    )
    server.targets["there"] = f"http://{host}:{server.port}/ok/secret.jpg"
    url = server.url("redirect/there", "127.0.0.2")
    (fetched,) = get(url, FetchOptions(timeout=5, retries=0))
    assert fetched.kind in ("blocked_address", "dns", "bad_url"), fetched
    assert list(server.served) == ["/redirect/there"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("255.255.255.255", False), ("224.0.0.1", False),
        ("::", False), ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False),
        ("::ffff:10.0.0.1", False), ("2002:7f00:1::", False), ("64:ff9b::7f00:1", False),
        ("2001:0:0:0:0:0:80ff:fffe", False),  # teredo of 127.0.0.1
        ("64:ff9b:1:7f00:0:100:808:808", False),  # a translator of one's own: only it knows which bits are the address
        ("fec0::1", False), ("::7f00:1", False), ("::ffff:0:7f00:1", False), ("5f00::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert fetch._is_public(address) == public


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
def test_opt_outs_are_read(headers: list, forbids: bool) -> None:
    assert bool(opted_out(CIMultiDict(headers))) == forbids


def test_the_user_agent_is_honest(server: Server) -> None:
    get(
        server.url("ok/1.jpg"),
        FetchOptions(allow_private=True, contact="https://lab.example/crawl"),
    )
    (agent,) = [line for line in server.requests[0].splitlines() if line.startswith("User-Agent: ")]
    assert agent.startswith("User-Agent: llava-simplified/")
    assert "(+https://lab.example/crawl)" in agent


def test_at_most_four_requests_to_a_host_and_hosts_take_turns(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One host has 60 URLs that come first in the list, ten others have one each."""
    under_way: Counter[str] = Counter()
    most: Counter[str] = Counter()
    order: list[str] = []
    real = fetch.Fetcher._get

    async def watched(
        self: fetch.Fetcher, url: str, headers: dict[str, str] | None
    ) -> tuple[bytes, int]:
        host = fetch.host_of(url)
        order.append(host)
        under_way[host] += 1
        most[host] = max(most[host], under_way[host])
        try:
            return await real(self, url, headers)
        finally:
            under_way[host] -= 1

    monkeypatch.setattr(fetch.Fetcher, "_get", watched)
    many = [server.url(f"ok/{i}.jpg", "127.0.0.1") for i in range(60)]
    few = [server.url("ok/1.jpg", f"127.0.0.{i}") for i in range(2, 12)]
    results = get([*many, *few], FetchOptions(allow_private=True, concurrency=32))
    assert {fetched.kind for fetched in results} == {"ok"}
    assert most["127.0.0.1"] == 4
    assert set(order[:16]) >= {f"127.0.0.{i}" for i in range(2, 12)}, "the small hosts did not wait"


def test_who_wants_no_more_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfers under way are cancelled, some in the moment in which they end; none may miss it."""

    async def soon(
        self: fetch.Fetcher, url: str, headers: dict[str, str] | None
    ) -> tuple[bytes, int]:
        await asyncio.sleep(0)
        return b"no picture", 200

    async def run() -> None:
        for wanted in range(1, 21):
            results = fetch_all(
                ((i, f"http://{i % 64}.test/{i}") for i in range(640)),
                replace(OPEN, concurrency=64),
            )
            for _ in range(wanted):
                assert (await anext(results))[2].kind == "not_image"
            closing = asyncio.create_task(results.aclose())  # type: ignore[attr-defined]
            done, _ = await asyncio.wait([closing], timeout=5)
            assert done, "a worker goes on"

    monkeypatch.setattr(fetch.Fetcher, "_get", soon)
    asyncio.run(run())


def test_a_host_gets_a_second_connection_only_where_slots_are_free(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten hosts, five slots: each is given its first connection before any its second; its last request closes one."""
    made: list[str] = []
    real = aiohttp.TCPConnector._create_connection

    async def noted(self: Any, request: Any, *rest: Any) -> Any:
        made.append(request.url.host)
        return await real(self, request, *rest)

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", noted)
    hosts = [f"127.0.0.{i}" for i in range(1, 11)]
    results = get(
        [server.url(f"ok/{i}.jpg", host) for i in range(4) for host in hosts],
        replace(OPEN, concurrency=5),
    )
    assert {fetched.kind for fetched in results} == {"ok"}
    assert sorted(made[:10]) == sorted(hosts)
    assert len(made) < 20, "a connection is used again"
    closing = [request for request in server.requests if "connection: close" in request.lower()]
    assert sorted(re.search(r"Host: ([\d.]+)", request)[1] for request in closing) == sorted(hosts)


def test_the_host_with_most_rows_is_begun_first(server: Server) -> None:
    """Begun last, it would be alone at the end, with all but four of the slots idle."""
    few = [server.url("ok/1.jpg", f"127.0.0.{i}") for i in range(2, 12)]
    many = [server.url(f"ok/{i}.jpg", "127.0.0.1") for i in range(12)]
    assert {fetched.kind for fetched in get([*few, *many], replace(OPEN, concurrency=4))} == {"ok"}
    assert "Host: 127.0.0.1:" in "".join(server.requests[:4])


def test_at_most_four_requests_to_a_host_that_many_redirect_to(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for it is not the row's time: forty rows, four at a time, take far longer than one may."""
    under_way = most = 0
    real = fetch.Fetcher._ask

    async def watched(self: fetch.Fetcher, url: Any, headers: dict[str, str] | None) -> Any:
        nonlocal under_way, most
        there = url.host == "127.0.0.1"
        under_way += there
        most = max(most, under_way)
        await asyncio.sleep(0.1)
        try:
            return await real(self, url, headers)
        finally:
            under_way -= there

    assert get(server.url("ok/1.jpg"))[0].kind == "ok"  # the first has the server draw its pictures
    monkeypatch.setattr(fetch.Fetcher, "_ask", watched)
    server.targets["there"] = f"http://127.0.0.1:{server.port}/ok/1.jpg"
    urls = [server.url("redirect/there", f"127.0.2.{i}") for i in range(1, 41)]
    assert {fetched.kind for fetched in get(urls, replace(OPEN, timeout=0.8))} == {"ok"}
    assert most == 4


def test_a_host_that_is_down_is_given_up(server: Server) -> None:
    """It would cost a timeout for each of its rows; a host that answers now and then goes on."""
    down = [server.url(f"hang/{i}.jpg", "127.0.0.2") for i in range(100)]
    mixed = [
        server.url(f"{'hang' if i % 3 else 'missing'}/{i}.jpg", "127.0.0.3") for i in range(30)
    ]
    results = get([*down, *mixed], replace(OPEN, timeout=0.2))
    assert {fetched.kind for fetched in results[:100]} == {"timeout"}
    assert (
        sum("/hang/" in request and "127.0.0.2" in request for request in server.requests)
        <= 10 + OPEN.per_host
    )
    assert "127.0.0.2 was silent 10 times in a row" in results[99].detail
    assert sum("127.0.0.3" in request for request in server.requests) == 30


def test_retry_after_is_waited_for(server: Server) -> None:
    start = time.monotonic()
    (fetched,) = get(server.url("busy/1.jpg"), FetchOptions(allow_private=True, retries=1))
    assert (fetched.kind, fetched.http) == ("http_429", 429)
    assert server.served == {"/busy/1.jpg": 2}
    assert time.monotonic() - start >= 1


def test_a_host_that_asks_for_a_long_pause_is_left_alone(server: Server) -> None:
    urls = [server.url("busy/3600.jpg"), *(server.url(f"ok/{i}.jpg") for i in range(20))]
    options = FetchOptions(allow_private=True, per_host=1)
    assert Counter(fetched.kind for fetched in get(urls, options)) == {
        "http_429": 1,
        "rate_limited": 20,
    }
    assert sum(server.served.values()) == 1


def test_a_host_that_asks_for_pause_after_pause_is_left_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause is short, but two requests for every one of a host's thousand rows would take a night."""
    monkeypatch.setattr(fetch, "_LONGEST_PAUSE", 1.5)
    kinds = Counter(fetched.kind for fetched in get([server.url("busy/1.jpg")] * 50))
    assert kinds["rate_limited"] > 30
    assert kinds["http_429"] == 50 - kinds["rate_limited"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("\u00b2", None), ("-5", None), ("soon", None), ("Mon, 01 Jan 0001 00:00:00 -0000", 0),
     ("9" * 400, float("inf")), ("Mon, 01 Jan 2001 00:00:00 +9999", None)],
)  # fmt: skip
def test_what_a_retry_after_means(value: str, seconds: float | None) -> None:
    assert fetch._retry_after(value) == seconds


def test_connections_do_not_wait_for_their_hosts_next_turn(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of each of eighty hosts: a process may open only so many files, and what it can't open it would
    call the server's fault."""
    count = most = 0

    def made(handler: Any, transport: asyncio.BaseTransport) -> None:
        nonlocal count, most
        count += 1
        most = max(most, count)
        begin(handler, transport)

    def lost(handler: Any, error: Exception | None) -> None:
        nonlocal count
        count -= 1

    begin = loopback._Handler.connection_made
    monkeypatch.setattr(loopback._Handler, "connection_made", made)
    monkeypatch.setattr(loopback._Handler, "connection_lost", lost)
    urls = [server.url(f"ok/{i}.jpg", f"127.0.1.{i % 80 + 1}") for i in range(240)]
    assert {fetched.kind for fetched in get(urls, replace(OPEN, concurrency=8, timeout=20))} == {
        "ok"
    }
    assert most <= 16


def test_resets_and_server_errors_are_tried_again_timeouts_are_not(server: Server) -> None:
    urls = [
        server.url("reset/1.jpg"),
        server.url("broken/1.jpg"),
        server.url("missing/1.jpg"),
        server.url("hang/1.jpg"),
    ]
    get(urls, FetchOptions(allow_private=True, timeout=1, retries=2))
    resets = server.served.pop("/reset/1.jpg")  # aiohttp itself repeats what a kept connection lost
    assert 3 <= resets <= 6
    assert server.served == {"/broken/1.jpg": 3, "/missing/1.jpg": 1, "/hang/1.jpg": 1}


def test_robots_txt_is_obeyed_when_asked(server: Server) -> None:
    server.targets["robots"] = (
        "User-agent: *\n" + "# does not come in one piece\n" * 10_000 + "Disallow: /png/\n"
    )
    urls = [server.url("ok/1.jpg"), server.url("png/1.jpg"), server.url("png/2.jpg")]
    kinds = [fetched.kind for fetched in get(urls, FetchOptions(allow_private=True, robots=True))]
    assert kinds == ["ok", "robots", "robots"]
    assert server.served == {"/robots.txt": 1, "/ok/1.jpg": 1}


def test_names_that_do_not_resolve_and_ports_that_are_closed() -> None:
    assert get("http://no-such-host.invalid/1.jpg")[0].kind == "dns"
    assert get("http://127.0.0.1:9/1.jpg")[0].kind == "refused"


@pytest.mark.parametrize("size", [(60_000, 60_000), (8_000, 8_000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    from llava_simplified.data.images import check_image

    start = time.monotonic()
    with pytest.raises(ValueError, match=r"pixels") as error:
        check_image(loopback.bomb_png(*size))
    assert error.value.kind == "too_large"
    assert time.monotonic() - start < 0.5


def test_aiohttp_still_has_the_hook_that_the_guard_needs() -> None:
    import inspect

    assert "socket_factory" in inspect.signature(aiohttp.TCPConnector.__init__).parameters
