"""The image transform of a vision tower: resize, center crop and normalize RGB images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch takes two seconds to import, and the downloader decodes without it
    import torch
from llava_simplified.data.images import MAX_PIXELS, ImageError


@dataclass(frozen=True)
class ImageTransform:
    """What a vision tower wants to be given: resize, centre crop; later, on the device, normalise.

    Attributes:
        resize: the shorter side (int), or (height, width) to stretch to.
        crop: (height, width) of the centre crop; the size of the tower's input.
        interpolation: "bicubic" or "bilinear", with antialiasing as Pillow does it.
        mean, std: per channel, of pixels scaled to 0..1.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> ImageTransform:
        """Read `preprocessor_config.json` of any Hugging Face vision model.

        Raises:
            ValueError: where the processor does something this transform can't (padding to a multiple, tiling).
        """
        from transformers import AutoImageProcessor, utils

        try:
            utils.cached_file(
                str(name_or_path), "preprocessor_config.json"
            )  # says why it can't be had, at once
            processor: Any = AutoImageProcessor.from_pretrained(str(name_or_path), backend="pil")
        except OSError as error:
            if (
                Path(name_or_path).is_dir()
                and not (Path(name_or_path) / "preprocessor_config.json").is_file()
            ):
                raise ValueError(
                    f"the vision tower's preprocessor_config.json is missing: put it into {name_or_path}"
                ) from error
            raise ValueError(
                f"{name_or_path}: no preprocessor_config.json to read: {error}"
            ) from error
        if (
            getattr(processor, "do_pad", False)
            or not processor.do_normalize
            or not processor.do_rescale
        ):
            raise ValueError(
                f"{name_or_path}: image processors that pad, or don't normalise, are not supported"
            )
        size = dict(processor.size or {})
        resize: int | tuple[int, int]
        if size.get("shortest_edge"):
            resize = int(size["shortest_edge"])
        elif size.get("height") and size.get("width"):
            resize = (int(size["height"]), int(size["width"]))
        else:
            raise ValueError(f"{name_or_path}: can't read 'size' {size} of the image processor")
        crop = resize if isinstance(resize, tuple) else (resize, resize)
        if getattr(processor, "do_center_crop", False):
            crop_size = processor.crop_size
            crop = (int(crop_size["height"]), int(crop_size["width"]))
        elif getattr(processor, "crop_pct", None) and isinstance(
            resize, int
        ):  # ConvNeXt's own rule
            resize = int(resize / processor.crop_pct) if resize < 384 else (resize, resize)
        elif isinstance(resize, int):
            raise ValueError(
                f"{name_or_path}: resizes the shorter side without a crop: sizes would differ"
            )
        # rescale_factor other than 1/255 (EfficientNet offers it) folds into mean and std
        scale = 255 * float(processor.rescale_factor)
        offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
        return cls(
            resize,
            crop,
            {2: "bilinear", 3: "bicubic"}[int(processor.resample)],
            _triple((m + offset) / scale for m in processor.image_mean),
            _triple(s / scale for s in processor.image_std),
        )

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 (height, width, 3) -> uint8 (3, crop height, crop width). Four times smaller than floats to move.

        Equal to Pillow's resize to two grey levels of 255: torch's weights have 16 bits, Pillow's 22.
        """
        import torch
        from torch.nn.functional import interpolate

        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        height, width = image.shape[-2:]
        target = self.resized_size(height, width)
        if target != (height, width):
            image = interpolate(image, size=target, mode=self.interpolation, antialias=True)
        return _center_crop(image[0], self.crop).contiguous()

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of a picture before the crop.

        Raises:
            ImageError: too_large, of a strip that would be blown up past `MAX_PIXELS`.
        """
        if not isinstance(self.resize, int):
            return self.resize
        short = min(height, width)
        tall, wide = self.resize * height // short, self.resize * width // short
        if tall * wide > MAX_PIXELS:
            raise ImageError(
                "too_large", f"{width}x{height} pixels become {wide}x{tall} when they are resized"
            )
        return tall, wide

    def visible_region(self, height: int, width: int) -> tuple[float, float, float, float]:
        """What of a picture of this size the tower is shown: (left, top, right, bottom), its sides being 1 long."""
        tall, wide = self.resized_size(height, width)
        half_y, half_x = self.crop[0] / tall / 2, self.crop[1] / wide / 2
        return 0.5 - half_x, 0.5 - half_y, 0.5 + half_x, 0.5 + half_y

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, height, width) on any device -> float32, by the tower's mean and standard deviation."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _center_crop(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The centre of (3, H, W); where the image is smaller, zeros around it, as Hugging Face processors do."""
    from torch.nn.functional import pad

    (height, width), (crop_height, crop_width) = image.shape[-2:], size
    missing_y, missing_x = max(crop_height - height, 0), max(crop_width - width, 0)
    if missing_y or missing_x:
        top, left = -(-missing_y // 2), -(-missing_x // 2)
        image = pad(image, (left, missing_x - left, top, missing_y - top))
        height, width = image.shape[-2:]
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return image[:, top : top + crop_height, left : left + crop_width]
