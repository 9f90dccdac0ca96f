"""The rules of robots.txt: the examples of RFC 9309, and files as servers send them."""

from __future__ import annotations

import asyncio
import gzip
import time
from dataclasses import replace

import pytest
from test_fetch import OPEN, fetch

from llava_simplified.prepare.fetch import Fetcher
from llava_simplified.prepare.robots import RobotsRules


def is_allowed(text: str, path: str) -> bool:
    return RobotsRules(text.splitlines(), "a-robot").allow(path)


EVERY_ROBOT = "User-agent: *\n"


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("", "/x", True),
        ("Disallow:", "/x", True),
        ("Disallow: /", "/x", False),
        ("Disallow: /x", "/x.jpg", False),
        ("Disallow: /x", "/X.jpg", True),
        ("Disallow: /x", "/a/x", True),
        # Wildcards, and the end of the path
        ("Disallow: /*.jpg$", "/a/1.jpg", False),
        ("Disallow: /*.jpg$", "/a/1.jpg?size=1", True),
        ("Disallow: /*.jpg", "/a/1.jpg?size=1", False),
        ("Disallow: *.gif$", "/a.gif.gif", False),
        ("Disallow: /a*b*c$", "/a-bc-c", False),
        ("Disallow: /a*b*c$", "/a-c-c", True),
        ("Disallow: /a$", "/a", False),
        ("Disallow: /a$", "/ab", True),
        ("Disallow: /ab*bc$", "/abc", True),
        ("Disallow: /*?", "/a", True),
        ("Disallow: /*?", "/a?b", False),
        # The longest rule decides, in whatever order the rules are.
        ("Allow: /\nDisallow: /private/", "/private/1.jpg", False),
        ("Disallow: /p\nAllow: /public", "/public/1.jpg", True),
        ("Disallow: /page\nAllow: /page", "/page", True),
        ("Disallow: /*.php\nAllow: /page", "/page.php5", False),
        # Percent-encodings
        ("Disallow: /a%7eb", "/a~b", False),
        ("Disallow: /ü", "/%c3%bc", False),
        ("Disallow: /a%2Fb", "/a/b", True),
        ("Disallow: /a%2fb", "/a%2Fb", False),
        # Form
        ("  DISALLOW :  /x   # a comment", "/x", False),
        ("Sitemap: /x\nCrawl-delay: 1\n\n\nDisallow: /x", "/x", False),
        ("Disallow /x\n<html>\n:\nDisallow: /y", "/x", True),
    ],
)
def test_robots_rules_of_every_robot(rules: str, path: str, allowed: bool) -> None:
    assert is_allowed(EVERY_ROBOT + rules, path) == allowed


@pytest.mark.parametrize("name", ["a-robot", "A-Robot", "a-robot/1.0", "x\nUser-agent: a-robot"])
def test_robots_rules_of_the_robot_replace_those_of_every_robot(name: str) -> None:
    text = f"User-agent: *\nDisallow: /x\n\nUser-agent: {name}\nDisallow: /y\n"
    assert is_allowed(text, "/x")
    assert not is_allowed(text, "/y")


def test_robots_rules_of_other_robots_are_ignored() -> None:
    text = "User-agent: robot\nUser-agent: a-robot-2\nUser-agent: a\nDisallow: /\n"
    assert is_allowed(text, "/x")
    # All groups of the robot count.
    groups = "User-agent: a-robot\nDisallow: /x\n" + text + "User-agent: a-robot\nDisallow: /y\n"
    assert [is_allowed(groups, path) for path in ("/x", "/y", "/z")] == [False, False, True]


def test_robots_rules_with_many_wildcards_take_little_time() -> None:
    start = time.process_time()
    assert is_allowed(EVERY_ROBOT + "Disallow: /" + "*a" * 5_000 + "$", "/" + "a" * 4_999 + "b")
    assert time.process_time() - start < 1


# ---- reading the file ----


def fetch_with_robots(response: bytes, path: str = "a.jpg") -> tuple[str, str]:
    """Return the kind and the detail of a request to a server that sends one response to every request."""
    options = replace(OPEN, robots=True)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        writer.close()

    async def run() -> tuple[str, str]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Fetcher(options) as fetcher:
            fetched = await fetcher.fetch(f"http://127.0.0.1:{port}/{path}")
        return fetched.kind, fetched.detail

    return asyncio.run(run())


@pytest.mark.parametrize("compress", [False, True])
def test_fetch_reads_robots_txt_that_was_compressed_without_being_asked(compress: bool) -> None:
    body = b"\xef\xbb\xbfUser-agent: *\nDisallow: /*.jpg$\n"
    head = b"HTTP/1.1 200 OK\r\n"
    if compress:
        body = gzip.compress(body)
        head += b"Content-Encoding: gzip\r\n"
    response = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert fetch_with_robots(response)[0] == "robots"
    assert fetch_with_robots(response, "a.jpg?b")[0] == "not_image"


def test_fetch_names_the_reason_why_robots_txt_cannot_be_read() -> None:
    """A host that is down does not forbid anything, and the advice about it is different."""
    options = replace(OPEN, robots=True)
    assert fetch("http://no-such-host.invalid/1.jpg", options)[0].kind == "dns"
    results = fetch(["http://127.0.0.1:9/1.jpg"] * 2, options)
    assert [fetched.kind for fetched in results] == ["refused"] * 2
    blocked = fetch("http://127.0.0.1:9/1.jpg", replace(options, allow_private=False))
    assert blocked[0].kind == "blocked_address"
    response = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    assert fetch_with_robots(response) == ("robots", "robots.txt has status 503")
    response = b"HTTP/1.1 302 Found\r\nLocation: ftp://a/\r\nContent-Length: 0\r\n\r\n"
    kind, detail = fetch_with_robots(response)
    assert kind == "robots"
    assert "only http and https" in detail
