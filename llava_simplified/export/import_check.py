"""Compare an imported checkpoint with the Hugging Face LLaVA folder that it was made from.

The checkpoint is loaded as users load it, with `Llava.from_pretrained`, and the source with the classes of
Transformers. Prompt, pixel values, logits and greedy captions must agree up to rounding (see `stock_check.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from llava_simplified.data.images import ImageError, load_pixels
from llava_simplified.data.transforms import ImageTransform, load_image_processor
from llava_simplified.export.chat_template import get_chat_template
from llava_simplified.export.stock import to_stock_image_processor
from llava_simplified.export.stock_check import (
    Reference,
    StockComparison,
    compare_with_references,
    compute_reference,
)
from llava_simplified.model.llava import Llava

# Width and height of the generated images: odd numbers, wide and tall, so that every rounding of resize, crop
# and borders matters.
_GENERATED_SIZES = ((517, 331), (389, 613))
_MAX_IMAGES = 8


def choose_check_images(folder: Path | None) -> tuple[list[np.ndarray], str]:
    """Return images on which two models are compared, and the kind of these images.

    Args:
        folder: A folder, whose first eight images are used; None for two generated images.

    Returns:
        RGB images (height, width, 3), uint8, and "given images" or "generated images".

    Raises:
        ValueError: The folder does not exist, or contains no image.
    """
    if folder is None:
        return [_generate_image(*size) for size in _GENERATED_SIZES], "generated images"
    if not folder.is_dir():
        raise ValueError(
            f"--check-images {folder}: no such folder. Pass a folder of images, or leave out the option."
        )
    images: list[np.ndarray] = []
    # Subfolders are searched, too, as by the other commands that read a folder of images.
    for path in sorted(folder.rglob("*")):
        if len(images) == _MAX_IMAGES:
            break
        if not path.is_file():
            continue
        try:
            images.append(load_pixels(path))
        except ImageError:
            # Skip files that are not images. The result contains the number of compared images.
            continue
    if not images:
        raise ValueError(f"--check-images {folder}: the folder contains no image")
    return images, "given images"


def _generate_image(width: int, height: int) -> np.ndarray:
    """Return an image with smooth colors, sharp edges and noise."""
    rng = np.random.default_rng(width)
    colors = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    draw.ellipse(
        (width // 5, height // 7, width // 2, height // 2), fill="white", outline="black", width=3
    )
    draw.rectangle(
        (width // 2, height // 2, width - 9, height - 5), fill="red", outline="blue", width=2
    )
    noise = rng.integers(-12, 13, (height, width, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def compare_with_source(
    checkpoint: Path, source: Path, images: Sequence[np.ndarray], image_kind: str
) -> StockComparison:
    """Compare an imported checkpoint with its source.

    Args:
        checkpoint: The imported checkpoint.
        source: The Hugging Face LLaVA folder.
        images: RGB images (height, width, 3), uint8.
        image_kind: Kind of the images, for the result.

    Returns:
        The remaining differences.

    Raises:
        ValueError: Prompt, pixel values, logits or greedy captions differ by more than rounding.
    """
    # Load the checkpoint inside `_compute_references`, so that its memory is freed before the source is loaded.
    references, chat_template, transform = _compute_references(checkpoint, images)
    # With `--image-aspect-ratio pad`, the checkpoint adds borders even if the source does not. Add them in both.
    image_processor = to_stock_image_processor(load_image_processor(source), transform)
    return compare_with_references(
        source,
        adapter=None,
        images=images,
        references=references,
        image_kind=image_kind,
        chat_template=chat_template,
        image_processor=image_processor,
    )


def _compute_references(
    checkpoint: Path, images: Sequence[np.ndarray]
) -> tuple[list[Reference], str | None, ImageTransform]:
    """Return a checkpoint's outputs for each image, the template to compare with, and its transform.

    The template is None if the checkpoint has the same template as the source. Otherwise, the source is run
    with the template of the checkpoint.
    """
    model = Llava.from_pretrained(checkpoint, device="cpu", dtype="stored")
    # Convert the projector, which may have another data type than the tower: the source has a single one.
    model.projector.to(model.vision_tower.dtype)
    references = [compute_reference(model, image) for image in images]
    chat_template = None if model.prompt.name == "chat" else get_chat_template(model)
    return references, chat_template, model.vision_tower.transform
