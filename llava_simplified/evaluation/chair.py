"""CHAIR: how many of the objects that captions mention are not in the image (Rohrbach et al. 2018, arXiv:1809.02156).

Each caption is reduced to the COCO categories that it mentions. An object is hallucinated if neither the instance
annotations of the image nor its reference captions contain it:

    caption        "a man with two hot dogs on a bench"
    mentions       person, hot dog, bench
    in the image   person, hot dog, dining table            (instances and references)
    hallucinated   bench            CHAIRi: 1 of 3 mentions; CHAIRs: 1 of 1 captions

The words and rules are data: `coco_objects.yaml`, which names its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from llava_simplified.data.names import AmbiguousNameError
from llava_simplified.evaluation.bootstrap import Metric
from llava_simplified.evaluation.references import References

_VOCABULARY = "coco_objects.yaml"
# A hyphenated word is one token: "man-made" does not mention a man. Punctuation marks are tokens: "hot, dog"
# does not mention a hot dog.
_TOKEN = re.compile(r"\w+(?:[-/]\w+)*|[^\w\s]")
_MAX_SHOWN = 3  # maximum number of images that an error message names


class Vocabulary(NamedTuple):
    """The words of `coco_objects.yaml`.

    Attributes:
        category_of: Category of each word, such as "puppy" -> "dog". The categories themselves are words too.
        double_words: Single word that replaces a pair of adjacent words, such as "baby elephant" -> "elephant".
        singular_of: Singular of each plural form of the words above.
    """

    category_of: dict[str, str]
    double_words: dict[str, str]
    singular_of: dict[str, str]


@cache
def load_vocabulary() -> Vocabulary:
    """Read the categories, words and rules."""
    path = files("llava_simplified.evaluation").joinpath(_VOCABULARY)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    category_of = {}
    for category, words in content["categories"].items():
        for word in (category, *words):
            category_of[word] = category
    double_words: dict[str, str] = dict(content["double_words"])
    for qualifier, words in content["qualifiers"].items():
        for word in words:
            double_words[f"{qualifier} {word}"] = word

    # Derive the plural of each known word, instead of guessing the singular of every word of a caption: a rule
    # that turns "dogs" into "dog" would also turn "bus" into "bu".
    known = set(category_of)
    for pair in double_words:
        known.update(pair.split())
    singular_of = {}
    for word in known:
        for plural in _plurals(word):
            if plural not in known:  # "skis" is a category itself, and stays "skis"
                singular_of[plural] = word
    singular_of.update(content["irregular_plurals"])
    return Vocabulary(category_of, double_words, singular_of)


def _plurals(word: str) -> Iterator[str]:
    """Yield the regular plural forms of a word."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        yield word + "es"
    elif re.search("[^aeiou]y$", word):
        yield word[:-1] + "ies"
    else:
        yield word + "s"
        if word.endswith("o"):
            yield word + "es"


def mentioned_objects(caption: str) -> list[str]:
    """Return the COCO categories that a caption mentions, in order. A category mentioned twice occurs twice."""
    vocabulary = load_vocabulary()
    tokens = []
    for token in _TOKEN.findall(caption.lower()):
        tokens.append(vocabulary.singular_of.get(token, token))
    words = _join_double_words(tokens, vocabulary.double_words)
    # "seat" usually means a chair, but not in "the seat of the toilet".
    if "toilet" in words:
        words = [word for word in words if word != "seat"]
    return [vocabulary.category_of[word] for word in words if word in vocabulary.category_of]


def _join_double_words(tokens: Sequence[str], double_words: Mapping[str, str]) -> list[str]:
    """Replace pairs of adjacent tokens, from left to right; a token belongs to one pair at most."""
    words = []
    position = 0
    while position < len(tokens):
        pair = " ".join(tokens[position : position + 2])
        if pair in double_words:
            words.append(double_words[pair])
            position += 2
        else:
            words.append(tokens[position])
            position += 1
    return words


def chair_metrics(
    captions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    annotated: Sequence[Collection[str]],
) -> list[Metric]:
    """Return CHAIRs, the fraction of captions that hallucinate, and CHAIRi, the fraction of hallucinated mentions.

    Args:
        captions: Captions by trial and image.
        references: References by image.
        annotated: The categories that are annotated in each image.
    """
    # Last axis: number of hallucinated mentions, number of all mentions.
    counts = np.zeros((len(captions), len(references), 2))
    for image, group in enumerate(references):
        # Annotations miss some objects, mostly small ones, which the references may mention.
        present = set(annotated[image])
        for reference in group:
            present.update(mentioned_objects(reference))
        for trial, trial_captions in enumerate(captions):
            mentions = mentioned_objects(trial_captions[image])
            hallucinated = [name for name in mentions if name not in present]
            counts[trial, image] = len(hallucinated), len(mentions)

    # The bootstrap sums these arrays over the images of a resample; `finish` turns the sums into scores.
    has_hallucination = (counts[..., :1] > 0).astype(float)
    return [
        Metric(
            names=("CHAIRs",),
            statistics=has_hallucination,
            finish=lambda sums, num_images: sums / num_images,
            lower_is_better=True,
        ),
        Metric(
            names=("CHAIRi",),
            statistics=counts,
            finish=_hallucinated_share,
            lower_is_better=True,
        ),
    ]


def _hallucinated_share(sums: np.ndarray, num_images: int) -> np.ndarray:
    """Return hallucinated / mentioned; 0 if nothing is mentioned.

    Args:
        sums: Numbers of hallucinated and of all mentions, (..., 2).
        num_images: Unused. Every `finish` function receives it, but CHAIRi divides by the number of mentions, not of
            images.
    """
    hallucinated = sums[..., :1]
    mentioned = sums[..., 1:]
    return np.divide(hallucinated, mentioned, out=np.zeros_like(hallucinated), where=mentioned > 0)


# ---- annotations ----


def read_instances(paths: Sequence[Path]) -> References:
    """Read COCO instance annotations, such as instances_val2014.json.

    Args:
        paths: Files of `{"images", "annotations", "categories"}`. Karpathy's splits need two files,
            for train2014 and val2014.

    Returns:
        The categories of each image. `References` stores them in place of captions, and finds them by the image's name.

    Raises:
        ValueError: A file cannot be read, has another form, or has a category that is not one of COCO's 80.
    """
    categories: dict[str, list[str]] = {}  # by image id
    names: dict[str, str] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            _add_instances(content, categories, names)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"--instances: {path} cannot be read: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--instances: {path} is not a COCO file of instances ({type(error).__name__}: {error}). It needs "
                '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id"}], '
                '"categories": [{"id", "name"}]}.'
            ) from None
    by_name = {name: categories[image_id] for image_id, name in names.items()}
    return References(by_name, categories, names)


def _add_instances(
    content: Mapping[str, list[dict[str, object]]],
    categories: dict[str, list[str]],
    names: dict[str, str],
) -> None:
    """Add the images of one file, and the categories of each."""
    known = load_vocabulary().category_of
    category_names = {}
    for category in content["categories"]:
        name = str(category["name"])
        # Only a category is mapped to itself. Other words, such as "puppy", are mapped to their category.
        if known.get(name) != name:
            raise ValueError(f"the category {name!r} is not one of COCO's 80 object categories")
        category_names[category["id"]] = name
    for image in content["images"]:
        names[str(image["id"])] = str(image["file_name"])
        categories.setdefault(str(image["id"]), [])
    for annotation in content["annotations"]:
        found = categories.setdefault(str(annotation["image_id"]), [])
        name = category_names[annotation["category_id"]]
        if name not in found:
            found.append(name)


def annotated_objects(images: Sequence[str], instances: References) -> list[tuple[str, ...]]:
    """Return the annotated categories of each image.

    Args:
        images: Names of the images.
        instances: Result of `read_instances`.

    Raises:
        ValueError: An image is not in the files. Without its annotations, every mentioned object would count as
            hallucinated.
    """
    objects = []
    missing = []
    for image in images:
        try:
            match = instances.find(image)
        except AmbiguousNameError as error:
            raise ValueError(f"--instances: {error}") from None
        if match.rule == "none":
            missing.append(image)
        # `read_instances` stores categories in the place of captions.
        objects.append(match.captions)
    if missing:
        shown = ", ".join(map(repr, missing[:_MAX_SHOWN]))
        raise ValueError(
            f"--instances: {len(missing)} of {len(images)} images are not in the files, for example {shown}. "
            "Repeat the option for the other files (Karpathy's splits need instances_train2014.json and "
            "instances_val2014.json)."
        )
    return objects
