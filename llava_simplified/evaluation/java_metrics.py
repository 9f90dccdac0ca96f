"""METEOR and SPICE through pycocoevalcap, which runs them in Java."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np

from llava_simplified.evaluation.bootstrap import Score, ScoreTable


class _Scorer(Protocol):
    """The interface of pycocoevalcap's scorers."""

    def compute_score(
        self, references: dict[int, list[str]], captions: dict[int, list[str]]
    ) -> tuple[float, Sequence[object]]: ...


class _JavaScores(NamedTuple):
    """The scores of one metric, with a row for each trial and a last one for the best captions."""

    corpus: np.ndarray  # (trials + 1,)
    per_image: np.ndarray  # (trials + 1, images)


def add_java_metrics(
    table: ScoreTable, captions: list[list[str]], references: list[list[str]]
) -> list[str]:
    """Add METEOR and SPICE to the scores, if Java and pycocoevalcap are installed.

    The two have no intervals. For METEOR, each resample would require a run of Java, because its corpus score is not a
    mean over images.

    Args:
        table: The scores, changed in place.
        captions: Tokens separated by spaces, by trial and image.
        references: Tokens separated by spaces, by image and reference.

    Returns:
        Notes about skipped metrics, with the reason.
    """
    scorers, notes = _find_scorers()
    # The last entry of the scores belongs to the best captions, the others to the trials.
    for name, scorer in scorers.items():
        scores = _compute(name, scorer, captions, references)
        for trial_scores, value in zip(table.trials, scores.corpus):
            trial_scores[name] = Score(float(value))
        table.mean[name] = Score(float(scores.corpus[:-1].mean()))
        table.best[name] = Score(float(scores.corpus[-1]))
        table.per_image[name] = scores.per_image[:-1]
    return notes


def _find_scorers() -> tuple[dict[str, _Scorer], list[str]]:
    """Return the scorers that can run here, and notes about the others."""
    if not shutil.which("java"):
        return {}, ["METEOR and SPICE were skipped: the program `java` is not on the PATH"]
    if not importlib.util.find_spec("pycocoevalcap"):
        return {}, [
            "METEOR and SPICE were skipped: pycocoevalcap is not installed "
            "(pip install pycocoevalcap)"
        ]
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice import spice

    scorers: dict[str, _Scorer] = {"METEOR": Meteor()}
    notes: list[str] = []
    # Look for SPICE's models before creating Spice(), which would download them over plain HTTP without asking.
    models = Path(spice.__file__).parent / "lib" / "stanford-corenlp-3.6.0-models.jar"
    if models.is_file():
        scorers["SPICE"] = spice.Spice()
    else:
        notes.append(
            f"SPICE was skipped: {models} is missing; "
            "`python -m pycocoevalcap.spice.get_stanford_models` downloads it (0.4 GB)"
        )
    return scorers, notes


def _compute(
    name: str, scorer: _Scorer, captions: list[list[str]], references: list[list[str]]
) -> _JavaScores:
    """Run one scorer on the captions of each trial, and on the best caption of each image."""
    corpus: list[float] = []
    per_image: list[list[float]] = []

    def score(trial: Sequence[str]) -> None:
        """Append the scores of one caption per image to both lists."""
        # The scorers expect dictionaries of lists, so wrap each caption in a list.
        captions_of_image = {image: [caption] for image, caption in enumerate(trial)}
        corpus_score, image_scores = scorer.compute_score(
            dict(enumerate(references)), captions_of_image
        )
        corpus.append(corpus_score)
        per_image.append([_image_score(name, image_score) for image_score in image_scores])

    for trial in captions:
        score(trial)
    # The best captions are scored again, together, because METEOR's corpus score is not a mean over images.
    best_trial = np.array(per_image).argmax(axis=0)
    score([captions[trial][image] for image, trial in enumerate(best_trial)])
    return _JavaScores(np.array(corpus), np.array(per_image))


def _image_score(name: str, score: object) -> float:
    """Return the score of one image as a number: METEOR returns numbers, and SPICE returns dictionaries."""
    # SPICE returns dictionaries: {"All": {"pr": ..., "re": ..., "f": ...}, ...}
    if name == "SPICE":
        return cast(dict[str, dict[str, float]], score)["All"]["f"]
    return float(cast(float, score))
