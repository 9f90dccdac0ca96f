"""CLIPScore as a reward: how well a caption fits its image, as measured by a CLIP model. It needs no references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llava_simplified.data.image_folder import split_shard_name
from llava_simplified.data.images import ImageError, read_image_bytes
from llava_simplified.evaluation.clip_metrics import CLIP_SCORE_WEIGHT, ClipEmbedder
from llava_simplified.foreign_files import error_reason

# Image embeddings are kept, because each image is needed again in every epoch. 100,000 of them take about 200 MB.
MAX_CACHED_IMAGES = 100_000
_FILES_IN_MEMORY = 64


class ClipReward:
    """CLIPScore (Hessel et al., 2021), as `llava evaluate --clip` computes it.

    Args:
        folder: Folder of a CLIP model.
        device: Device on which the model runs.

    Raises:
        ValueError: The folder does not contain a complete CLIP model.
    """

    def __init__(self, folder: str, device: torch.device | str) -> None:
        self._embedder = ClipEmbedder(Path(folder), device, "--reward_clip")
        self._images: dict[str, torch.Tensor] = {}  # path -> embedding

    def __call__(
        self, ids: Sequence[str], images: Sequence[str], captions: Sequence[str]
    ) -> list[float]:
        """Return the CLIPScore of each caption.

        Args:
            ids: The name of each caption's record, for errors.
            images: Path of each caption's image.
            captions: The captions.

        Raises:
            ValueError: A record has no image, or its image cannot be read.
        """
        image_embeddings = self._embed_images(ids, images)
        # Samples of an image are often equal, so embed each distinct text once.
        texts = list(dict.fromkeys(captions))
        row_of_text = {text: row for row, text in enumerate(texts)}
        text_embeddings = self._embedder.embed_texts(texts)
        caption_embeddings = text_embeddings[[row_of_text[caption] for caption in captions]]
        cosines = (caption_embeddings * image_embeddings).sum(-1)
        scores: list[float] = (CLIP_SCORE_WEIGHT * cosines.clamp(min=0)).tolist()
        return scores

    def _embed_images(self, ids: Sequence[str], images: Sequence[str]) -> torch.Tensor:
        """Return the embedding of each caption's image, (captions, embedding size)."""
        missing = {}
        for record_id, image in zip(ids, images):
            if image not in self._images:
                missing[image] = record_id
        # `llava pairs` passes many images at once. Do not read all files before the first one is embedded.
        paths = list(missing)
        for start in range(0, len(paths), _FILES_IN_MEMORY):
            batch = paths[start : start + _FILES_IN_MEMORY]
            files = [_read_image(path, missing[path]) for path in batch]
            self._images.update(zip(batch, self._embedder.embed_images(files)))
        result = torch.stack([self._images[image] for image in images])
        # Remove the oldest embeddings, which come first in a dict.
        excess = max(len(self._images) - MAX_CACHED_IMAGES, 0)
        for image in list(self._images)[:excess]:
            del self._images[image]
        return result


def _read_image(path: str, record_id: str) -> bytes:
    """Return the bytes of an image file; errors name the record."""
    if not path:
        raise ValueError(
            f"--reward clipscore: {record_id} has no image. Remove the record, or use another --reward."
        )
    try:
        # The key of an image in an archive may contain slashes: shard.tar#folder/0001.
        file, key = split_shard_name(path)
        name = Path(file).name if key is None else f"{Path(file).name}#{key}"
        return read_image_bytes(name, Path(file).parent)
    except ImageError as error:
        raise ValueError(f"--reward clipscore: {record_id}: {error_reason(error)}.") from error
