"""CLIPScore and RefCLIPScore: compare captions with images, using the embeddings of a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from llava_simplified.foreign_files import blame_file
from llava_simplified.hub import check_model_config

if TYPE_CHECKING:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerBase

BATCH_SIZE = 64
PROMPT = "A photo depicts "  # prefix of every text in the CLIPScore paper
CLIP_SCORE_WEIGHT = 2.5  # scales the cosines, which are rarely above 0.4, to [0, 1]


def clip_scores(
    model: Path,
    images: Sequence[bytes],
    captions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv:2104.08718).

    CLIPScore is 2.5 * max(cos(caption, image), 0). RefCLIPScore is the harmonic mean of CLIPScore and of the largest
    cosine between the caption and one of its references.

    Args:
        model: Folder of a `transformers.CLIPModel`.
        images: Encoded image files.
        captions: Captions by trial and image.
        references: References by image.

    Returns:
        Two arrays (trials, images).

    Raises:
        ValueError: The folder does not contain a complete CLIP model.
    """
    import torch

    embedder = ClipEmbedder(model)
    # Embed each distinct text once, because captions and references repeat.
    texts = sorted(set().union(*captions, *references))
    row_of_text = {text: row for row, text in enumerate(texts)}
    text_embeddings = embedder.embed_texts(texts)
    image_embeddings = embedder.embed_images(images)

    def rows(group: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of texts, (texts, embedding size)."""
        return text_embeddings[[row_of_text[text] for text in group]]

    # The embeddings have length 1, so a dot product is a cosine.
    caption_embeddings = torch.stack(list(map(rows, captions)))  # (trials, images, embedding size)
    image_cosine = (caption_embeddings * image_embeddings).sum(-1)
    score = CLIP_SCORE_WEIGHT * image_cosine.clamp(min=0).numpy()

    # For each trial and image, find the largest cosine between the caption and a reference.
    closest = []
    for image, group in enumerate(references):
        cosines = caption_embeddings[:, image] @ rows(group).T  # (trials, references)
        closest.append(cosines.amax(-1))
    reference_cosine = torch.stack(closest, dim=1).clamp(min=0).numpy()

    total = score + reference_cosine
    # Where both scores are 0, the mean is 0, and not 0 / 0.
    harmonic_mean = np.divide(
        2 * score * reference_cosine,
        total,
        out=np.zeros_like(total),
        where=total > 0,
    )
    return score, harmonic_mean


class ClipEmbedder:
    """Compute normalized embeddings of texts and images, in batches. They are returned on the CPU.

    Args:
        folder: Folder of a `transformers.CLIPModel`.
        device: Device of the model.
        option: Command-line option of the folder, for error messages.

    Raises:
        ValueError: The folder does not contain a complete CLIP model.
    """

    def __init__(
        self, folder: Path, device: torch.device | str = "cpu", option: str = "--clip"
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            check_model_config(folder)
            with blame_file(folder):
                # Transformers would give another model, such as a vision tower, a random text model of the default size.
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                if config.model_type != "clip":
                    raise ValueError(f"its type is {config.model_type}, not clip")
                loaded = CLIPModel.from_pretrained(
                    folder, output_loading_info=True, trust_remote_code=False
                )
                model, loading_info = cast("tuple[CLIPModel, dict[str, set[str]]]", loaded)
                missing = sorted(loading_info["missing_keys"])
                if missing:  # Transformers would only warn, and use random weights
                    raise ValueError(f"there are no weights for {missing[0]}")
                self._model = model.eval().to(device)
                self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False
                )
                self._processor: CLIPImageProcessorPil = CLIPImageProcessorPil.from_pretrained(
                    folder, trust_remote_code=False
                )
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{option}: {folder} does not contain a complete CLIP model ({reason}). Pass a folder with a text "
                "model, a vision model, a tokenizer and an image processor; a vision tower is not sufficient."
            ) from None

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of texts, float32 (texts, embedding size)."""
        import torch

        # Truncate texts to the number of position embeddings.
        limit = self._model.text_model.embeddings.position_embedding.num_embeddings
        parts = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = texts[start : start + BATCH_SIZE]
            inputs = self._tokenizer(
                [PROMPT + text for text in batch],
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                pooled = self._model.text_model(**inputs).pooler_output
                parts.append(self._model.text_projection(pooled))
        return _normalize(parts)

    def embed_images(self, images: Sequence[bytes]) -> torch.Tensor:
        """Return the embeddings of image files, float32 (images, embedding size)."""
        import torch

        from llava_simplified.data.images import decode_image

        parts = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [decode_image(data) for data in images[start : start + BATCH_SIZE]]
            inputs = self._processor(batch, return_tensors="pt").to(self._model.device)
            with torch.inference_mode():
                pooled = self._model.vision_model(**inputs).pooler_output
                parts.append(self._model.visual_projection(pooled))
        return _normalize(parts)


def _normalize(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.nn.functional.normalize(torch.cat(list(parts)).float().cpu(), dim=-1)
