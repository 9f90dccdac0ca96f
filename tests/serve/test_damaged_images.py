"""An image that cannot be decoded gets status 400 with the kind of the error as its code; the server continues."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from live_server import LiveServer, chat_body, live_server
from PIL import Image

from llava_simplified.model.llava import Llava


@pytest.fixture(scope="module")
def server(model: Llava) -> Iterator[LiveServer]:
    with live_server(model) as server:
        yield server


def damaged_avif() -> bytes:
    """Return an animation with a time scale of zero, by which Pillow divides."""
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "AVIF", save_all=True, append_images=frames[1:], duration=100)
    data = buffer.getvalue()
    scale = data.index((1000).to_bytes(4, "big"), data.index(b"mdhd"))
    return data[:scale] + bytes(4) + data[scale + 4 :]


def jpeg_of_many_scans() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * 3000 + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (damaged_avif(), "corrupt"),
        (jpeg_of_many_scans(), "too_large"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
    ],
    ids=["avif", "scans", "heic", "svg"],
)
def test_damaged_image_is_a_client_error(
    server: LiveServer, photos: list[bytes], data: bytes, code: str
) -> None:
    response = server.post(chat_body(data))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code
    assert server.post(chat_body(photos[0])).status_code == 200
