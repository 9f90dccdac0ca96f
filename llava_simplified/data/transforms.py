"""RGB pixels -> the input of a vision tower: pad or crop to the tower's shape, resize, normalize.

Pixels stay uint8 until they are on the device of the tower: resize and crop run in the data loader's workers on uint8,
normalization runs on the device. A batch of uint8 is a quarter of the size of float32, both in the queues between
processes and in the transfer to a GPU.

**Antialiased resize on uint8.** When an image is shrunk, plain interpolation reads only the 2 or 4 nearest pixels and
skips those between; edges turn into jagged patterns that did not occur in CLIP's training. With antialiasing the filter
is as wide as the shrinking factor, so every pixel contributes:

    plain        x . . . x . . . x      every fourth pixel is read (factor 4)
    antialiased  \\_______/\\_____/        a weighted mean of all pixels

Pillow, which CLIP's own preprocessing uses, always does this; torch does it with `antialias=True`. The weights of
torch's uint8 kernel have 16 bits, and Pillow's have 22, so results differ by at most 2 of 255 grey levels.

**Images that are not square.** `--image_aspect_ratio` selects one of two rules:

    crop    resize the shorter side, cut the center out        the ends of the longer side are lost
    pad     add borders to make a square, resize the square    nothing is lost; the content is smaller

`pad` is the rule of LLaVA-1.5: the borders have the mean color of the image processor, which becomes about 0 when
pixels are normalized, and an odd row or column is added at the bottom or right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llava_simplified.data.device_copy import to_device
from llava_simplified.data.images import MAX_PIXELS, ImageError
from llava_simplified.foreign_files import blame_file
from llava_simplified.hub import check_model_name

MAX_SIDE = 8192  # pixels; the inputs of the largest towers have about 1,500

if TYPE_CHECKING:  # importing torch takes two seconds, and `llava clean` needs only the sizes
    import torch

IMAGE_ASPECT_RATIOS = ("crop", "pad")

_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by PIL.Image.Resampling
# ConvNeXt's processor stretches images to a square if its `size` is at least this; with a smaller `size`, it crops.
_CONVNEXT_MIN_STRETCHED_SIDE = 384
# Number of pixels of a padded image that are resized at a time; see `ImageTransform._resize_padded`.
_PADDED_CHUNK_PIXELS = 2_000_000


class ImageProcessor(Protocol):
    """The attributes of a Hugging Face image processor that are used here; some models have more."""

    do_normalize: bool
    do_rescale: bool
    image_mean: list[float]
    image_std: list[float]
    resample: int
    rescale_factor: float
    size: dict[str, int] | None


@dataclass(frozen=True)
class ImageTransform:
    """The preprocessing of a vision tower: resize and center crop; `normalize` follows on the device.

    Attributes:
        resize: Length of the shorter side in pixels, or (height, width) regardless of the aspect ratio.
        crop: (height, width) of the center crop: the size of the tower's input.
        interpolation: "bicubic" or "bilinear", antialiased.
        mean: Mean of each channel, for pixels in the range 0 to 1.
        std: Standard deviation of each channel, for pixels in the range 0 to 1.
        pad_color: RGB (0 to 255) of the borders that make an image square before the resize; None adds no borders.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # Leave this field out of the repr. `llava clean` of version 0.1.0 hashes the repr to find its unfinished work.
    pad_color: tuple[int, int, int] | None = field(default=None, repr=False)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, image_aspect_ratio: str = "crop"
    ) -> ImageTransform:
        """Read `preprocessor_config.json` of a Hugging Face vision model.

        Args:
            name_or_path: A folder, or a model on the hub.
            image_aspect_ratio: "crop" to follow the file, "pad" to make images square first.

        Raises:
            ValueError: There is no such folder, the file is missing, or its processor is not supported (it cuts images
                into tiles, does not normalize, or adds borders although `image_aspect_ratio` is "crop").
        """
        if image_aspect_ratio not in IMAGE_ASPECT_RATIOS:
            raise ValueError(
                f"--image_aspect_ratio must be crop or pad, not {image_aspect_ratio!r}"
            )
        check_model_name(name_or_path)
        # The file may contain any values, and processors do not check them, so they may raise any error.
        with blame_file(name_or_path):
            processor = load_image_processor(name_or_path)
            _check_padding(processor, image_aspect_ratio, name_or_path)
            transform = cls._of_processor(processor, name_or_path)
        sides = (*transform.crop, *np.atleast_1d(transform.resize))
        if not all(1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(
                f"{name_or_path}: the image processor must resize to 1 to {MAX_SIDE} pixels, not to "
                f"{transform.resize}, with a crop of {transform.crop}"
            )
        if not np.isfinite([*transform.mean, *transform.std]).all() or 0 in transform.std:
            raise ValueError(
                f"{name_or_path}: image_mean and image_std must be finite, and image_std not 0"
            )
        if image_aspect_ratio == "pad":
            return replace(transform, pad_color=_mean_color(transform.mean))
        return transform

    @classmethod
    def _of_processor(cls, processor: ImageProcessor, name_or_path: str | Path) -> ImageTransform:
        """Return the transform that computes what an image processor of Transformers does."""
        if not processor.do_normalize or not processor.do_rescale:
            raise ValueError(
                f"{name_or_path}: the image processor must rescale and normalize images (do_rescale, do_normalize). "
                "Choose another vision tower."
            )
        resize, crop = _resize_and_crop(processor, name_or_path)
        # A processor computes (pixels * rescale_factor - offset - mean) / std. This class divides by 255. Fold a factor
        # other than 1/255 and the offset (EfficientNet has both) into mean and std.
        scale = 255 * float(processor.rescale_factor)
        offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
        return cls(
            resize=resize,
            crop=crop,
            interpolation=_INTERPOLATIONS[int(processor.resample)],
            mean=_per_channel((mean + offset) / scale for mean in processor.image_mean),
            std=_per_channel(std / scale for std in processor.image_std),
        )

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """Pad, resize and crop one image.

        Args:
            pixels: uint8 RGB (height, width, 3).

        Returns:
            uint8 (3, crop height, crop width).

        Raises:
            ImageError: The resized image would be too large, see `resized_size`.
        """
        import torch
        from torch.nn.functional import interpolate

        # Copy with np.array: decoders return read-only arrays, which torch warns about.
        image = torch.from_numpy(np.array(pixels))
        image = image.permute(2, 0, 1)[None]  # (1, 3, height, width), as `interpolate` expects
        height, width = image.shape[-2:]
        target = self.resized_size(height, width)
        if self.pad_color is not None and height != width:
            image = self._resize_padded(image, target)
        elif target != (height, width):
            image = interpolate(image, size=target, mode=self.interpolation, antialias=True)
        return _center_crop(image[0], self.crop).contiguous()

    # The square of a panorama has many times the pixels of the panorama: 400 million for 20,000 x 2,500. It is never
    # completely in memory. The resize filters in two passes, first along the rows and then along the columns, so the first
    # pass can run on a few rows at a time:
    #
    #     for a few rows at a time                      for all rows
    #     | border | row of the image | border |   ->   border rows, filtered rows, border rows   ->   the result
    #         side pixels      ->      new_width         side rows            ->          new_height
    #
    # Filtering rows of one color changes nothing, so the border rows are not filtered. The result is bitwise equal
    # to `interpolate` of the complete square, since torch's kernel rounds to uint8 between the passes too.

    def _resize_padded(self, image: torch.Tensor, target: tuple[int, int]) -> torch.Tensor:
        """Add borders that make an image square, and resize the square.

        Args:
            image: uint8 (1, 3, height, width).
            target: (height, width) of the result.
        """
        from torch.nn.functional import interpolate

        height, width = image.shape[-2:]
        new_height, new_width = target
        side = max(height, width)
        top, left = self._offset(height, width)
        chunk = min(height, max(1, _PADDED_CHUNK_PIXELS // side))
        # Both images begin in the color of the borders. Then their inner parts are overwritten.
        rows = self._plain_image(chunk, side)
        filtered = self._plain_image(side, new_width)
        for start in range(0, height, chunk):
            count = min(chunk, height - start)
            rows[:, :, :count, left : left + width] = image[:, :, start : start + count]
            filtered[:, :, top + start : top + start + count] = interpolate(
                rows[:, :, :count],
                size=(count, new_width),
                mode=self.interpolation,
                antialias=True,
            )
        return interpolate(
            filtered, size=(new_height, new_width), mode=self.interpolation, antialias=True
        )

    def _plain_image(self, height: int, width: int) -> torch.Tensor:
        """Return uint8 (1, 3, height, width) in the color of the borders, in the memory layout of decoded images."""
        import torch

        assert self.pad_color is not None, "only transforms that pad have borders"
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[:] = np.array(self.pad_color, np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None]

    @staticmethod
    def _offset(height: int, width: int) -> tuple[int, int]:
        """Return (top, left) of an image in the square around it, in pixels."""
        side = max(height, width)
        return (side - height) // 2, (side - width) // 2

    def resized_size(
        self,
        height: int,
        width: int,
    ) -> tuple[int, int]:
        """Return the (height, width) to which an image of height x width is resized, before the center crop.

        Raises:
            ImageError: "too_large": the result, or for padded images the intermediate result of the two-pass resize,
                would have more than `MAX_PIXELS` pixels. This happens for very narrow images.
        """
        if self.pad_color is not None:
            height = width = max(height, width)
        if not isinstance(self.resize, int):
            new_height, new_width = self.resize
        else:
            new_height, new_width = self._scaled_size(self.resize, height, width)
        if self.pad_color is not None and height * new_width > MAX_PIXELS:
            raise ImageError(
                "too_large",
                f"the image, padded to {width}x{height} pixels, cannot be resized to {new_width}x{new_height}: an "
                f"intermediate image would have more than {MAX_PIXELS} pixels",
            )
        return new_height, new_width

    @staticmethod
    def _scaled_size(resize: int, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after a resize of the shorter side to `resize` pixels."""
        shorter = min(height, width)
        # Round down, as Hugging Face's and torchvision's processors do.
        new_height = resize * height // shorter
        new_width = resize * width // shorter
        if new_height * new_width > MAX_PIXELS:
            raise ImageError(
                "too_large",
                f"{width}x{height} pixels would be resized to {new_width}x{new_height}, "
                f"more than {MAX_PIXELS} pixels",
            )
        return new_height, new_width

    def visible_region(
        self,
        height: int,
        width: int,
    ) -> tuple[float, float, float, float]:
        """Return the part of an image that the input of the tower shows.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Returns:
            (left, top, right, bottom) as fractions of the image's sides. Values below 0 or above 1 mean borders: those
            that make the image square, or black ones if the crop is larger than the resized image.
        """
        new_height, new_width = self.resized_size(height, width)
        crop_height, crop_width = self.crop
        # The size of the image with its borders, and the position of the image in it.
        full_height, full_width, top, left = height, width, 0, 0
        if self.pad_color is not None:
            full_height = full_width = max(height, width)
            top, left = self._offset(height, width)
        # The center of the crop is the center of the image with its borders.
        half_height = crop_height / new_height / 2
        half_width = crop_width / new_width / 2
        # Convert fractions of the image with borders to fractions of the image.
        return (
            ((0.5 - half_width) * full_width - left) / width,
            ((0.5 - half_height) * full_height - top) / height,
            ((0.5 + half_width) * full_width - left) / width,
            ((0.5 + half_height) * full_height - top) / height,
        )

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalize pixels with the tower's mean and standard deviation.

        Args:
            pixels: uint8 (..., 3, height, width) on any device.

        Returns:
            float32 of the same shape, on the same device.
        """
        import torch

        # float32 on every device; the tower converts to its own dtype.
        mean = to_device(torch.tensor(self.mean, device="cpu"), pixels.device).view(3, 1, 1)
        std = to_device(torch.tensor(self.std, device="cpu"), pixels.device).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std


def load_image_processor(name_or_path: str | Path) -> ImageProcessor:
    """Load the image processor of a vision model.

    Raises:
        ValueError: `preprocessor_config.json` is missing or cannot be read.
    """
    from transformers import utils

    # Import it from its module: up to version 5.17, `transformers` itself exports a placeholder that requires
    # torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    file_name = "preprocessor_config.json"
    try:
        # Look for the file first, for a clear error: AutoImageProcessor would try other files next.
        utils.cached_file(str(name_or_path), file_name)
        # The Pillow backend does not need torchvision.
        return AutoImageProcessor.from_pretrained(
            str(name_or_path), backend="pil", trust_remote_code=False
        )
    except OSError as error:
        folder = Path(name_or_path)
        if folder.is_dir() and not (folder / file_name).is_file():
            raise ValueError(
                f"{name_or_path}: {file_name} is missing. Copy the vision tower's file there."
            ) from error
        raise ValueError(f"{name_or_path}: cannot read {file_name}: {error}") from error


def processor_pads_to_square(processor: ImageProcessor) -> bool:
    """Return whether an image processor adds borders itself, by the rule of `--image_aspect_ratio pad`."""
    is_llava = type(processor).__name__.startswith("LlavaImageProcessor")
    return is_llava and bool(getattr(processor, "do_pad", False))


def _check_padding(
    processor: ImageProcessor, image_aspect_ratio: str, name_or_path: str | Path
) -> None:
    """Raise ValueError if a processor adds borders that `image_aspect_ratio` does not describe."""
    if not getattr(processor, "do_pad", False):
        return
    if not processor_pads_to_square(processor):
        raise ValueError(
            f"{name_or_path}: the image processor {type(processor).__name__} adds borders (do_pad) in a way that is not "
            "supported. Choose another vision tower."
        )
    if image_aspect_ratio != "pad":
        raise ValueError(
            f"{name_or_path}: its image processor makes images square (do_pad). Pass "
            "--image_aspect_ratio pad."
        )


def _mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return the color of the borders: the mean of an image processor, rounded down as LLaVA-1.5 does."""
    # With an unusual rescale_factor, the mean of a processor may be outside the range of pixels.
    red, green, blue = (min(max(int(channel * 255), 0), 255) for channel in mean)
    return red, green, blue


def _resize_and_crop(
    processor: ImageProcessor,
    name_or_path: str | Path,
) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """Return `ImageTransform.resize` and `ImageTransform.crop` of an image processor.

    Raises:
        ValueError: The format of the processor's size is unknown, or its outputs have different sizes.
    """
    size = dict(processor.size or {})
    crop_size: dict[str, int] = getattr(processor, "crop_size", None) or {}
    crops = bool(getattr(processor, "do_center_crop", False))

    if not size.get("shortest_edge"):
        if not size.get("height") or not size.get("width"):
            raise ValueError(
                f"{name_or_path}: the 'size' of the image processor must have 'shortest_edge', or 'height' and 'width'; "
                f"got {size}"
            )
        stretched = _height_and_width(size)
        if crops:
            return stretched, _height_and_width(crop_size)
        return stretched, stretched

    shorter_side = int(size["shortest_edge"])
    if crops:
        return shorter_side, _height_and_width(crop_size)
    crop_fraction = getattr(processor, "crop_pct", None)
    if not crop_fraction:
        raise ValueError(
            f"{name_or_path}: the image processor resizes the shorter side and does not crop, "
            "so images would have different sizes; this is not supported"
        )
    # Only ConvNeXt's processor has `crop_pct`. Its `size` is the size of the tower's input. If it is large, images are not
    # cropped, but stretched to a square.
    square = (shorter_side, shorter_side)
    if shorter_side >= _CONVNEXT_MIN_STRETCHED_SIDE:
        return square, square
    return int(shorter_side / crop_fraction), square


def _height_and_width(size: dict[str, int]) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def _per_channel(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _center_crop(
    image: torch.Tensor,
    size: tuple[int, int],
) -> torch.Tensor:
    """Crop the center of an image; pad a smaller image with zeros, as Hugging Face's processors do.

    Args:
        image: (3, height, width).
        size: (height, width) of the crop.

    Returns:
        (3, crop height, crop width).
    """
    from torch.nn.functional import pad

    height, width = image.shape[-2:]
    crop_height, crop_width = size
    missing_height = max(crop_height - height, 0)
    missing_width = max(crop_width - width, 0)
    if missing_height or missing_width:
        # Add an odd row or column at the top or left. (The crop below removes an odd one at the bottom or right.)
        top = (missing_height + 1) // 2
        left = (missing_width + 1) // 2
        right = missing_width - left
        bottom = missing_height - top
        image = pad(image, (left, right, top, bottom))
        height, width = image.shape[-2:]
    top = (height - crop_height) // 2
    left = (width - crop_width) // 2
    return image[:, top : top + crop_height, left : left + crop_width]
