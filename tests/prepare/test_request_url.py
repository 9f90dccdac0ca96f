"""Valid URLs stay unchanged, invalid characters are encoded, and other texts are errors of the kind bad_url or scheme."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava_simplified.prepare.request_url import UrlError, host_of, parse_url, resolve_redirect

# The characters of RFC 3986, percent-encodings in upper and lower case, and paths that could be normalized.
PIECES = st.sampled_from(
    [*"aZ09-._~:/?@!$&'()*+,;=%[]", "%3A", "%2f", "%28", "%26", "%C3%BC", "/../", "//"]
)
TARGETS = st.lists(PIECES, max_size=12).map("".join)
SIGNED = [
    "/hmac=abc/300x200/smart/http%3A%2F%2Fcdn.example%2Fp.jpg",
    "/a%28b%29.jpg",
    "/Wiki%26Co.jpg",
    "/a/../b/./c//d.jpg",
    "/x.jpg?sig=a%2Bb%3D&e=1+2&empty=&&",
    "/100%.jpg",
    "/%zz",
]


@given(TARGETS)
@example(SIGNED[0])
def test_parse_url_keeps_every_byte_of_a_valid_url(target: str) -> None:
    url = parse_url(f"https://a.example:8443/{target}")
    assert url.raw_path_qs == f"/{target}"
    assert (url.scheme, url.host, url.port) == ("https", "a.example", 8443)


@given(TARGETS)
def test_resolve_redirect_keeps_every_byte_of_an_absolute_url(target: str) -> None:
    start = parse_url("http://b.example/1.jpg")
    assert resolve_redirect(start, f"http://a.example/{target}") == parse_url(
        f"http://a.example/{target}"
    )


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/x%2Fy?a=%26", "http://b.example/x%2Fy?a=%26"),
        ("y(1).jpg", "http://b.example/a/y(1).jpg"),
        ("//c.example/%28", "http://c.example/%28"),
        ("?q=%3A", "http://b.example/a/1.jpg?q=%3A"),
        ("/\udcc3\udca9 x.jpg", "http://b.example/%C3%A9%20x.jpg"),  # raw bytes of a header
    ],
)
def test_resolve_redirect_follows_relative_targets(location: str, expected: str) -> None:
    assert str(resolve_redirect(parse_url("http://b.example/a/1.jpg"), location)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  http://a.example/my cat.jpg\r\n", "http://a.example/my%20cat.jpg"),
        ('http://a.example/<"{}|\\^`>', "http://a.example/%3C%22%7B%7D%7C%5C%5E%60%3E"),
        ("http://bücher.example/ü.jpg?ü", "http://xn--bcher-kva.example/%C3%BC.jpg?%C3%BC"),
        ("HTTP://A.example:80/x#fragment", "http://a.example/x"),
        ("http://user:pass@a.example/x", "http://user:pass@a.example/x"),
        ("http://[2606:4700::1111]:8080/x", "http://[2606:4700::1111]:8080/x"),
    ],
)
def test_parse_url_turns_a_text_into_a_valid_request_url(text: str, expected: str) -> None:
    assert str(parse_url(text)) == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("http://[]@/1.jpg", "bad_url"),
        ("http://[1.2.3]/", "bad_url"),
        ("http://[::1/1.jpg", "bad_url"),
        ("http:///1.jpg", "bad_url"),
        ("http://:80/", "bad_url"),
        ("http://a.example:99999/", "bad_url"),
        ("http://a b/", "bad_url"),
        ("http://good.example\\@10.0.0.1/", "bad_url"),
        ("http://a%2eexample/", "bad_url"),
        ("http://a.example/\ud83d.jpg", "bad_url"),
        ("no url", "bad_url"),
        ("http:1.jpg", "bad_url"),
        ("file:///etc/passwd", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
    ],
)
def test_parse_url_refuses_invalid_urls_and_other_schemes(text: str, kind: str) -> None:
    with pytest.raises(UrlError) as error:
        parse_url(text)
    assert error.value.kind == kind


ANY_PIECES = st.sampled_from(
    [
        "http:",
        "https:",
        "//",
        "/",
        "[",
        "]",
        "@",
        ":",
        "a.example",
        "::1",
        "%",
        "?",
        "#",
        "\\",
        " ",
        "\n",
        "ü",
        "١",
    ]
) | st.text(max_size=3)


@given(
    st.lists(ANY_PIECES, max_size=10).map("".join), st.lists(ANY_PIECES, max_size=8).map("".join)
)
@example("http://[]@/1.jpg", "//[/")
@example("http://a.example/", "//[]@/1.jpg")
def test_any_text_is_a_url_or_a_url_error(text: str, location: str) -> None:
    host_of(text)
    start = parse_url("http://b.example/a/1.jpg")
    for resolve in (lambda: parse_url(text), lambda: resolve_redirect(start, location)):
        try:
            url = resolve()
        except UrlError:
            continue
        assert url.host
        assert url.scheme in ("http", "https")
        assert re.fullmatch(r"[!-~]+", str(url)), "only printable ASCII is sent"
