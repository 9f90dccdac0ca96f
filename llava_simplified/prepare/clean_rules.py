"""The rules of `llava clean`. This module imports nothing heavy, so that the command's parser can use it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """The limits for the images and captions of a usable record, and whether perceptual hashes are computed.

    Attributes:
        min_side: Minimum length of an image's shorter side, in pixels.
        max_aspect: Maximum ratio of the longer side to the shorter side.
        max_caption: Maximum length of a caption, in characters.
        max_pixels: Maximum number of pixels of an image; the default is `data.images.MAX_PIXELS`, the limit of training.
        perceptual: Also compute the perceptual hash of each image, to find duplicates.
    """

    min_side: int = 32
    max_aspect: float = 10.0
    max_caption: int = 2_000
    max_pixels: int = 50_000_000
    perceptual: bool = False
