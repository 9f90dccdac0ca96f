"""LLaVA: a vision tower and a language model, joined by a small projector. Start reading here.

    image  uint8 (3, 224, 224)                  "USER: <image>\\nWhat is this? ASSISTANT: a cat</s>"
      |                                           |
      | vision tower (frozen)                     | tokenizer; the image placeholder is replaced by
      v                                           v one placeholder per patch
    patch features (196, 768)                   input_ids (length,)
      |                                           |
      | projector (trained)                       | embedding table
      v                                           v
    image tokens (196, 4096) ---- splice ---->  inputs_embeds (length, 4096)
                                                  |
                                                  | language model (frozen, with a trained adapter)
                                                  v
                                                logits, at trained positions only --> cross entropy

For the language model, an image is a sequence of 196 token embeddings that do not come from its embedding
table. Everything else (attention, loss, generation) works as for text.

The files of this package, in reading order:

    llava.py                the model: splice, loss, `caption` and `chat`
    vision.py               pixels -> patch features, for any vision model of Transformers
    projector.py            patch features -> image tokens
    language_model.py       logits at trained positions, attention masks for shared prompts
    chunked_loss.py         cross entropy of many logits, in little memory
    generation.py           KV cache, continuous batching (with kv_cache.py and sampling.py)
    static_decoding.py      the decoding step on GPUs: a KV cache of fixed size, and CUDA graphs
    answer_scores.py        log-likelihoods of given answers, for multiple choice
    lora.py                 select and check the trained parameters
    config.py, build.py     llava.json; build a model from its config
    checkpoint.py           save and load

After "Visual Instruction Tuning" (Liu et al., 2023) and "Improved Baselines with Visual Instruction
Tuning" (Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llava_simplified.data.collate import find_image_positions
from llava_simplified.data.images import ImageSource, load_pixels
from llava_simplified.data.records import insert_image_placeholders
from llava_simplified.model.chunked_loss import token_cross_entropy
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.generation import generate, stream
from llava_simplified.model.generation_options import DEFAULT_TEMPERATURE, GenerationOptions
from llava_simplified.model.language_model import (
    attention_kwargs,
    lm_head_at_positions,
    padding_kwargs,
)
from llava_simplified.model.protocols import CausalLM
from llava_simplified.model.vision import VisionTower
from llava_simplified.prompt import IMAGE_INDEX, Message, Prompt


class LlavaOutput(NamedTuple):
    """Result of `Llava.forward`.

    Attributes:
        loss: float32 scalar: the sum (not the mean) over the trained tokens, weighted if `token_weights` are
            given.
        logits: (trained, vocabulary), detached, in the order of `labels`.
        log_probs: float32 (trained,), the log-probability of each label, with gradients.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    log_probs: torch.Tensor


class Llava(nn.Module):
    """A vision tower and a language model, joined by a projector.

    Args:
        vision_tower: Pixels -> patch features (images, tokens, vision hidden size).
        projector: (..., vision hidden size) -> (..., text hidden size).
        language_model: A causal language model of Transformers, or a PEFT model around one.
        tokenizer: The language model's tokenizer.
        template: Name of the prompt template, see `llava_simplified.prompt.Prompt`.
        instruction: Default instruction of `caption`, normally the one used in training.
    """

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

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Llava:
        """Load a checkpoint; for the options, see `llava_simplified.model.checkpoint.load_checkpoint`.

        This method exists because users expect the name `from_pretrained`.
        """
        # Import this here, because checkpoint.py imports this module.
        from llava_simplified.model.checkpoint import load_checkpoint

        return load_checkpoint(folder, **options)

    # ---- training ----

    # Logits are computed at the trained positions only. With 196 patches, a short prompt and a caption of
    # 12 tokens, these are 6 % of the positions. The lm_head has one row per vocabulary entry, so at all
    # positions, it would take a fifth of the computation and produce the largest tensor of a step.
    #
    #     input_ids         <s>  img  img  img  What  is  it  [/INST]  a    cat  </s>
    #     logit_positions                                     7        8    9
    #     labels                                              a        cat  </s>
    #
    # `logit_positions` and `labels` are explicit pairs. The usual labels, shifted by one, do not support
    # shared prompts: several captions of one image may follow one prompt, and the first token of each is
    # predicted from the last position of the prompt. See language_model.py.

    def forward(
        self,
        input_ids: torch.Tensor,
        logit_positions: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> LlavaOutput:
        """Compute the loss of a batch from `llava_simplified.data.collate.Collator`.

        Args:
            input_ids: int64 (batch, length), IMAGE_INDEX at the position of every patch feature.
            logit_positions: int64 (trained,), flat indices into batch x length.
            labels: int64 (trained,), the token to predict at each of these positions.
            pixel_values: uint8 (images, 3, height, width), the images of the batch in the order of their
                placeholders.
            image_features: (images, tokens, vision hidden size). Pass them instead of `pixel_values` if they
                have been computed before.
            image_positions: int64 (placeholders,), flat indices of IMAGE_INDEX in `input_ids`. If they are not
                given, they are searched for, and on a GPU, the host waits for the result.
            attention_mask: int64 (batch, length), 0 on padding, which must be on the right. Use it if each row
                contains one prompt and one answer. For packed rows and shared prompts, pass the next three
                arguments instead.
            segment_ids: int64 (batch, length), number of the example within its row, from 1; 0 on padding.
            branch_ids: int64 (batch, length), number of the answer within its example, from 1; 0 in the prompt.
            position_ids: int64 (batch, length), position within the sequence of prompt and answer, from 0.
            token_weights: (trained,), factor of each token's loss, such as the advantage of its caption (see
                `llava_simplified.training.objectives`); None: 1.
        """
        if image_features is None and pixel_values is not None:
            image_features = self.vision_tower(pixel_values)
        inputs_embeds = self.splice(input_ids, image_features, image_positions)

        attention = padding_kwargs(self.language_model, attention_mask, inputs_embeds.dtype)
        if segment_ids is not None and branch_ids is not None and position_ids is not None:
            attention = attention_kwargs(
                self.language_model, segment_ids, branch_ids, position_ids, inputs_embeds.dtype
            )
        with lm_head_at_positions(self.language_model, logit_positions):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                use_cache=False,
                **{"position_ids": position_ids, **attention},
            )
        logits = outputs.logits.flatten(0, -2)  # (trained, vocabulary)

        # Return the sum of the loss. The trainer adds up micro-batches and devices, and then divides by the number
        # of tokens of the complete step.
        token_losses = token_cross_entropy(logits, labels)
        weighted = token_losses if token_weights is None else token_weights * token_losses
        return LlavaOutput(weighted.sum(), logits.detach(), -token_losses)

    # The splice, which is the core of LLaVA:
    #
    #     input_ids        <s>     -200   -200   -200   What     is     this
    #     embedding table  e(<s>)   .      .      .     e(What)  e(is)  e(this)
    #     projector                p(f0)  p(f1)  p(f2)
    #     inputs_embeds    e(<s>)  p(f0)  p(f1)  p(f2)  e(What)  e(is)  e(this)
    #
    # e(...) is an embedding of the table, f0 to f2 are patch features, and p(...) is the output of the projector.
    # For the language model, this is a sequence of embeddings like any other.

    def splice(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None,
        image_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed the tokens, and put projected patch features in place of the placeholders.

        Args:
            input_ids: int64 (batch, length), IMAGE_INDEX (-200) once per patch feature.
            image_features: (images, tokens, vision hidden size), in the order of the placeholders; None
                if there are no images.
            image_positions: int64 (placeholders,), see `forward`.

        Returns:
            (batch, length, text hidden size)

        Raises:
            ValueError: The numbers of features and placeholders differ. (A single dummy image without
                placeholders is accepted, see `check_image_token_count`.)
        """
        is_image = input_ids == IMAGE_INDEX
        # The table has no row -200, so look up id 0 for the placeholders. The result is overwritten below.
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if image_positions is None:
            image_positions = find_image_positions(input_ids)
        if image_features is None:
            if len(image_positions) > 0:
                raise ValueError(
                    f"no images were given, but the text has {len(image_positions)} image placeholder tokens"
                )
            return embeds
        # The features have the dtype of the vision tower. The projector may have another one: it is float32 while
        # it is trained.
        image_tokens = self.projector(image_features.to(self._projector_dtype(embeds)))
        self.check_image_token_count(len(image_positions), image_features)
        # A micro-batch without images contains one dummy image (see `check_image_token_count`). It has no
        # placeholders, so drop its tokens.
        image_tokens = image_tokens.flatten(0, 1)[: len(image_positions)]
        # Copy by index. The gradient of `masked_scatter` would make the host wait for the GPU.
        spliced = embeds.flatten(0, 1).index_copy(0, image_positions, image_tokens.to(embeds.dtype))
        # Unlike the result of `view_as`, this is not a view. For a view, torch.compile makes a separate graph, so the
        # first layer would be compiled once more than the other layers.
        return torch.ops.aten._unsafe_view(spliced, embeds.shape)

    def check_image_token_count(self, placeholders: int, image_features: torch.Tensor) -> None:
        """Raise ValueError if the numbers of features and placeholders differ.

        Without this check, a prompt could silently get the features of a wrong image.

        Args:
            placeholders: Number of placeholders in the batch.
            image_features: (images, tokens, vision hidden size).
        """
        images, tokens, _ = image_features.shape
        if images * tokens == placeholders:
            return
        # Accept a dummy image. `Collator` adds it to a micro-batch without images, because distributed training
        # requires a gradient for every parameter, including those of the projector. The dummy image does not change
        # the result.
        if images == 1 and placeholders == 0:
            return
        raise ValueError(
            f"{images} image(s) of {tokens} tokens each were given, but the text has {placeholders} image "
            f"placeholder tokens; expected {images * tokens} of them"
        )

    def _projector_dtype(self, embeds: torch.Tensor) -> torch.dtype:
        """Return the dtype of the projector's weights, or of `embeds` if it has none (an identity)."""
        for parameter in self.projector.parameters():
            return parameter.dtype
        return embeds.dtype

    # ---- generation ----

    # `caption`, `chat` and `stream` may be called from several threads, which then take turns. The model must be in
    # evaluation mode. To answer many requests together, use `llava serve`.

    def caption(
        self,
        images: ImageSource | Sequence[ImageSource],
        instruction: str | None = None,
        num_return_sequences: int = 1,
        batch_size: int = 16,
        **options: Any,
    ) -> Any:
        """Caption one image or several.

            model.caption("cat.jpg")                           -> "a cat on a sofa"
            model.caption("cat.jpg", num_return_sequences=2)   -> ["a cat on a sofa", "a cat asleep"]
            model.caption(["cat.jpg", "dog.jpg"])              -> ["a cat on a sofa", "a dog"]

        Args:
            images: A path, bytes, a PIL image or a uint8 RGB array (height, width, 3); or a list of these.
            instruction: Text of the user turn; by default the instruction of the training data.
                It may contain `<image>` at the place of the image; otherwise, the image comes first.
            num_return_sequences: Number of captions per image. If it is above 1, the captions are sampled (by
                default with the temperature 0.7), unless `num_beams` is above 1.
            batch_size: Number of images to process at a time.
            **options: Fields of `GenerationOptions`: max_new_tokens, temperature, top_p, num_beams, ...

        Returns:
            For one image: a caption, or a list of captions if `num_return_sequences` is above 1. For a
            list of images: a list with one such result per image.

        Raises:
            ImageError: An image cannot be read.
            ValueError: An option has an invalid value.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        is_list = isinstance(images, (list, tuple))
        sources: Any = images if is_list else [images]
        turn = Message("user", self.instruction if instruction is None else instruction)
        turns = insert_image_placeholders([turn], 1, "the instruction")
        prompt = self.prompt.render(turns, None).input_ids
        if num_return_sequences > 1 and options.get("num_beams", 1) == 1:
            options = {"temperature": DEFAULT_TEMPERATURE, **options}
        generation_options = GenerationOptions(num_return_sequences=num_return_sequences, **options)

        captions: list[list[str]] = []
        for start in range(0, len(sources), batch_size):
            # Transform each image before loading the next one, so that only one full-size image is in memory.
            pixels = []
            for source in sources[start : start + batch_size]:
                pixels.append(self.vision_tower.transform(load_pixels(source)))
            prompts = [prompt] * len(pixels)
            captions += generate(self, prompts, torch.stack(pixels), generation_options)

        results: list[Any] = captions
        if num_return_sequences == 1:
            results = [texts[0] for texts in captions]
        return results if is_list else results[0]

    def chat(
        self,
        turns: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        **options: Any,
    ) -> str:
        """Return the answer to the last turn of a conversation. For the arguments, see `stream`."""
        pieces = self.stream(turns, images, **options)
        return "".join(pieces).strip()

    def stream(
        self,
        turns: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        **options: Any,
    ) -> Iterator[str]:
        """Yield the answer to the last turn of a conversation in pieces, as it is generated.

        Args:
            turns: A question, or the conversation so far. Its last turn must be the user's.
            images: One image per `<image>` in the user turns. If the turns contain no `<image>`, the images
                are placed before the text of the first user turn.
            **options: Fields of `GenerationOptions`, with one beam and one sequence.
        """
        prompt, pixel_values = self.prepare_inputs(turns, images)
        yielded = 0
        for text in stream(self, prompt, pixel_values, GenerationOptions(**options)):
            yield text[yielded:]
            yielded = len(text)

    def prepare_inputs(
        self,
        turns: str | Sequence[Message],
        images: Sequence[ImageSource],
    ) -> tuple[list[int], torch.Tensor | None]:
        """Render a conversation and load its images, as described for `stream`.

        Returns:
            The token ids of the prompt, with one IMAGE_INDEX per image; and the pixels, uint8 (images, 3, height,
            width), or None if there are no images.
        """
        if isinstance(turns, str):
            turns = [Message("user", turns)]
        turns = insert_image_placeholders(turns, len(images), "the conversation")
        prompt = self.prompt.render(turns, None).input_ids
        if not images:
            return prompt, None
        pixels = [self.vision_tower.transform(load_pixels(image)) for image in images]
        return prompt, torch.stack(pixels)

    # ---- the interface that Trainer, FSDP and DeepSpeed expect ----

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def config(self) -> Any:
        """The language model's Transformers config. DeepSpeed reads the hidden size from it."""
        return self.language_model.config

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the transformer layers. FSDP gathers the weights of one layer at a time."""
        names = {
            *(self.language_model._no_split_modules or ()),
            *(self.vision_tower.model._no_split_modules or ()),
        }
        existing = {type(module).__name__ for module in self.modules()}
        return sorted(existing & names)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the activations of the layers in the backward pass instead of storing them.

        A frozen vision tower is skipped, since it stores no activations anyway.
        """
        self.language_model.gradient_checkpointing_enable(**options)
        if not self.vision_tower.frozen:
            self.vision_tower.model.gradient_checkpointing_enable(**options)
