"""Parse the URLs that are requested, and send them as they are.

Some servers sign the exact path of an image (thumbor, imgproxy, S3, GCS), or distinguish `%2F` from `/` and `%26` from
`&`. So a valid URL is sent byte for byte (RFC 3986, section 2.2): percent-encodings are neither decoded nor
normalized, and `..` is left to the server. Characters that a URL must not contain (spaces, quotes, anything beyond
ASCII) are percent-encoded, as browsers and curl do:

    http://a.example/x%3Ay/%28b%29?c=%26    sent as it is
    http://a.example/my cat.jpg             http://a.example/my%20cat.jpg
    http://bücher.example/ü.jpg             http://xn--bcher-kva.example/%C3%BC.jpg

The host is compared, counted and sent in its encoded form only (`raw_host`). Not every ASCII name can be decoded: the DNS
may contain `xn--a`, which is not the encoded form of any Unicode name.

The part that decides where the request goes, between `//` and the path, is checked strictly. It must be a host,
with an optional user and port, so that two programs cannot read different hosts from the same URL.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import urljoin

from yarl import URL

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HTTP_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)", re.IGNORECASE | re.DOTALL)
# [IPv6 address] or a name, and a port. The name may contain characters beyond ASCII.
_HOST_AND_PORT = re.compile(
    r"(?P<host>\[[0-9A-Fa-f]*:[0-9A-Fa-f:.]+(?:%25[0-9A-Za-z._~-]+)?\]|[^\x00-\x20\x7f\"#%/:<>?@\[\\\]^`{|}]+)"
    r"(?::(?P<port>[0-9]{0,5}))?"
)
_MAX_PORT = 65_535
# Limits of a name in the DNS (RFC 1035, section 2.3.4). Longer names cannot be looked up.
_MAX_LABEL = 63
_MAX_NAME = 253
# Characters that RFC 3986 does not allow in a URL. It does not allow square brackets outside of the host or a lone
# percent sign either, but browsers send them unchanged, so they are kept.
_INVALID = re.compile(r"[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]+")
_LINE_BREAKS = str.maketrans("", "", "\t\r\n")
# White space and control characters, which browsers remove around a URL.
_AROUND = "".join(map(chr, range(0x21)))
_SHOWN_CHARACTERS = 100


class UrlError(ValueError):
    """A URL that is not requested.

    Attributes:
        kind: "bad_url", or "scheme" for a scheme other than http and https.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse_url(text: str) -> URL:
    """Return the URL to request.

    Args:
        text: The URL. Bytes that are not UTF-8 may be in it as surrogates, as aiohttp reads them from headers.

    Raises:
        UrlError: The text is not a URL, has another scheme, or has no valid host and port.
    """
    # Remove line breaks and surrounding spaces as browsers do: URLs in HTML and in lists may be wrapped and indented.
    text = text.strip(_AROUND).translate(_LINE_BREAKS)
    match = _HTTP_URL.match(text)
    if match is None:
        raise _scheme_error(text)
    scheme, authority, target = match.groups()
    scheme = scheme.lower()
    target = _encode_invalid(target)
    if not target.startswith("/"):
        target = f"/{target}"
    # Pass the query as a part of the path, because yarl would drop the question mark of an empty query.
    return URL.build(
        scheme=scheme,
        authority=_parse_authority(scheme, authority),
        path=target,
        encoded=True,
    )


def resolve_redirect(url: URL, location: str) -> URL:
    """Return the URL that a `Location` header leads to.

    Raises:
        UrlError: The target is not a URL that can be requested; see `parse_url`.
    """
    location = location.strip(_AROUND)
    if _SCHEME.match(location):
        return parse_url(location)
    try:
        return parse_url(urljoin(str(url), location))
    except UrlError:
        raise
    # `urljoin` fails, for example for "//[/", whose bracket contains no address.
    except ValueError as error:
        raise UrlError(
            "bad_url", f"redirect to {location[:_SHOWN_CHARACTERS]!r}: {error}"
        ) from None


def host_of(url: str) -> str:
    """Return the host of a URL in the encoded form that is sent, or "" if the URL is not valid."""
    # Parse scheme and host only: they repeat, so most calls are answered from the cache. Add a slash, because white
    # space after the host makes a URL invalid, but `parse_url` removes white space at the end of a URL.
    origin = url.strip(_AROUND).split("/", 3)[:3]
    return _parse_host("/".join([*origin, ""]))


@lru_cache(maxsize=4096)
def _parse_host(origin: str) -> str:
    try:
        return parse_url(origin).raw_host or ""
    except UrlError:
        return ""


def _scheme_error(text: str) -> UrlError:
    """Return the error for a text that does not begin with http:// or https://."""
    scheme = _SCHEME.match(text)
    shown = repr(text[:_SHOWN_CHARACTERS])
    if scheme is None:
        return UrlError(
            "bad_url", f"expected a URL that begins with http:// or https://, found {shown}"
        )
    if scheme[1].lower() in ("http", "https"):
        return UrlError("bad_url", f"no // after the scheme of {shown}")
    return UrlError("scheme", f"only http and https are fetched, not {scheme[1][:40]!r}")


@lru_cache(maxsize=4096)
def _parse_authority(scheme: str, authority: str) -> str:
    """Return user, host and port as they are sent: "user@xn--bcher-kva.example:8080".

    Raises:
        UrlError: There is no host, or the host or the port is not valid.
    """
    user, at, host_and_port = authority.rpartition("@")
    match = _HOST_AND_PORT.fullmatch(host_and_port)
    shown = repr(authority[:_SHOWN_CHARACTERS])
    if match is None:
        raise UrlError("bad_url", f"no valid host and port in {shown}")
    port = int(match["port"]) if match["port"] else None
    # Browsers treat a backslash as a slash. They would read the part before it as the host, and the rest as the path.
    if (port or 0) > _MAX_PORT or "\\" in user:
        raise UrlError("bad_url", f"no valid host and port in {shown}")
    try:
        # A surrogate stands for a byte of a redirect that is not UTF-8: `decode` raises UnicodeDecodeError, a ValueError.
        host = match["host"].strip("[]").encode("utf-8", "surrogateescape").decode()
        # yarl encodes a name beyond ASCII (IDNA 2008 and UTS 46), and checks the rest.
        url = URL.build(scheme=scheme, host=host, port=port)
    except ValueError as error:
        raise UrlError("bad_url", f"no valid host in {shown}: {error}") from None
    problem = _name_problem(url.raw_host or "")
    if problem:
        raise UrlError("bad_url", f"no valid host in {shown}: {problem}")
    return f"{_encode_invalid(user)}{at}{url.raw_authority}"


def _name_problem(host: str) -> str:
    """Return why the DNS cannot contain a host name, given in encoded form; "" if it can, or for an IPv6 address."""
    if ":" in host:
        return ""
    # The encoding replaces a full-width percent sign by "%", and an ellipsis by "...", which are not valid in a name.
    if not _HOST_AND_PORT.fullmatch(host):
        return f"{host[:_SHOWN_CHARACTERS]!r} is not a host name"
    name = host.removesuffix(".")
    lengths = [len(label) for label in name.split(".")]
    if min(lengths) == 0:
        return "a part of the name is empty"
    if max(lengths) > _MAX_LABEL or len(name) > _MAX_NAME:
        return f"a part of the name has more than {_MAX_LABEL} characters, or the name has more than {_MAX_NAME}"
    return ""


def _encode_invalid(text: str) -> str:
    """Percent-encode the characters that a URL must not contain, and keep all others."""
    if not _INVALID.search(text):
        return text
    return _INVALID.sub(_percent_encode, text)


def _percent_encode(match: re.Match[str]) -> str:
    try:
        data = match[0].encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise UrlError("bad_url", f"not Unicode: {match[0][:_SHOWN_CHARACTERS]!r}") from None
    return "".join(f"%{byte:02X}" for byte in data)
