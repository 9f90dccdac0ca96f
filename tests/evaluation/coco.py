"""Captions of our own for the tests, and the COCO server's code where it is installed."""

from __future__ import annotations

import random
import shutil

import pytest

from llava_simplified.evaluation.metrics import Sample

needs_java = pytest.mark.skipif(
    not shutil.which("java"), reason="Stanford's tokenizer and METEOR need java"
)

_THINGS = [
    "a cat",
    "two old dogs",
    "the red car",
    "an empty boat",
    "children",
    "a person's hand",
    "t-shirts",
]
_ACTS = [
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


def make_samples(
    count: int, trials: int = 1, most_references: int = 4, seed: int = 0
) -> list[Sample]:
    """Pictures whose references agree in part, as COCO's do, and captions that are right in part."""
    dice = random.Random(seed)

    def sentence(words: tuple[str, str, str], change: float) -> str:
        chosen = [dice.choice(pool) if dice.random() < change else word
                  for word, pool in zip(words, (_THINGS, _ACTS, _PLACES))]  # fmt: skip
        text = " ".join(chosen) + dice.choice(["", " .", "!", " -- again", ", twice"])
        return text.capitalize() if dice.random() < 0.5 else text

    samples = []
    for index in range(count):
        scene = (dice.choice(_THINGS), dice.choice(_ACTS), dice.choice(_PLACES))
        references = [sentence(scene, 0.2) for _ in range(dice.randint(1, most_references))]
        captions = [sentence(scene, 0.5) if dice.random() > 0.03 else "" for _ in range(trials)]
        samples.append(
            Sample(str(index), f"{index}.jpg", "Describe.", tuple(references), tuple(captions))
        )
    return samples
