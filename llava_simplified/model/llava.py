"""LLaVA, top to bottom: pixels -> patch features -> projector -> splice -> language model -> loss.

    image  (3, 224, 224)                        "USER: <image>\\nWhat is this? ASSISTANT: a cat</s>"
      | vision tower                              | tokenizer, the placeholder repeated once per patch
      v                                           v
    patch features (196, 768)                   input_ids (length,)
      | projector                                 | embedding table
      v                                           v
    image tokens (196, 2048) ---- splice ---->  inputs_embeds (length, 2048)
                                                  | language model
                                                  v
                                                logits where a token is trained -> cross entropy

After "Visual Instruction Tuning" (Liu et al., 2023) and "Improved Baselines with Visual Instruction Tuning" (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from llava_simplified.data.images import ImageSource, load_pixels
from llava_simplified.data.records import insert_image_placeholders
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.generation import (
    DEFAULT_TEMPERATURE,
    GenerationOptions,
    generate,
    stream,
)
from llava_simplified.model.language_model import attention_kwargs, lm_head_at_positions
from llava_simplified.model.protocols import CausalLM
from llava_simplified.model.vision import VisionTower
from llava_simplified.prompt import IMAGE_INDEX, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LlavaOutput(NamedTuple):
    """`loss`: summed over the trained tokens, not averaged. `logits`: (trained, vocabulary), without gradient."""

    loss: torch.Tensor
    logits: torch.Tensor


class Llava(nn.Module):
    """A vision tower and a language model, joined by a projector."""

    def __init__(
        self,
        vision_tower: VisionTower,
        projector: nn.Module,
        language_model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        instruction: str = DEFAULT_INSTRUCTION,
    ) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model: CausalLM = language_model
        self.tokenizer = tokenizer
        self.prompt = Prompt(tokenizer, template)
        self.instruction = instruction

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def config(self) -> Any:
        """The language model's: engines read the width of the layers from it."""
        return self.language_model.config

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of its layers: FSDP gathers the weights of one at a time."""
        named = {
            *(self.language_model._no_split_modules or ()),
            *(self.vision_tower.model._no_split_modules or ()),
        }
        return sorted({type(module).__name__ for module in self.modules()} & named)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the language model's activations in the backward pass; a frozen tower keeps none anyway."""
        self.language_model.gradient_checkpointing_enable(**options)
        if not self.vision_tower.frozen:
            self.vision_tower.model.gradient_checkpointing_enable(**options)

    def forward(
        self,
        input_ids: torch.Tensor,
        logit_positions: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> LlavaOutput:
        """The loss of a batch, as `data.collate.Collator` makes it.

        Args:
            input_ids: (batch, length), IMAGE_INDEX where a patch feature goes.
            logit_positions: (trained,) flat indices into batch x length, from which a token is predicted.
            labels: (trained,) the token that comes next there.
            pixel_values: (images, 3, height, width), the batch's images in reading order.
            image_features: (images, tokens, vision width), where the tower has run before.
            attention_mask: (batch, length), 0 on padding: one prompt and one answer a row. Or, for packs and answers
                that share a prompt, three of shape (batch, length):
            segment_ids: which example of its row a token belongs to; 0 on padding.
            branch_ids: which answer of its example; 0 in the prompt.
            position_ids: its place in its text.
        """
        if image_features is None and pixel_values is not None:
            image_features = self.vision_tower(pixel_values)
        inputs_embeds = self.splice(input_ids, image_features)
        attention: dict[str, Any] = {"attention_mask": attention_mask}
        if segment_ids is not None and branch_ids is not None and position_ids is not None:
            attention = attention_kwargs(
                self.language_model, segment_ids, branch_ids, position_ids, inputs_embeds.dtype
            )
        # In a caption of 12 tokens behind 196 patches, 94 % of the positions train nothing. The head, a matrix as
        # large as the vocabulary, runs only where a token is trained.
        with lm_head_at_positions(self.language_model, logit_positions):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False, **attention
            )
        logits = outputs.logits.flatten(0, -2)
        # In float32 at least; and a sum, so that micro-batches, devices and packs add up to the mean over all tokens.
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return LlavaOutput(cross_entropy(exact, labels, reduction="sum"), logits.detach())

    def splice(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings, with projected patch features in place of the placeholders.

        Args:
            input_ids: (batch, length).
            image_features: (images, tokens, vision width) in the order of the placeholders; None: text only.

        Returns:
            (batch, length, text width)
        """
        is_image = input_ids == IMAGE_INDEX
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if image_features is None:
            return embeds
        image_tokens = self.projector(image_features.to(self._projector_dtype(embeds)))
        self.check_image_token_count(is_image, image_features)
        return embeds.masked_scatter(is_image[..., None], image_tokens.to(embeds.dtype))

    def check_image_token_count(self, is_image: torch.Tensor, image_features: torch.Tensor) -> None:
        """Raise ValueError where placeholders and features are not as many: what is spliced would be the wrong picture."""
        room, (images, tokens, _) = int(is_image.sum()), image_features.shape
        blank = (
            images == 1 and not room
        )  # see `Collator`: it passes through all layers, into no text
        if images * tokens != room and not blank:
            raise ValueError(
                f"{images} image(s) of {tokens} tokens, but the text has room for {room} image tokens"
            )

    def _projector_dtype(self, embeds: torch.Tensor) -> torch.dtype:
        return next((p.dtype for p in self.projector.parameters()), embeds.dtype)

    def caption(
        self,
        images: ImageSource | Sequence[ImageSource],
        instruction: str | None = None,
        n: int = 1,
        batch_size: int = 16,
        **options: Any,
    ) -> Any:
        """Say what is in a picture, or in several.

        Args:
            images: a path, bytes, PIL image or uint8 RGB array (height, width, 3); or a list of them.
            instruction: the user's words, the ones it was trained with where not given; `<image>` in them marks where
                the picture goes (in front where not given).
            n: captions of each picture; over 1 they are sampled, at temperature 0.7 where none is given.
            batch_size: pictures at a time.
            options: fields of `GenerationOptions`: max_new_tokens, temperature, top_p, num_beams, ...

        Returns:
            A caption (n = 1) or a list of n; for a list of images, a list of that.

        Raises:
            ImageError: a picture that can't be read.
        """
        many = isinstance(images, (list, tuple))
        sources: Any = images if many else [images]
        asked = [Message("user", self.instruction if instruction is None else instruction)]
        prompt = self.prompt.render(
            insert_image_placeholders(asked, 1, "the instruction"), None
        ).input_ids
        if n > 1 and not options.get("num_beams"):
            options = {"temperature": DEFAULT_TEMPERATURE, **options}
        decoding = GenerationOptions(num_return_sequences=n, **options)
        captions: list[list[str]] = []
        for first in range(0, len(sources), batch_size):
            batch = [load_pixels(image) for image in sources[first : first + batch_size]]
            pixels = torch.stack([self.vision_tower.transform(image) for image in batch])
            captions += generate(self, [prompt] * len(pixels), pixels, decoding)
        answers = captions if n > 1 else [texts[0] for texts in captions]
        return answers if many else answers[0]

    def chat(
        self, turns: str | Sequence[Message], images: Sequence[ImageSource] = (), **options: Any
    ) -> str:
        """The answer to a conversation's last turn; see `stream`."""
        return "".join(self.stream(turns, images, **options)).strip()

    def stream(
        self, turns: str | Sequence[Message], images: Sequence[ImageSource] = (), **options: Any
    ) -> Iterator[str]:
        """The answer, piece by piece as it is decoded.

        Args:
            turns: a question, or the conversation so far; the last turn is the user's.
            images: one for each `<image>` in the user's turns; without any, they go in front of the first of these.
            options: fields of `GenerationOptions`, one beam and one sequence.
        """
        prompt, pixels = self.ask(turns, images)
        said = ""
        for text in stream(self, prompt, pixels, GenerationOptions(**options)):
            yield text[len(said) :]
            said = text

    def ask(
        self, turns: str | Sequence[Message], images: Sequence[ImageSource]
    ) -> tuple[list[int], torch.Tensor | None]:
        """The prompt's ids, one IMAGE_INDEX per image, and the pixels: uint8 (images, 3, height, width), None without any."""
        said = [Message("user", turns)] if isinstance(turns, str) else turns
        placed = insert_image_placeholders(said, len(images), "the conversation")
        pixels = [self.vision_tower.transform(load_pixels(image)) for image in images]
        return self.prompt.render(placed, None).input_ids, torch.stack(pixels) if pixels else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Llava:
        """Load a checkpoint that training wrote; see `model.checkpoint.load_checkpoint` for the options."""
        from llava_simplified.model.checkpoint import load_checkpoint

        return load_checkpoint(folder, **options)
