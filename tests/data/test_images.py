"""The one decoder and the one transform, against Pillow and against the stock image processors."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from llava_simplified.data.images import ImageError, check_image, decode_image, read_image_bytes
from llava_simplified.data.transforms import ImageTransform


def photo(width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (width, height), "navy")
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 5, width // 2, height - 5), fill="orange")
    draw.rectangle((width // 2, 10, width - 8, height // 2), fill="white")
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "TIFF"])
def test_every_format_is_read_as_pillow_reads_it(kind: str) -> None:
    data = encoded(photo(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_in_every_colour_space(mode: str) -> None:
    data = encoded(photo(mode=mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).astype(int) - expected).mean() < 1


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode_image(encoded(image, "PNG")) == 255).all()
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode_image(encoded(half, "PNG"))[0, 0].tolist() == [127, 127, 127]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 30000, 65535]], dtype=np.uint16))
    assert decode_image(encoded(image, "PNG"))[0, :, 0].tolist() == [0, 117, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_stand_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(photo(), kind, exif=exif)
    from PIL import ImageOps

    expected = np.asarray(
        ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    ).astype(int)
    got = decode_image(data).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 1
    assert check_image(data)[2:] == expected.shape[1::-1], "width and height as it is seen"


def test_a_truncated_jpeg_is_corrupt_at_every_length() -> None:
    data = encoded(photo(), "JPEG")
    for length in range(200, len(data) - 2, 97):
        with pytest.raises(ImageError) as error:
            decode_image(data[:length])
        assert error.value.kind in ("truncated", "corrupt", "not_image")


def test_bytes_corrupted_in_mid_scan_are_seen() -> None:
    """Pillow shows such a picture with grey stripes, and says nothing."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encoded(Image.fromarray(noise), "JPEG", quality=90))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\xd0" * 20
    with pytest.raises(ImageError) as error:
        decode_image(bytes(data))
    assert error.value.kind == "corrupt"


def verdict(judge: Callable[..., Any], data: bytes) -> str:
    try:
        judge(data, max_pixels=1_000_000)
    except ImageError as error:
        return error.kind
    return "ok"


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
)
def test_whatever_byte_is_wrong_it_is_pixels_or_an_image_error(kind: str) -> None:
    """Of a tag's type in a TIFF Pillow makes a TypeError, of an AVIF without its item table a RuntimeError. And what
    `check_image` says of a file, in less time, is what `decode_image` says."""
    data = encoded(
        photo().resize((24, 16)), kind.split()[-1], **{"progressive": True} if " " in kind else {}
    )
    broken = [data.replace(b"iloc", b"xxxx")]
    for place in range(min(len(data), 700)):
        for value in (0, 5, 255):
            broken.append(data[:place] + bytes([value]) + data[place + 1 :])
    for changed in broken:
        found = verdict(decode_image, changed)
        assert found in ("ok", "not_image", "truncated", "corrupt", "too_large")
        assert verdict(check_image, changed) == found


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"GIF89a", bytes(100)])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert error.value.kind in (["html"] if data[:1] == b"<" else ["not_image", "truncated"])


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert error.value.kind == "too_large"
    with pytest.raises(ImageError, match="90x60 pixels, the limit is 5000"):
        decode_image(encoded(photo(), "PNG"), max_pixels=5000)


def test_an_error_comes_back_whole_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ImageError("missing", "no image x")))
    assert (error.kind, str(error)) == ("missing", "no image x")


def test_absolute_paths_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert read_image_bytes("/data/somebody/train/a.jpg", tmp_path) == b"x"
    assert read_image_bytes("a.jpg", str(tmp_path)) == b"x"
    with pytest.raises(ImageError, match=r"no image .*b\.jpg"):
        read_image_bytes("b.jpg", tmp_path)
    with pytest.raises(ImageError, match="leaves its folder"):
        read_image_bytes("../a.jpg", tmp_path)


def processors() -> dict[str, object]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.efficientnet.image_processing_pil_efficientnet import (
        EfficientNetImageProcessorPil,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return {
        "clip": CLIPImageProcessorPil(),
        "siglip": SiglipImageProcessorPil(),
        "vit": ViTImageProcessorPil(),
        "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 224}),
        "convnext-384": ConvNextImageProcessorPil(),
        "efficientnet": EfficientNetImageProcessorPil(include_top=False),
        "efficientnet-offset": EfficientNetImageProcessorPil(
            include_top=False, rescale_offset=True, rescale_factor=1 / 127.5, do_normalize=True
        ),
    }


@pytest.mark.parametrize("kind", list(processors()))
@pytest.mark.parametrize("size", [(300, 200), (150, 400), (64, 64)])
def test_the_transform_equals_the_stock_processor(
    tmp_path: Path, kind: str, size: tuple[int, int]
) -> None:
    """To two grey levels of 255, where Pillow's weights have 22 bits and torch's 16."""
    processor = processors()[kind]
    processor.save_pretrained(tmp_path)
    transform = ImageTransform.from_pretrained(tmp_path)
    image = photo(*size)
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
    got = transform.normalize(transform(np.asarray(image)))
    assert got.shape == expected.shape == (3, *transform.crop)
    levels = (got - expected).abs() * 255 * torch.tensor(transform.std).view(3, 1, 1)
    assert levels.max() < 2.01
    assert levels.mean() < 0.2


def test_processors_that_pad_are_refused(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not supported"):
        ImageTransform.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no preprocessor_config"):
        ImageTransform.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("resize", [64, 80, (64, 64), 48])
def test_the_region_is_what_the_tower_is_shown(resize: int | tuple[int, int]) -> None:
    """A picture whose colours are its coordinates, read off where the transform has put them."""
    height, width = 250, 500
    y, x = np.mgrid[:height, :width]
    ruler = np.stack([x * 250 / width, y * 250 / height, np.full_like(x, 255)], axis=2).astype(
        np.uint8
    )
    transform = ImageTransform(resize, (64, 64), "bilinear", (0, 0, 0), (1, 1, 1))
    left, top, right, bottom = transform.visible_region(height, width)
    shown = transform(ruler).float()
    for place in (20, 32, 44):
        part = (place + 0.5) / 64
        expected = [left + part * (right - left), top + part * (bottom - top)]
        assert shown[:2, place, place].tolist() == pytest.approx([250 * e for e in expected], abs=3)
    assert (shown[2].min() == 0) == (bottom > 1), (
        "where it reaches beyond the picture, there is black"
    )
