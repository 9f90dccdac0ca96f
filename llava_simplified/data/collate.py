"""Examples -> batches: expand image placeholders, pad, and list the trained (position, target) pairs.

A collated batch specifies everything about a position: its token, the sequence that it belongs to, the positions that
it attends to, and whether a token is predicted from it. The model derives nothing from the order of the tokens.

**Image placeholders.** A prompt contains one `IMAGE_INDEX` per image. A batch needs one position per patch feature:

    input_ids   <s>  IMG  What  ?                      one placeholder
    expanded    <s>  IMG  IMG  IMG  IMG  What  ?       tokens_per_image = 4

**Pairs instead of shifted labels.** A causal language model is usually trained on labels that are shifted by one: the
token at position i + 1 is the target of position i, so every position has at most one target. That cannot express an
example whose answers share one prompt, because the last position of the prompt predicts the first token of *every*
answer:

    prompt "<s> IMG :", answers "a cat </s>" and "my pet </s>", tokens_per_image = 2

    position          0    1    2    3  |  4    5    6    |  7    8    9
    token            <s>  IMG  IMG   :  |  a   cat  </s>  |  my  pet  </s>
    branch_ids        0    0    0    0  |  1    1    1    |  2    2    2
    position_ids      0    1    2    3  |  4    5    6    |  4    5    6
    predicted from    -    -    -    -  |  3    4    5    |  3    7    8

A batch therefore lists pairs: `logit_positions` (where a token is predicted) and `labels` (which token). Position 3
occurs twice. The model computes logits at the listed positions only, which also saves most of the work of the lm_head:
in a caption that follows 196 patches, 94 % of the positions are not trained.

Training several continuations of one prompt as branches of one sequence is prior work: Molmo and Molmo2 ("message
trees"), PrefixGrouper, flash-preference, unsloth's GRPO, NeMo Automodel. What is special here: the first token of every
branch is trained too, and images are part of the prefix, so loss and gradients equal those of separate sequences.

**Who attends to whom.** Three integers per position describe all attention masks:

    segment_ids     0 on padding, n in the n-th example of a pack: positions attend within their segment only
    branch_ids      0 in a prompt, n in its n-th answer: an answer attends to its prompt and to itself
    position_ids    the position within the text as if prompt and answer stood alone, for rotary embeddings

If every row is one prompt with one answer, the batch has an ordinary attention mask instead of these three tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch

from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX


@dataclass(slots=True)
class Example:
    """One tokenized sample: a prompt with one answer, or with several answers that share the prompt.

    Attributes:
        input_ids: Token ids from `Prompt.render`, with one IMAGE_INDEX per image. Several answers are concatenated.
        labels: The token id at trained positions, IGNORE_INDEX elsewhere. Not shifted; as long as `input_ids`.
        pixel_values: uint8 (images, 3, height, width); None if the sample has no image, or has features.
        image_features: (images, tokens, hidden size): precomputed features in place of pixels, or None.
        warnings: Problems that the user should know about: an unreadable image, a truncated answer.
        branches: For each token 0 in the prompt, n in the n-th answer; None if there is only one answer.
        id: Name of the record, for messages ("train.json row 7").
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    warnings: list[str] = field(default_factory=list)
    branches: list[int] | None = None
    id: str = ""


class BatchMetadata(TypedDict):
    """The part of a batch that only the trainer uses, for its logs. It is not passed to the model."""

    ids: list[str]  # `Example.id` of each example
    warnings: list[str]
    tokens: int  # positions that are not padding
    images: int  # without the dummy image


class _RequiredBatchKeys(TypedDict):
    input_ids: torch.Tensor
    logit_positions: torch.Tensor
    labels: torch.Tensor
    image_positions: torch.Tensor
    metadata: BatchMetadata


class Batch(_RequiredBatchKeys, total=False):
    """Output of `Collator` and (without `metadata`) input of `Llava.forward`. A plain dict at run time.

    Always present:
        input_ids: int64 (batch, length), IMAGE_INDEX at the position of every patch feature.
        logit_positions: int64 (trained,), indices into the flattened (batch * length) positions: where a token is
            predicted. An index can occur more than once.
        labels: int64 (trained,), the token that is predicted there.
        image_positions: int64 (images * tokens_per_image,), indices into the flattened positions: where `input_ids` is
            IMAGE_INDEX. They are listed here, on the host, because a GPU could only count them while the host waits.
        metadata: See `BatchMetadata`.

    Present if every row is one prompt with one answer:
        attention_mask: int64 (batch, length), 1 on tokens and 0 on padding.

    Present otherwise (packing, shared prompts), each int64 (batch, length):
        segment_ids, branch_ids, position_ids: See the module's docstring.

    At most one of:
        pixel_values: uint8 (images, 3, height, width), in reading order over the batch.
        image_features: (images, tokens, hidden size), in the same order.
    """

    attention_mask: torch.Tensor
    segment_ids: torch.Tensor
    branch_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_features: torch.Tensor


def expand_image_placeholders(
    input_ids: Sequence[int],
    tokens_per_image: int,
    values: Sequence[int] | None = None,
) -> np.ndarray:
    """Repeat every image placeholder `tokens_per_image` times: once per patch feature.

    Args:
        input_ids: Token ids (length,) with one IMAGE_INDEX per image.
        tokens_per_image: Number of patch features per image.
        values: (length,). One value per token id, for example labels. If given, expand these values instead of the ids.

    Returns:
        int64 (length + num_images * (tokens_per_image - 1),).
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    repeats = np.where(ids == IMAGE_INDEX, tokens_per_image, 1)
    if values is None:
        return np.repeat(ids, repeats)
    return np.repeat(np.asarray(values, dtype=np.int64), repeats)


def pad_sequences(
    sequences: Sequence[np.ndarray],
    value: int,
    side: Literal["left", "right"] = "right",
) -> torch.Tensor:
    """Stack sequences of different lengths into one tensor.

    Args:
        sequences: Arrays (length_i,).
        value: Value of the padding.
        side: Side of the padding. Training pads right; generation pads left, so that all rows end at the same
            position.

    Returns:
        int64 (sequences, longest length).
    """
    longest = max(len(sequence) for sequence in sequences)
    padded = np.full((len(sequences), longest), value, dtype=np.int64)
    for row, sequence in zip(padded, sequences):
        if side == "right":
            row[: len(sequence)] = sequence
        else:
            row[longest - len(sequence) :] = sequence
    return torch.from_numpy(padded)


def find_image_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """Return the indices of the image placeholders in the flattened token ids.

    Call it before the token ids are copied to a GPU. The size of the result depends on the values of the ids, so on a
    GPU the host would have to wait for it.

    Args:
        input_ids: int64 (batch, length).

    Returns:
        int64 (placeholders,).
    """
    return (input_ids.flatten() == IMAGE_INDEX).nonzero().flatten()


class ExpandedExample(NamedTuple):
    """An example with expanded image placeholders. All arrays are int64; positions count from the example's start."""

    input_ids: np.ndarray  # (length,)
    branch_ids: np.ndarray  # (length,)
    position_ids: np.ndarray  # (length,), continued from the end of the prompt in every branch
    logit_positions: np.ndarray  # (trained,), where each trained token is predicted
    labels: np.ndarray  # (trained,), the trained tokens


def expand_example(example: Example, tokens_per_image: int) -> ExpandedExample:
    """Expand the image placeholders of an example, and list its (position, target) pairs.

    The module's docstring has a worked example.

    Args:
        example: The tokenized sample.
        tokens_per_image: Number of patch features per image.
    """
    ids = expand_image_placeholders(example.input_ids, tokens_per_image)
    labels = expand_image_placeholders(example.input_ids, tokens_per_image, example.labels)
    index = np.arange(len(ids))

    # Without branches, a token is predicted from its predecessor.
    predicted_from = index - 1
    position_ids = index
    branch_ids = np.zeros_like(ids)
    num_branches = 1
    if example.branches is not None:
        branch_ids = expand_image_placeholders(
            example.input_ids, tokens_per_image, example.branches
        )
        # The first position of each branch. The prompt is branch 0 and begins at 0.
        starts = np.flatnonzero(np.diff(branch_ids, prepend=0))
        num_branches = len(starts)
        prompt_length = starts[0]
        # The first token of a branch follows the last token of the prompt, not the end of the previous branch.
        predicted_from[starts] = prompt_length - 1
        # Index of the first token of the branch that each position belongs to; not used in the prompt.
        branch_number = np.searchsorted(starts, index, side="right")
        start_of_own_branch = np.concatenate([[0], starts])[branch_number]
        position_ids = np.where(
            branch_ids == 0,
            index,
            prompt_length + index - start_of_own_branch,
        )

    trained = np.flatnonzero(labels != IGNORE_INDEX)
    trained = trained[trained > 0]  # the first token has no position to be predicted from
    # Repeat a trained token inside the shared prompt (an earlier answer of the conversation) once per branch, as if
    # every branch had its own copy of the prompt. Otherwise sharing would change its weight in the loss.
    trained = np.repeat(trained, np.where(branch_ids[trained] == 0, num_branches, 1))
    return ExpandedExample(
        input_ids=ids,
        branch_ids=branch_ids,
        position_ids=position_ids,
        logit_positions=predicted_from[trained],
        labels=labels[trained],
    )


class Collator:
    """Collate examples into a `Batch`. A row of the batch is one example, or a pack: a list of examples."""

    def __init__(
        self,
        tokens_per_image: int,
        pad_token_id: int,
        dummy_image: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Create a collator.

        Args:
            tokens_per_image: Number of patch features per image.
            pad_token_id: Token id that fills the padding. Any valid id works, because no token attends to padding.
            dummy_image: `{"pixel_values": ...}` or `{"image_features": ...}` with one empty image, added to batches
                without images. In distributed training every process must run every layer, otherwise gradient
                synchronization hangs.
        """
        self.tokens_per_image = tokens_per_image
        self.pad_token_id = pad_token_id
        self.dummy_image = dummy_image or {}

    def __call__(self, rows: Sequence[Example | Sequence[Example]]) -> Batch:
        """Collate examples or packs of examples."""
        # Treat a single example as a pack of one. `expanded` has one list per pack, `examples` is flat.
        examples: list[Example] = []
        expanded: list[list[ExpandedExample]] = []
        for row in rows:
            pack = [row] if isinstance(row, Example) else list(row)
            examples += pack
            expanded.append([expand_example(example, self.tokens_per_image) for example in pack])

        input_ids = pad_sequences(_concatenate(expanded, "input_ids"), self.pad_token_id)
        logit_positions, labels = _flatten_pairs(expanded, row_length=input_ids.shape[1])
        image_positions = find_image_positions(input_ids)
        batch: Batch = {
            "input_ids": input_ids,
            "logit_positions": logit_positions,
            "labels": labels,
            "image_positions": image_positions,
            "metadata": _describe(
                examples, expanded, num_images=len(image_positions) // self.tokens_per_image
            ),
        }

        has_packs = len(examples) > len(expanded)
        has_branches = any(example.branches is not None for example in examples)
        if not has_packs and not has_branches:
            # Prefer a plain mask, which every attention implementation supports.
            masks = [np.ones_like(example.input_ids) for [example] in expanded]
            batch["attention_mask"] = pad_sequences(masks, 0)
        else:
            batch["segment_ids"] = pad_sequences([_segment_ids(pack) for pack in expanded], 0)
            batch["branch_ids"] = pad_sequences(_concatenate(expanded, "branch_ids"), 0)
            batch["position_ids"] = pad_sequences(_concatenate(expanded, "position_ids"), 0)
        self._add_images(batch, examples)
        return batch

    def _add_images(self, batch: Batch, examples: Sequence[Example]) -> None:
        """Concatenate the images of all examples in reading order, or add the dummy image."""
        pixels: list[torch.Tensor] = []
        features: list[torch.Tensor] = []
        for example in examples:
            if example.pixel_values is not None:
                pixels.append(example.pixel_values)
            if example.image_features is not None:
                features.append(example.image_features)
        # Concatenate instead of stack, because examples have different numbers of images. The model assigns images
        # to placeholders by their order.
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        if features:
            batch["image_features"] = torch.cat(features)
        if not pixels and not features:
            batch.update(self.dummy_image)  # type: ignore[typeddict-item]


def _concatenate(expanded: Sequence[Sequence[ExpandedExample]], name: str) -> list[np.ndarray]:
    """For each pack, concatenate the field `name` of its examples."""
    rows = []
    for pack in expanded:
        arrays = [getattr(example, name) for example in pack]
        rows.append(np.concatenate(arrays))
    return rows


def _segment_ids(pack: Sequence[ExpandedExample]) -> np.ndarray:
    """Return n for every position of the n-th example of a pack, counted from 1 (0 means padding)."""
    segments = []
    for number, example in enumerate(pack, start=1):
        segments.append(np.full_like(example.input_ids, number))
    return np.concatenate(segments)


def _flatten_pairs(
    expanded: Sequence[Sequence[ExpandedExample]], row_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logit positions, as indices into the flattened batch, and labels of all examples."""
    positions = []
    labels = []
    for row, pack in enumerate(expanded):
        # Start of the example in the flattened batch. There is no padding between the examples of a row.
        start = row * row_length
        for example in pack:
            positions.append(start + example.logit_positions)
            labels.append(example.labels)
            start += len(example.input_ids)
    flat_positions = torch.from_numpy(np.concatenate(positions))
    flat_labels = torch.from_numpy(np.concatenate(labels))
    return flat_positions, flat_labels


def _describe(
    examples: Sequence[Example],
    expanded: Sequence[Sequence[ExpandedExample]],
    num_images: int,
) -> BatchMetadata:
    """Return the metadata of a batch."""
    metadata: BatchMetadata = {"ids": [], "warnings": [], "tokens": 0, "images": num_images}
    for example in examples:
        metadata["ids"].append(example.id)
        metadata["warnings"] += example.warnings
    for pack in expanded:
        for expanded_example in pack:
            metadata["tokens"] += len(expanded_example.input_ids)
    return metadata
