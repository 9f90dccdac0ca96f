"""Options of requests, and the names of all failures. This module imports nothing heavy, so that parsers can use it."""

from __future__ import annotations

from dataclasses import dataclass

# The kinds of failures. These names are written to manifests, counted in reports, and accepted by --retry. In addition
# there is http_NNN for every status code other than 200.
FAILURE_KINDS = (
    # No request was sent: the URL is wrong, or a rule forbids the request.
    "bad_url",
    "scheme",
    "blocked_address",
    "robots",
    # The connection failed.
    "dns",
    "connect",
    "refused",
    "tls",
    "connection",
    "protocol",
    # The server did not send an image in time, or refused to.
    "timeout",
    "too_slow",
    "rate_limited",
    "redirect",
    "opt_out",
    # The body is not a usable image.
    "empty",
    "html",
    "not_image",
    "unsupported",
    "too_large",
    "truncated",
    "corrupt",
    # A fault of this program; the log has its traceback.
    "internal",
)


@dataclass(frozen=True)
class FetchOptions:
    """Options of the requests for images.

    Attributes:
        concurrency: Maximum number of requests in flight.
        per_host: Maximum number of requests in flight per host.
        timeout: Maximum time per image in seconds, including redirects and body.
        max_bytes: Maximum size of the body in bytes, also after decompression.
        max_pixels: Maximum number of pixels; the default is `data.images.MAX_PIXELS`, the limit of training.
        resize: Shrink larger images to this length of the shorter side in pixels; 0 stores the files unchanged.
        retries: Number of retries after a transient failure.
        contact: URL or email address for the User-Agent header.
        robots: Obey each host's robots.txt.
        allow_private: Allow requests to private addresses.
    """

    concurrency: int = 256
    per_host: int = 4
    timeout: float = 10.0
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    resize: int = 0
    retries: int = 1
    contact: str = ""
    robots: bool = False
    allow_private: bool = False
