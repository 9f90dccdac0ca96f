"""Host names with characters beyond ASCII are resolved as by curl; an invalid host is an error of its own row only."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest
from downloads import read_manifest
from hypothesis import example, given
from hypothesis import strategies as st
from servers import Server, loopback_server  # noqa: F401 - a fixture

from llava_simplified.prepare.download import download
from llava_simplified.prepare.fetch import FetchResult
from llava_simplified.prepare.fetch_hosts import fetch_all
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prepare.request_url import UrlError, host_of, parse_url

OPEN = FetchOptions(allow_private=True, timeout=5, retries=0)
# Host in the URL -> name that is looked up in the DNS: IDNA 2008 with the mapping of UTS 46, as in curl.
NAMES = {
    "b\u00fccher.example": "xn--bcher-kva.example",
    "B\u00dcCHER.Example": "xn--bcher-kva.example",
    "bu\u0308cher.example": "xn--bcher-kva.example",  # decomposed
    "b\u00fccher\u3002example": "xn--bcher-kva.example",  # an ideographic full stop
    "b\u00fccher.example.": "xn--bcher-kva.example.",
    "XN--BCHER-KVA.example": "xn--bcher-kva.example",
    "fa\u00df.example": "xn--fa-hia.example",  # not fass.example, as in 2003
    "\u0430pple.example": "xn--pple-43d.example",  # Cyrillic and Latin
    "\u4f8b\u3048.\u30c6\u30b9\u30c8": "xn--r8jz45g.xn--zckzah",
    "\u2603.example": "xn--n3h.example",
    "a_b.example": "a_b.example",
    # Not valid as Unicode, but the DNS may contain them.
    "xn--a": "xn--a",
    "xn--a.example": "xn--a.example",
    "xn--0.example": "xn--0.example",
    "xn--.example": "xn--.example",
    "xn--zzzzzzzzzz99999999999999": "xn--zzzzzzzzzz99999999999999",
    "a" * 63 + ".example": "a" * 63 + ".example",
}
INVALID_HOSTS = [
    *("a..example", ".a.example", ".", "..", "\u2024\u2024", "xn--\u00fc.example"),
    *("a" * 64 + ".example", "\u00fc" * 60 + ".example", ".".join(["a" * 60] * 5)),
    *("\uff0541.example", "a\uff0fb.example", "a\uff20b.example", "a\u200db.example"),
    *("\u0629a.example", "\udcc3.example"),
    *("[fe80::1%eth0]", "[fe80::1%25]", "[1.2.3.4]", "[v1.a]", "[::1"),
]


class StubResolver(aiohttp.abc.AbstractResolver):
    """Resolve every name to the loopback address, and record the names."""

    names: ClassVar[list[str]] = []

    def __init__(self, *_: Any, **__: Any) -> None: ...

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        self.names.append(host)
        address = {"hostname": host, "host": "127.0.0.1", "port": port, "proto": 0, "flags": 0}
        return [{**address, "family": socket.AF_INET}]

    async def close(self) -> None: ...


@pytest.fixture(name="looked_up")
def stub_resolver(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the DNS with `StubResolver`, and return the list of the names that it resolves."""
    monkeypatch.setattr(aiohttp.connector, "DefaultResolver", StubResolver)
    monkeypatch.setattr(StubResolver, "names", [])
    return StubResolver.names


def fetch(urls: list[str], options: FetchOptions = OPEN) -> list[FetchResult]:
    async def run() -> list[FetchResult]:
        results = {row: fetched async for row, _, fetched in fetch_all(enumerate(urls), options)}
        return [results[row] for row in range(len(urls))]

    return asyncio.run(run())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("robots", [False, True])
def test_name_is_resolved_and_sent_as_by_curl(
    server: Server, looked_up: list[str], name: str, robots: bool
) -> None:
    server.targets["robots"] = ""
    options = FetchOptions(allow_private=True, timeout=5, retries=0, robots=robots)
    url = server.url("ok/\u00fc.jpg", name)
    (fetched,) = fetch([url], options)
    assert fetched.kind == "ok", fetched
    assert looked_up[0] == NAMES[name] == host_of(url)
    assert server.requests[-1].split(" ")[1] == "/ok/%C3%BC.jpg"
    assert f"Host: {NAMES[name]}".lower().rstrip(".") in server.requests[-1].lower()


@pytest.mark.parametrize("name", INVALID_HOSTS)
def test_invalid_host_is_refused_before_the_dns_is_asked(
    server: Server, looked_up: list[str], name: str
) -> None:
    url = server.url("ok/1.jpg", name)
    with pytest.raises(UrlError) as error:
        parse_url(url)
    assert error.value.kind == "bad_url"
    server.targets["there"] = url
    results = fetch([url, server.url("redirect/there"), server.url("ok/1.jpg")])
    assert [fetched.kind for fetched in results] == ["bad_url", "bad_url", "ok"]
    assert not looked_up
    assert all(fetched.detail.encode() for fetched in results[:2]), "can be written to a file"


def test_redirect_to_an_internationalized_name_is_followed(
    server: Server, looked_up: list[str]
) -> None:
    for target in ("b\u00fccher.example", "xn--a"):
        server.targets["there"] = server.url("ok/1.jpg", target)
        (fetched,) = fetch([server.url("redirect/there")])
        assert fetched.kind == "ok", fetched
        assert looked_up.pop() == NAMES[target]


@pytest.mark.medium
def test_download_keeps_rows_whose_host_is_unknown_or_invalid(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The DNS is not replaced here, and it cannot resolve any of the names."""
    names = [name for name in (*NAMES, *INVALID_HOSTS) if name.isprintable()]
    urls = [f"http://{name}:{server.port}/ok/1.jpg" for name in [*names, "127.0.0.1"]]
    source = tmp_path / "urls.txt"
    source.write_text("\n".join(urls))
    with caplog.at_level(logging.ERROR):
        download(str(source), str(tmp_path / "o"), OPEN, workers=1)
    rows = read_manifest(tmp_path / "o")
    assert [row["url"] for row in rows] == urls
    outcomes = {row["url"]: row["error"] or "ok" for row in rows}
    assert outcomes.pop(urls[-1]) == "ok"
    assert set(outcomes.values()) == {"bad_url", "dns"}
    assert not caplog.records


PARTS = (
    st.sampled_from(
        [
            "xn--",
            "a",
            "\u00fc",
            "\u00df",
            "-",
            ".",
            "..",
            "\u3002",
            "\u200d",
            "\u0629",
            "1",
            "_",
            "[",
            "]",
            "::1",
            "%25",
            "%",
        ]
    )
    | st.characters()
)


@given(st.lists(PARTS, min_size=1, max_size=8).map("".join))
@example("xn-- ")
@example("a.example\n")
def test_any_name_is_a_host_or_an_error(name: str) -> None:
    url = f"http://{name}/1.jpg"
    try:
        host = parse_url(url).raw_host
    except UrlError:
        assert host_of(url) == ""
        return
    assert host
    assert host.isascii()
    assert host_of(url) == host
