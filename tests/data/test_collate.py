"""Collating: batches, position by position; packs; and the order of the examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import num_examples

from llava_simplified.data.collate import Collator, Example
from llava_simplified.data.packing import plan_packs
from llava_simplified.data.samplers import LengthGroupedSampler
from llava_simplified.prompt import IGNORE_INDEX as NO
from llava_simplified.prompt import IMAGE_INDEX as IMAGE

PAD = 99


# ---- batches ----


def test_collator_makes_a_plain_batch() -> None:
    with_image = Example(
        [0, IMAGE, 5, 6, 7],
        [NO, NO, NO, 6, 7],
        pixel_values=torch.zeros(1, 3, 2, 2),
    )
    text_only = Example([0, 8, 9], [NO, 8, 9], warnings=["truncated answer, row 2"])
    batch = Collator(tokens_per_image=3, pad_token_id=PAD)([with_image, text_only])
    assert batch["input_ids"].tolist() == [
        [0, IMAGE, IMAGE, IMAGE, 5, 6, 7],
        [0, 8, 9, PAD, PAD, PAD, PAD],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
    ]
    # 6 is predicted from 5 (index 4), and 8 from the first token of the second row (index 7).
    assert batch["logit_positions"].tolist() == [4, 5, 7, 8]
    assert batch["labels"].tolist() == [6, 7, 8, 9]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert batch["metadata"]["warnings"] == ["truncated answer, row 2"]


def test_collator_predicts_every_branch_from_the_shared_prompt() -> None:
    """The prompt is `<s> IMG 4`, the answers are `5 6 1` and `7 1`."""
    shared = Example(
        [0, IMAGE, 4, 5, 6, 1, 7, 1],
        [NO, NO, NO, 5, 6, 1, 7, 1],
        branches=[0, 0, 0, 1, 1, 1, 2, 2],
    )
    single = Example([0, 8], [NO, 8])
    batch = Collator(tokens_per_image=2, pad_token_id=PAD)([shared, single])
    assert batch["input_ids"][0].tolist() == [0, IMAGE, IMAGE, 4, 5, 6, 1, 7, 1]
    assert batch["branch_ids"].tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 2, 2],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert batch["segment_ids"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    # Both 5 and 7 are predicted from index 3, the end of the prompt.
    assert batch["logit_positions"].tolist() == [3, 4, 5, 3, 7, 9]
    assert batch["labels"].tolist() == [5, 6, 1, 7, 1, 8]
    assert "attention_mask" not in batch


def test_collator_trains_an_answer_inside_a_shared_prompt_once_per_branch() -> None:
    shared = Example(
        [0, 5, 1, 4, 6, 7],
        [NO, 5, 1, NO, 6, 7],
        branches=[0, 0, 0, 0, 1, 2],
    )
    batch = Collator(tokens_per_image=2, pad_token_id=PAD)([shared])
    assert sorted(batch["labels"].tolist()) == [1, 1, 5, 5, 6, 7]


def test_collator_numbers_the_examples_of_a_pack() -> None:
    first = Example([0, IMAGE, 5], [NO, NO, 5])
    second = Example([0, 8, 9], [NO, 8, 9])
    batch = Collator(tokens_per_image=2, pad_token_id=PAD)([[first, second], [second]])
    assert batch["input_ids"].tolist() == [
        [0, IMAGE, IMAGE, 5, 0, 8, 9],
        [0, 8, 9, PAD, PAD, PAD, PAD],
    ]
    assert batch["segment_ids"].tolist() == [
        [1, 1, 1, 1, 2, 2, 2],
        [1, 1, 1, 0, 0, 0, 0],
    ]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch["logit_positions"].tolist() == [2, 4, 5, 7, 8]
    assert batch["labels"].tolist() == [5, 8, 9, 8, 9]


def test_collator_describes_the_batch_in_metadata() -> None:
    first = Example([0, IMAGE, 5], [NO, NO, 5], id="row 0")
    second = Example([0, 8, 9], [NO, 8, 9], id="row 1", warnings=["a", "b"])
    batch = Collator(tokens_per_image=4, pad_token_id=PAD)([[first, second], [second]])
    assert type(batch) is dict
    assert batch["metadata"] == {
        "ids": ["row 0", "row 1", "row 1"],
        "warnings": ["a", "b", "a", "b"],
        "tokens": 6 + 3 + 3,
        "images": 1,
    }


def test_collator_keeps_images_in_reading_order() -> None:
    def example(*values: float) -> Example:
        """Return an example with one constant image for each value."""
        pixels = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        placeholders = [IMAGE] * len(values)
        return Example([*placeholders, 1], [NO] * len(values) + [1], pixel_values=pixels)

    batch = Collator(tokens_per_image=2, pad_token_id=0)([example(1, 2), example(3)])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 3]


def test_collator_adds_the_dummy_image_only_to_batches_without_images() -> None:
    text_only = Example([1, 2], [NO, 2])
    pixels = torch.ones(1, 3, 2, 2)
    with_image = Example([IMAGE, 1], [NO, 1], pixel_values=pixels)

    assert "pixel_values" not in Collator(4, 0)([text_only])
    collator = Collator(4, 0, dummy_image={"pixel_values": torch.zeros_like(pixels)})
    assert not collator([text_only])["pixel_values"].any()
    batch = collator([text_only, with_image])
    assert torch.equal(batch["pixel_values"], pixels)


def test_collator_passes_precomputed_features_in_place_of_pixels() -> None:
    features = torch.rand(1, 3, 8)
    batch = Collator(3, 0)([Example([IMAGE, 2], [NO, 2], image_features=features)])
    assert torch.equal(batch["image_features"], features)
    assert "pixel_values" not in batch


# ---- packs ----


def assert_each_index_once(packs: list[list[int]], count: int) -> None:
    """Assert that the packs contain each index from 0 to count - 1 once."""
    assert sorted(index for pack in packs for index in pack) == list(range(count))


def pack_totals(packs: list[list[int]], lengths: list[int]) -> list[int]:
    """Return the number of positions of each pack."""
    return [sum(lengths[index] for index in pack) for pack in packs]


def test_plan_packs_fills_packs_and_depends_on_the_seed() -> None:
    # Lengths like those of Conceptual Captions: 196 patches, a prompt of 20 tokens, and 8 to 40 tokens per caption.
    random = np.random.default_rng(0)
    caption_lengths = 8 + random.gamma(2.0, 3.0, size=20_000).clip(0, 32)
    lengths = (216 + caption_lengths).astype(int).tolist()
    packs = plan_packs(lengths, 4096, seed=1)
    assert_each_index_once(packs, 20_000)
    totals = pack_totals(packs, lengths)
    assert max(totals) <= 4096
    assert sum(totals) / (4096 * len(packs)) >= 0.95
    assert packs == plan_packs(lengths, 4096, seed=1)
    assert packs != plan_packs(lengths, 4096, seed=2)


@pytest.mark.parametrize(("pack_length", "least_fill"), [(4096, 0.95), (2048, 0.94)])
def test_plan_packs_fills_packs_of_conceptual_captions(pack_length: int, least_fill: float) -> None:
    """Examples have 196 patches, a prompt of 20 tokens, and a caption of 3 to 50 words (mean 10.3).

    A pack of 1024 positions would hold four examples, and a tenth of it would stay empty. Longer packs are fuller.
    """
    words = np.random.default_rng(0).lognormal(2.25, 0.42, 20_000).clip(3, 50)
    assert 9.5 < words.mean() < 11
    lengths = (216 + np.rint(1.3 * words)).astype(int).tolist()
    packs = plan_packs(lengths, pack_length, seed=0)
    assert_each_index_once(packs, len(lengths))
    totals = pack_totals(packs, lengths)
    assert max(totals) <= pack_length
    # A batch is as long as its longest pack.
    assert sum(totals) / (max(totals) * len(totals)) >= least_fill


@given(
    lengths=st.lists(st.integers(1, 90), max_size=150),
    pack_length=st.integers(1, 80),
    seed=st.integers(0, 9),
    pool=st.integers(1, 60),
)
@settings(max_examples=num_examples(300), deadline=None)
def test_plan_packs_never_exceeds_the_pack_length(
    lengths: list[int], pack_length: int, seed: int, pool: int
) -> None:
    packs = plan_packs(lengths, pack_length, seed, pool)
    assert_each_index_once(packs, len(lengths))
    totals = pack_totals(packs, lengths)
    for pack, total in zip(packs, totals):
        is_single = len(pack) == 1
        assert total <= pack_length or is_single, "only a single example can be too long"
    if pool >= len(lengths) and len(totals) >= 2:
        two_smallest = sorted(totals)[:2]
        assert sum(two_smallest) > pack_length, "two packs would fit into one"
    assert packs == plan_packs(lengths, pack_length, seed, pool)


# ---- the order of examples ----


def test_length_grouped_sampler_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(20, 60, size=1003)
    sampler = LengthGroupedSampler(lengths.tolist(), 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert len(sampler) == 1003

    batches = [lengths[order[start : start + 8]] for start in range(0, 1003, 8)]
    tokens = sum(batch.sum() for batch in batches)
    positions = sum(len(batch) * batch.max() for batch in batches)
    assert tokens / positions > 0.95  # with a random order: 0.73


def test_length_grouped_sampler_mixes_long_and_short_batches() -> None:
    lengths = np.random.default_rng(0).integers(20, 60, size=1003)
    order = list(LengthGroupedSampler(lengths.tolist(), 8, seed=3))
    # The order of the 50 batches of one pool must not follow their lengths.
    means = [lengths[order[start : start + 8]].mean() for start in range(0, 50 * 8, 8)]
    correlation = np.corrcoef(means, np.arange(50))[0, 1]
    assert abs(correlation) < 0.4


def test_length_grouped_sampler_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(range(100), 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(0, 1)
    torch.manual_seed(2)
    assert first == order(0, 1)
    assert first != order(0, 0)
    assert first != order(1, 1)
