"""How images are fetched, and the names of all failures. Light, so that the parsers of commands can import it."""

from __future__ import annotations

from dataclasses import dataclass

# Why a URL gave no image. These names are written to manifests, counted in reports, and accepted by --retry. In
# addition there is http_NNN for every status other than 200.
FAILURE_KINDS = (
    # The URL itself, or a rule forbids the request.
    "bad_url",
    "scheme",
    "blocked_address",
    "robots",
    # The connection.
    "dns",
    "connect",
    "refused",
    "tls",
    "connection",
    "protocol",
    # The answer.
    "timeout",
    "too_slow",
    "rate_limited",
    "redirect",
    "opt_out",
    # The body.
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
    """How images are fetched.

    Attributes:
        concurrency: Requests in flight at once.
        per_host: Requests in flight at once to one host.
        timeout: Seconds for one image, with all redirects and the body.
        max_bytes: Largest body, also after decompression.
        max_pixels: Largest image; the default is `data.images.MAX_PIXELS`, the limit of training.
        resize: Shorter side in pixels to which larger images are shrunk; 0 keeps the bytes.
        retries: Further attempts after a failure that may be gone a moment later.
        contact: A URL or mail address for the User-Agent header.
        robots: Obey each host's robots.txt.
        allow_private: Allow private addresses, for one's own mirror.
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
