"""Examples -> batches. Every position of a batch is final here: lengths, who sees whom, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX


@dataclass(slots=True)
class Example:
    """One sample, ready for a batch: a prompt and an answer, or several answers that share the prompt.

    Attributes:
        input_ids, labels: as `Prompt.render` made them, one IMAGE_INDEX per image; the answers one behind the other.
        branches: of each token, 0 in the prompt, n in the n-th answer. None: there is one answer, no need to tell.
        pixel_values: uint8 (images, 3, height, width), or None for text only.
        image_features: (images, tokens, width), in place of pixels where they were computed before.
        warnings: what a person should know of this sample: a picture that had to be replaced, a cut answer.
        id: its record's, for messages to people.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    warnings: list[str] = field(default_factory=list)
    branches: list[int] | None = None
    id: str = ""


def expand_image_placeholders(
    ids: Sequence[int], tokens_per_image: int, like: Sequence[int] | None = None
) -> np.ndarray:
    """Repeat every IMAGE_INDEX `tokens_per_image` times: room for the patch features.

    Args:
        ids: token ids (length,).
        like: repeat these values instead (the labels), at the places where `ids` has an image.
    """
    array = np.asarray(ids, dtype=np.int64)
    values = array if like is None else np.asarray(like, dtype=np.int64)
    return np.repeat(values, np.where(array == IMAGE_INDEX, tokens_per_image, 1))


def pad_sequences(rows: Sequence[np.ndarray], value: int, side: str = "right") -> torch.Tensor:
    """(rows, longest row), `value` where a row is shorter. Training pads right, generation left."""
    length = max(len(row) for row in rows)
    out = np.full((len(rows), length), value, dtype=np.int64)
    for target, row in zip(out, rows):
        target[: len(row) if side == "right" else None][-len(row) :] = row
    return torch.from_numpy(out)


class ExpandedExample(NamedTuple):
    """An example, position by position, by the batch's names. All arrays are (length,) but the last two, which are (trained,)."""

    input_ids: np.ndarray
    branch_ids: np.ndarray
    position_ids: np.ndarray  # counted on from the prompt's last in every branch
    logit_positions: np.ndarray  # from which a trained token is predicted
    labels: np.ndarray  # that token


def expand_example(example: Example, tokens_per_image: int) -> ExpandedExample:
    """Make room for the patch features, and say which token is predicted where.

    The first token of every branch follows the prompt's last: no shift of the labels can express that, so each
    trained token comes with the index it is predicted from.
    """
    ids = expand_image_placeholders(example.input_ids, tokens_per_image)
    labels = expand_image_placeholders(example.input_ids, tokens_per_image, example.labels)
    index = np.arange(len(ids))
    before, position_ids, branches = index - 1, index, np.zeros_like(ids)
    answers = 1
    if example.branches is not None:
        branches = expand_image_placeholders(example.input_ids, tokens_per_image, example.branches)
        starts = np.flatnonzero(np.diff(branches, prepend=0))
        answers, prompt = len(starts), starts[0]
        before[starts] = prompt - 1
        own_start = np.concatenate([[0], starts])[np.searchsorted(starts, index, side="right")]
        position_ids = np.where(branches == 0, index, prompt + index - own_start)
    trained = np.flatnonzero(labels != IGNORE_INDEX)
    trained = trained[trained > 0]  # nothing stands before the first
    # an earlier answer inside the shared prompt is trained as often as if every branch had its own prompt
    trained = np.repeat(trained, np.where(branches[trained] == 0, answers, 1))
    return ExpandedExample(ids, branches, position_ids, before[trained], labels[trained])


class Collator:
    """Stack examples into what `Llava.forward` takes. A row is an example, or a pack: a list of them.

    Returns a dict with
        input_ids (batch, length): IMAGE_INDEX at every position that a patch feature will fill;
        positions (trained,): flat indices into (batch x length) from which a token is predicted;
        labels (trained,): that token. Only these positions get logits;
        attention_mask (batch, length): 0 on the padding at the right; or, where a row holds more than one prompt and one answer,
        segment_ids (batch, length): 0 on padding, n in a row's n-th example,
        branch_ids (batch, length): 0 in a prompt, n in its n-th answer, and
        position_ids (batch, length): what the model takes for a token's place in its text;
        pixel_values (images, 3, height, width) or image_features (images, tokens, width), in reading order; `dummy_image`
            where the batch has no image: processes that share a model's weights all have to run all of its layers;
        about: what is for people and not for the model: the examples' `ids` and `warnings`, and `tokens`, how many positions
            are no padding.
    """

    def __init__(
        self,
        tokens_per_image: int,
        pad_id: int,
        dummy_image: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.pad_id = pad_id
        self.dummy_image = dummy_image or {}

    def __call__(self, rows: Sequence[Example | Sequence[Example]]) -> dict[str, Any]:
        packs = [[row] if isinstance(row, Example) else list(row) for row in rows]
        laid = [
            [expand_example(example, self.tokens_per_image) for example in pack] for pack in packs
        ]
        examples = [example for pack in packs for example in pack]
        input_ids = pad_sequences(
            [np.concatenate([s.input_ids for s in pack]) for pack in laid], self.pad_id
        )
        positions, labels = [], []
        for row, pack in enumerate(laid):
            start = row * input_ids.shape[1]
            for sequence in pack:
                positions.append(start + sequence.logit_positions)
                labels.append(sequence.labels)
                start += len(sequence.input_ids)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "logit_positions": torch.from_numpy(np.concatenate(positions)),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "metadata": {
                "ids": [example.id for example in examples],
                "warnings": [note for example in examples for note in example.warnings],
                "tokens": sum(len(sequence.input_ids) for pack in laid for sequence in pack),
            },
        }
        if len(examples) == len(packs) and all(example.branches is None for example in examples):
            batch["attention_mask"] = pad_sequences(
                [np.ones(len(pack[0].input_ids)) for pack in laid], 0
            )
        else:
            segments = [
                [np.full(len(s.input_ids), n) for n, s in enumerate(pack, start=1)] for pack in laid
            ]
            batch["segment_ids"] = pad_sequences([np.concatenate(pack) for pack in segments], 0)
            batch["branch_ids"] = pad_sequences(
                [np.concatenate([s.branch_ids for s in pack]) for pack in laid], 0
            )
            batch["position_ids"] = pad_sequences(
                [np.concatenate([s.position_ids for s in pack]) for pack in laid], 0
            )
        for name in ("pixel_values", "image_features"):
            images = [getattr(e, name) for e in examples if getattr(e, name) is not None]
            if images:
                batch[name] = torch.cat(images)
        return (
            batch
            if batch.keys() & {"pixel_values", "image_features"}
            else {**batch, **self.dummy_image}
        )
