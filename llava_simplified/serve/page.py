"""The routes of the web page, whose responses are prepared when the server starts.

The page is a client of the server's own API: `page.js` calls `/v1/chat/completions` and `/v1/attention`,
so the API's limits apply. For security, the routes here accept no file name, URL or body from a request,
and have no state.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_simplified.captioning.inputs import IMAGE_SUFFIXES
from llava_simplified.data.images import ImageError, decode_image
from llava_simplified.model.generation_options import DEFAULT_TEMPERATURE
from llava_simplified.serve.api import Limits

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 12
DEFAULT_MAX_TOKENS = 64
MAX_ANSWERS = 8  # per question
_EXAMPLE_SIZE = 768  # maximum width and height in pixels of an example
_JPEG_QUALITY = 90
_SCRIPTS = ("page.js", "page_attention.js", "page_client.js", "page_image.js")

# Restrict scripts, styles and requests to this server. Even if the page inserted text from the model or
# the user as HTML by mistake, that text could not load or send anything. blob: and data: allow the user's images.
PAGE_HEADERS = {
    "content-security-policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        ]
    ),
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-cache",  # a new version of the server may have a new page
}


def find_examples(folder: Path, count: int = MAX_EXAMPLES) -> list[Path]:
    """Return at most `count` images of a folder and its subfolders, evenly spread over the sorted paths.

    Raises:
        ValueError: The folder cannot be read, or contains no images.
    """
    try:
        # Raise an error for a folder that cannot be read. `rglob` below would silently find nothing.
        os.scandir(folder).close()
    except OSError as error:
        raise ValueError(f"--examples {folder}: {error.strerror}") from None
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ValueError(
            f"--examples {folder}: no images found; pass a folder that contains files such as cat.jpg"
        )
    if len(found) <= count:
        return found
    return [found[index * len(found) // count] for index in range(count)]


def load_examples(paths: Sequence[Path]) -> list[bytes]:
    """Read images and return them as JPEG files of at most 768 x 768 pixels.

    Images that cannot be read are skipped with a warning.

    Raises:
        ValueError: None of the images can be read.
    """
    examples: list[bytes] = []
    for path in paths:
        try:
            image = Image.fromarray(decode_image(path.read_bytes()))
        except (ImageError, OSError) as error:
            logger.warning("--examples: skipped %s: %s", path, error)
            continue
        # Encode the image again, so that metadata in the file (GPS position, comments) is not published.
        image.thumbnail((_EXAMPLE_SIZE, _EXAMPLE_SIZE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
        examples.append(file.getvalue())
    if paths and not examples:
        raise ValueError(
            f"--examples: none of the {len(paths)} images can be read, see the warnings above; pass a folder with other "
            "images"
        )
    return examples


def page_routes(
    name: str,
    instruction: str,
    limits: Limits,
    batch_size: int,
    key_required: bool = False,
    examples: Sequence[bytes] = (),
) -> list[Route]:
    """Return the routes of the page.

    Args:
        name: Name of the model.
        instruction: Default instruction of the model, used if the question is empty.
        limits: Limits of the API.
        batch_size: Maximum number of sequences in the engine's batch.
        key_required: Whether the API requires a key.
        examples: JPEG files, from `load_examples`.
    """
    # The settings of the server that the page needs. They are public, because the page is loaded before the
    # user can enter an API key.
    settings: dict[str, Any] = {
        "model": name,
        "instruction": instruction,
        "key_required": key_required,
        "examples": len(examples),
        "max_body": limits.max_body,
        "max_tokens": limits.max_tokens,
        "default_max_tokens": min(DEFAULT_MAX_TOKENS, limits.max_tokens),
        "max_answers": min(MAX_ANSWERS, batch_size),
        "sampling_temperature": DEFAULT_TEMPERATURE,
    }

    async def page_settings(_: Request) -> Response:
        return JSONResponse(settings, headers=PAGE_HEADERS)

    # Use one route per file. A route with a file name as a parameter could be exploited to read other files.
    routes = [
        _static_route("/", _read("page.html"), "text/html"),
        _static_route("/page.css", _read("page.css"), "text/css"),
        Route("/page.json", page_settings),
    ]
    for script in _SCRIPTS:
        routes.append(_static_route(f"/{script}", _read(script), "text/javascript"))
    for number, example in enumerate(examples):
        routes.append(_static_route(f"/examples/{number}", example, "image/jpeg"))
    return routes


def _read(file_name: str) -> bytes:
    """Return the content of a file of this package."""
    assert __package__
    return resources.files(__package__).joinpath(file_name).read_bytes()


def _static_route(path: str, content: bytes, media_type: str) -> Route:
    """Return a route that always has the same response."""

    async def static(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return Route(path, static)
