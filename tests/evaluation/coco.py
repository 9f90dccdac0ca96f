"""Captions for the tests of the metrics, and a mark for tests that need Java."""

from __future__ import annotations

import random
import shutil

import pytest

from llava_simplified.evaluation.metrics import Sample

needs_java = pytest.mark.skipif(
    not shutil.which("java"), reason="Stanford's tokenizer and METEOR need java"
)

_SUBJECTS = [
    "a cat",
    "two old dogs",
    "the red car",
    "an empty boat",
    "children",
    "a person's hand",
    "t-shirts",
]
_VERBS = [
    "sleeps on",
    "is parked by",
    "runs across",
    "looks at",
    "doesn't see",
    "waits for",
    "flies over",
]
_PLACES = [
    "the mat",
    "a green field",
    "the U.S. border",
    "St. Mary's church",
    "3 trees",
    "the beach",
    "a wall",
]
_ENDINGS = ["", " .", "!", " -- again", ", twice"]


def make_samples(
    count: int, trials: int = 1, most_references: int = 4, seed: int = 0
) -> list[Sample]:
    """Create samples whose references partly agree, as in COCO, and whose captions are partly right.

    Args:
        count: Number of images.
        trials: Number of captions of each image. About 3 % of the captions are empty.
        most_references: Maximum number of references of an image.
        seed: Seed. The expected scores in test_metrics.py depend on it and on the order of the random draws.
    """
    dice = random.Random(seed)

    def make_sentence(words: tuple[str, str, str], change: float) -> str:
        """Replace each part with the probability `change`, and vary the end and the capitals."""
        chosen = []
        for word, pool in zip(words, (_SUBJECTS, _VERBS, _PLACES)):
            chosen.append(dice.choice(pool) if dice.random() < change else word)
        text = " ".join(chosen) + dice.choice(_ENDINGS)
        return text.capitalize() if dice.random() < 0.5 else text

    samples = []
    for index in range(count):
        scene = (dice.choice(_SUBJECTS), dice.choice(_VERBS), dice.choice(_PLACES))
        references = [make_sentence(scene, 0.2) for _ in range(dice.randint(1, most_references))]
        captions = []
        for _ in range(trials):
            is_empty = dice.random() <= 0.03
            captions.append("" if is_empty else make_sentence(scene, 0.5))
        sample = Sample(
            index=str(index),
            image=f"{index}.jpg",
            instruction="Describe.",
            references=tuple(references),
            captions=tuple(captions),
        )
        samples.append(sample)
    return samples
