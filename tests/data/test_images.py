"""Compare the decoder with Pillow, and the transform with Hugging Face's image processors."""

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
import transformers
from PIL import Image, ImageDraw, ImageOps
from sampling import IS_COMPLETE

from llava_simplified.data import transforms
from llava_simplified.data.images import (
    ImageError,
    check_image,
    decode_image,
    load_pixels,
    portable_image,
    read_image_bytes,
    shrink_image,
)
from llava_simplified.data.transforms import ImageTransform

EXIF_ORIENTATION = 274
DAMAGE = (5, 255, 0)  # values of a damaged byte


def draw_photo(width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    """Draw an image without any symmetry."""
    image = Image.new("RGB", (width, height), "navy")
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 5, width // 2, height - 5), fill="orange")
    draw.rectangle((width // 2, 10, width - 8, height // 2), fill="white")
    return image.convert(mode)


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """Return the image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# ---- decoding ----


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "WEBP", "GIF", "TIFF"])
def test_decode_image_equals_pillow(image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(draw_photo(), image_format, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_image_reads_rgb_gray_and_cmyk_jpegs(mode: str) -> None:
    data = encode(draw_photo(mode=mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).astype(int) - expected).mean() < 1


def test_decode_image_puts_transparency_on_white() -> None:
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode_image(encode(transparent, "PNG")) == 255).all()
    half_transparent_black = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode_image(encode(half_transparent_black, "PNG"))[0, 0].tolist() == [127, 127, 127]


def test_decode_image_scales_sixteen_bits_and_does_not_clip() -> None:
    image = Image.fromarray(np.array([[0, 30000, 65535]], dtype=np.uint16))
    assert decode_image(encode(image, "PNG"))[0, :, 0].tolist() == [0, 117, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_decode_image_applies_the_exif_orientation(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encode(draw_photo(), image_format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    expected = np.asarray(upright).astype(int)
    pixels = decode_image(data).astype(int)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 1
    checked = check_image(data)
    assert (checked.width, checked.height) == expected.shape[1::-1], "those of the upright image"


@pytest.mark.parametrize("orientation", [1, 6])
def test_shrink_image_makes_an_upright_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encode(draw_photo(90, 60), "JPEG", exif=exif)
    shrunk = shrink_image(data, 30)
    expected_size = (45, 30) if orientation == 1 else (30, 45)
    assert shrunk.suffix == "jpg"
    assert (shrunk.width, shrunk.height) == expected_size
    assert decode_image(shrunk.data).shape[1::-1] == expected_size
    assert shrink_image(data, 60).data == data, "an image that is not larger keeps its bytes"


def test_load_pixels_accepts_every_form(tmp_path: Path) -> None:
    photo = draw_photo()
    data = encode(photo, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    pixels = np.asarray(photo)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), data, photo, pixels):
        assert np.array_equal(load_pixels(image), pixels)
    with pytest.raises(ImageError) as error:
        load_pixels(tmp_path / "gone.png")
    assert error.value.kind == "missing"
    with pytest.raises(ValueError, match="uint8"):
        load_pixels(pixels.astype(np.float32))


# ---- damaged files ----


def test_decode_image_rejects_a_truncated_jpeg_of_every_length() -> None:
    data = encode(draw_photo(), "JPEG")
    for length in range(200, len(data) - 2, 97):
        with pytest.raises(ImageError) as error:
            decode_image(data[:length])
        assert error.value.kind in ("truncated", "corrupt", "not_image")


def test_decode_image_rejects_a_jpeg_corrupted_in_mid_scan() -> None:
    """Pillow decodes this file to grey stripes, without an error."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = bytearray(encode(Image.fromarray(noise), "JPEG", quality=90))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\xd0" * 20
    with pytest.raises(ImageError) as error:
        decode_image(bytes(data))
    assert error.value.kind == "corrupt"


def outcome(function: Callable[..., Any], data: bytes) -> str:
    """Return "ok", or the kind of the ImageError that the function raises. Other errors are not caught."""
    try:
        function(data, max_pixels=1_000_000)
    except ImageError as error:
        return error.kind
    return "ok"


def exif_photo(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return encode(draw_photo(), "JPEG", quality=95, exif=exif)


def animated(image_format: str) -> bytes:
    frames = [draw_photo().convert("P"), Image.new("P", (90, 60))]
    return encode(frames[0], image_format, save_all=True, append_images=frames[1:])


def sixteen_bits() -> bytes:
    gray = np.asarray(draw_photo(mode="L")).astype(np.uint16) * 256
    return encode(Image.fromarray(gray), "PNG")


def transparent() -> bytes:
    image = draw_photo(mode="RGBA")
    image.putalpha(draw_photo(mode="L"))
    return encode(image, "PNG")


PORTABLE = {
    "jpeg": lambda: encode(draw_photo(), "JPEG", quality=95),
    "gray jpeg": lambda: encode(draw_photo(mode="L"), "JPEG", quality=95),
    "png": lambda: encode(draw_photo(), "PNG"),
    "palette": lambda: encode(draw_photo(mode="P"), "PNG"),
    "bits": lambda: encode(draw_photo(mode="1"), "PNG"),
}
NOT_PORTABLE = {
    "rotated jpeg": lambda: exif_photo(6),
    "mirrored jpeg": lambda: exif_photo(2),
    "cmyk": lambda: encode(draw_photo(mode="CMYK"), "JPEG", quality=95),
    "transparent": transparent,
    "16 bits": sixteen_bits,
    "animated png": lambda: animated("PNG"),
    "gif": lambda: animated("GIF"),
    "bmp": lambda: encode(draw_photo(), "BMP"),
    "webp": lambda: encode(draw_photo(), "WEBP", lossless=True),
    "rotated tiff": lambda: encode(draw_photo(), "TIFF", tiffinfo={EXIF_ORIENTATION: 8}),
}


@pytest.mark.parametrize("name", [*PORTABLE, *NOT_PORTABLE])
def test_portable_image_has_the_same_pixels_in_a_simple_decoder(name: str) -> None:
    data = {**PORTABLE, **NOT_PORTABLE}[name]()
    image = portable_image(data, 90)
    assert (image.data == data) == (name in PORTABLE)
    decoded = Image.open(io.BytesIO(image.data))
    assert decoded.format == {"jpg": "JPEG", "png": "PNG"}[image.suffix]
    assert decoded.size == (image.width, image.height)
    expected = decode_image(data)
    pixels = np.asarray(decoded.convert("RGB"), float)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 3


@pytest.mark.parametrize("name", [*PORTABLE, *NOT_PORTABLE])
def test_portable_image_limits_the_longer_side(name: str) -> None:
    data = {**PORTABLE, **NOT_PORTABLE}[name]()
    image = portable_image(data, 45)
    pixels = load_pixels(data)
    upright = Image.fromarray(pixels)
    small = upright.resize((upright.width // 2, upright.height // 2), Image.Resampling.BILINEAR)
    decoded = Image.open(io.BytesIO(image.data))
    assert decoded.size == (image.width, image.height) == small.size
    difference = np.asarray(decoded.convert("RGB"), float) - np.asarray(small, float)
    assert np.abs(difference).mean() < 6


def test_portable_image_refuses_what_the_decoder_refuses() -> None:
    jpeg = encode(draw_photo(), "JPEG", quality=95)
    png = encode(draw_photo(), "PNG")
    for damaged in (jpeg[: len(jpeg) // 2], png[: len(png) // 2], b"<html>", b""):
        with pytest.raises(ImageError):
            portable_image(damaged, 1000)
    thin = encode(Image.new("RGB", (1000, 2)), "PNG")
    assert portable_image(thin, 100)[2:] == (100, 1)


@pytest.mark.medium
@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]
)
def test_decode_image_raises_image_errors_only_and_check_image_agrees(kind: str) -> None:
    """Any byte of a file can be wrong.

    For example, Pillow raises a TypeError if a TIFF tag has a wrong type, and a RuntimeError if an AVIF has no item
    table.
    """
    options = {"progressive": True} if kind == "progressive JPEG" else {}
    data = encode(draw_photo().resize((24, 16)), kind.removeprefix("progressive "), **options)
    damaged = [data.replace(b"iloc", b"xxxx")]
    for position in range(min(len(data), 700)):
        for value in DAMAGE if IS_COMPLETE else [DAMAGE[position % len(DAMAGE)]]:
            damaged.append(data[:position] + bytes([value]) + data[position + 1 :])
    for file in damaged:
        decoded = outcome(decode_image, file)
        assert decoded in ("ok", "not_image", "unsupported", "truncated", "corrupt", "too_large")
        assert outcome(check_image, file) == decoded


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (b"", ["not_image", "truncated"]),
        (b"<html>not found</html>", ["html"]),
        (b"GIF89a", ["not_image", "truncated"]),
        (bytes(100), ["not_image", "truncated"]),
    ],
)
def test_decode_image_rejects_what_is_not_an_image(data: bytes, kinds: list[str]) -> None:
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert error.value.kind in kinds


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def test_decode_image_rejects_a_decompression_bomb_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b""))
        + png_chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert error.value.kind == "too_large"


def test_decode_image_error_names_size_and_limit() -> None:
    with pytest.raises(ImageError, match="90x60 pixels.* 5000") as error:
        decode_image(encode(draw_photo(90, 60), "PNG"), max_pixels=5000)
    assert error.value.kind == "too_large"


def test_image_error_is_pickled_with_its_kind() -> None:
    error = pickle.loads(pickle.dumps(ImageError("missing", "no image x")))
    assert error.kind == "missing"
    assert str(error) == "no image x"


# ---- paths ----


def test_read_image_bytes_finds_absolute_paths_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert read_image_bytes("/data/somebody/train/a.jpg", tmp_path) == b"x"
    assert read_image_bytes("a.jpg", str(tmp_path)) == b"x"
    with pytest.raises(ImageError, match=r"no image .*b\.jpg") as missing:
        read_image_bytes("b.jpg", tmp_path)
    assert missing.value.kind == "missing"
    with pytest.raises(ImageError, match="contains '..'") as unsafe:
        read_image_bytes("../a.jpg", tmp_path)
    assert unsafe.value.kind == "unsafe"


# ---- transforms ----


def make_processors() -> dict[str, Any]:
    """Return Hugging Face's image processors with different rules for size, crop and scale."""
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
            include_top=False,
            rescale_offset=True,
            rescale_factor=1 / 127.5,
            do_normalize=True,
        ),
    }


@pytest.mark.parametrize("kind", list(make_processors()))
@pytest.mark.parametrize("size", [(300, 200), (150, 400), (64, 64)])
def test_transform_equals_the_processor(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    """The results may differ by two of 255 gray levels, because Pillow's resize has weights of 22 bits, and torch's of 16."""
    processor = make_processors()[kind]
    processor.save_pretrained(tmp_path)
    transform = ImageTransform.from_pretrained(tmp_path)
    image = draw_photo(*size)
    processed = processor(image, return_tensors="pt")["pixel_values"][0]
    expected = torch.as_tensor(np.asarray(processed))
    actual = transform.normalize(transform(np.asarray(image)))
    assert actual.shape == expected.shape == (3, *transform.crop)
    std = torch.tensor(transform.std).view(3, 1, 1)
    grey_levels = (actual - expected).abs() * 255 * std
    assert grey_levels.max() < 2.01
    assert grey_levels.mean() < 0.2


def test_transform_rejects_processors_that_do_not_normalize(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do_normalize"):
        ImageTransform.from_pretrained(tmp_path)


def test_transform_error_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        ImageTransform.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing"):
        ImageTransform.from_pretrained(tmp_path)


def test_transform_rejects_a_strip_that_would_become_too_large() -> None:
    transform = ImageTransform(224, (224, 224), "bicubic", (0, 0, 0), (1, 1, 1))
    with pytest.raises(ImageError) as error:
        transform(np.zeros((1, 2000, 3), np.uint8))
    assert error.value.kind == "too_large"


ODD_SIZES = [(301, 200), (97, 411), (64, 64), (23, 500), (233, 232)]  # (width, height)


def expand_to_square(image: Image.Image, mean: list[float]) -> Image.Image:
    """Return an image on a square of the processor's mean color, as the paper on LLaVA-1.5 describes it."""
    side = max(image.size)
    color = tuple(int(channel * 255) for channel in mean)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("chunk", [1, 2_000_000], ids=["row-by-row", "default"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "convnext", "convnext-384"])
def test_padded_transform_equals_that_of_the_square_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    """The pixels must be equal, because torch resizes both."""
    monkeypatch.setattr(transforms, "_PADDED_CHUNK_PIXELS", chunk)
    processor = make_processors()[kind]
    processor.save_pretrained(tmp_path)
    crop = ImageTransform.from_pretrained(tmp_path)
    pad = ImageTransform.from_pretrained(tmp_path, "pad")
    for size in ODD_SIZES:
        image = draw_photo(*size)
        square = expand_to_square(image, processor.image_mean)
        assert torch.equal(pad(np.asarray(image)), crop(np.asarray(square))), size


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_padded_transform_equals_the_stock_processor(tmp_path: Path, kind: str) -> None:
    """The results may differ by two of 255 gray levels, as without padding, because stock LLaVA resizes with Pillow."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    processor = make_processors()[kind]
    processor.save_pretrained(tmp_path / "tower")
    transform = ImageTransform.from_pretrained(tmp_path / "tower", "pad")
    stock = LlavaImageProcessorPil(
        do_pad=True,
        do_center_crop=kind == "clip",
        size=processor.size,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        resample=processor.resample,
    )
    std = torch.tensor(transform.std).view(3, 1, 1)
    for size in ODD_SIZES:
        image = draw_photo(*size)
        expected = stock(image, return_tensors="pt")["pixel_values"][0]
        actual = transform.normalize(transform(np.asarray(image)))
        grey_levels = (actual - expected).abs() * 255 * std
        assert grey_levels.max() < 2.01
        assert grey_levels.mean() < 0.2

    # The config of the stock processor enables padding. This must not be ignored.
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="--image_aspect_ratio pad"):
        ImageTransform.from_pretrained(tmp_path / "stock")
    assert ImageTransform.from_pretrained(tmp_path / "stock", "pad") == transform
    with pytest.raises(ValueError, match="must be crop or pad, not 'anyres'"):
        ImageTransform.from_pretrained(tmp_path / "tower", "anyres")


def test_padded_transform_rejects_a_strip_whose_square_is_too_large() -> None:
    transform = ImageTransform(224, (224, 224), "bicubic", (0, 0, 0), (1, 1, 1), (9, 9, 9))
    assert transform(np.zeros((2, 20_000, 3), np.uint8)).shape == (3, 224, 224)
    with pytest.raises(ImageError) as error:
        transform.resized_size(1, 300_000)
    assert error.value.kind == "too_large"


@pytest.mark.parametrize("resize", [64, (64, 64), 80])
@pytest.mark.parametrize("size", [(251, 500), (500, 252)])
def test_visible_region_of_a_padded_image(
    resize: int | tuple[int, int], size: tuple[int, int]
) -> None:
    """The colors of the image are its coordinates, and the borders are blue."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    red, green, blue = x * 250 / width, y * 250 / height, np.zeros(size)
    coordinates = np.stack([red, green, blue], axis=2).astype(np.uint8)
    transform = ImageTransform(
        resize, (64, 64), "bilinear", (0, 0, 0), (1, 1, 1), pad_color=(0, 0, 255)
    )
    left, top, right, bottom = transform.visible_region(height, width)
    pixels = transform(coordinates).float()
    for row, column in ((20, 44), (32, 32), (44, 27), (2, 33), (33, 62)):
        expected_x = left + (column + 0.5) / 64 * (right - left)
        expected_y = top + (row + 0.5) / 64 * (bottom - top)
        is_border = not (0 < expected_x < 1 and 0 < expected_y < 1)
        assert (pixels[2, row, column] > 128) == is_border
        if not is_border:
            expected = [250 * expected_x, 250 * expected_y]
            assert pixels[:2, row, column].tolist() == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("resize", [64, 80, (64, 64), 48])
def test_visible_region_is_what_the_transform_keeps(resize: int | tuple[int, int]) -> None:
    """The colors of the image are its coordinates. They are read where the transform puts them."""
    height, width = 250, 500
    y, x = np.mgrid[:height, :width]
    red = x * 250 / width
    green = y * 250 / height
    blue = np.full_like(x, 255)
    coordinates = np.stack([red, green, blue], axis=2).astype(np.uint8)

    transform = ImageTransform(resize, (64, 64), "bilinear", (0, 0, 0), (1, 1, 1))
    left, top, right, bottom = transform.visible_region(height, width)
    cropped = transform(coordinates).float()
    for pixel in (20, 32, 44):
        fraction = (pixel + 0.5) / 64
        expected_x = left + fraction * (right - left)
        expected_y = top + fraction * (bottom - top)
        expected = [250 * expected_x, 250 * expected_y]
        assert cropped[:2, pixel, pixel].tolist() == pytest.approx(expected, abs=3)
    has_padding = bool(cropped[2].min() == 0)
    assert has_padding == (bottom > 1), "black where the region reaches beyond the image"


def test_image_processor_is_loaded_without_torchvision(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `AutoImageProcessor` that Transformers 5.17 exports requires torchvision, although the class does not."""
    monkeypatch.setattr(transformers, "AutoImageProcessor", None)
    transform = ImageTransform.from_pretrained(models_folder / "clip")
    assert transform.crop == (32, 32)
