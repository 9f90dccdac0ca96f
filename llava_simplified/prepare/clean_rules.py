"""What `llava clean` accepts. Light, so that the parser of the command can import it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What a usable record is.

    Attributes:
        min_side: Smallest shorter side of an image, in pixels.
        max_aspect: Largest ratio of the longer side to the shorter side.
        max_caption: Longest caption, in characters.
        max_pixels: Largest image, in pixels; the default is `data.images.MAX_PIXELS`, the limit of training.
        perceptual: Also compute the perceptual hash of each image, for the search of duplicates.
    """

    min_side: int = 32
    max_aspect: float = 10.0
    max_caption: int = 2_000
    max_pixels: int = 50_000_000
    perceptual: bool = False
