"""Rewards: what a sampled caption is worth, `--reward cider=1.0,length=0.1`.

    cider      CIDEr-D against the record's responses; words that the responses to many images contain count
               less (the numbers of images are counted over all training records)
    bleu4      BLEU-4 of each caption by itself, instead of all captions together
    rouge_l    the longest common subsequence with a reference
    word_f1    the best F1 of the words, for any language that separates words by spaces
    length     1 for a caption as long as a reference in words, 0 for twice as long and for an empty one
    clipscore  how well the caption fits the image, by the CLIP model of `--reward_clip`
    qa         the share of the record's questions that a language model on a server, `--reward_endpoint`,
               answers correctly from the caption alone

    my_module:my_function    a function of your own: (image paths, references, captions) -> numbers

CIDEr-D, BLEU-4 and ROUGE-L equal those of pycocoevalcap, and CLIPScore equals that of `llava evaluate --clip`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava_simplified.data.images import ImageError, locate_image
from llava_simplified.data.questions import Question
from llava_simplified.data.records import Record
from llava_simplified.evaluation.metrics import word_f1
from llava_simplified.evaluation.ngram_metrics import MAX_ORDER, ngram_metrics
from llava_simplified.evaluation.ptb_tokenizer import cached_tokenize
from llava_simplified.evaluation.rouge import rouge_l
from llava_simplified.training.cider_reward import CiderScorer, DocumentFrequencies
from llava_simplified.training.user_reward import UserReward

BUILT_IN = ("cider", "bleu4", "rouge_l", "word_f1", "length", "clipscore", "qa")


class RewardedRecord(Protocol):
    """The fields of a record that rewards read. `rollouts.PromptExample` has them."""

    id: str
    image: str
    references: tuple[str, ...]
    questions: tuple[Question, ...]


def rewarded_image(record: Record, image_folder: Path) -> str:
    """Return the path of a record's first image, or "" if it has none.

    It is the file that training reads, whose path may differ from the name in the record; see `image_folder`. For an image
    in an archive, the path ends with its key: shard.tar#0001. Most rewards need no image, so one that is not there is no
    error here.

    Raises:
        ImageError: "unsafe" if the path leads out of the image folder.
    """
    if not record.images:
        return ""
    name = record.images[0]
    try:
        located = locate_image(name, image_folder)
    except ImageError as error:
        if error.kind == "unsafe":
            raise
        return str(image_folder / name)  # reading it raises an error that says why
    return str(located.path) if located.key is None else f"{located.path}#{located.key}"


RewardFunction = Callable[[Sequence[RewardedRecord], Sequence[str]], Sequence[float]]
"""The record of each caption, and the captions -> one number per caption."""


@dataclass(frozen=True)
class RewardOptions:
    """Options that only some rewards need. Most are command-line options: `workers` is `--reward_workers`.

    Attributes:
        workers: Number of worker processes for the user's function.
        timeout: Maximum time in seconds for that function to score the captions of a step, and for one request to
            the server.
        clip: Folder of the CLIP model of `clipscore`.
        device: Device on which the CLIP model runs.
        endpoint: Base URL of the server of `qa`.
        endpoint_model: Name of the server's model.
        tries: How often each question of `qa` is asked.
        seed: Seed of the order in which the options of a question are shown.
        frequencies_file: File that stores the document frequencies of `cider`, or None to store none.
        data_digest: Text that identifies the training records.
    """

    workers: int = 0
    timeout: float = 60.0
    clip: str = ""
    device: str = "cpu"
    endpoint: str = ""
    endpoint_model: str = ""
    tries: int = 1
    seed: int = 0
    frequencies_file: Path | None = None
    data_digest: str = ""

    @classmethod
    def from_arguments(cls, args: Any, **others: Any) -> RewardOptions:
        """Return the options of `llava train` or `llava pairs`.

        Args:
            args: The parsed arguments.
            others: Fields that are not command-line options.
        """
        return cls(
            workers=args.reward_workers,
            timeout=args.reward_timeout,
            clip=args.reward_clip,
            endpoint=args.reward_endpoint,
            endpoint_model=args.reward_endpoint_model,
            tries=args.reward_tries,
            **others,
        )


# ---- rewards of texts ----


def _bleu4(records: Sequence[RewardedRecord], captions: Sequence[str]) -> list[float]:
    """Return the BLEU-4 of each caption."""
    tokens = [cached_tokenize(caption) for caption in captions]
    reference_tokens = [[cached_tokenize(text) for text in record.references] for record in records]
    _, _, bleu = ngram_metrics([tokens], reference_tokens)
    # `finish` usually computes the score of a corpus from summed statistics. Here it gets the statistics of
    # each caption: (captions, statistics) -> (captions, BLEU-1 to BLEU-4).
    [statistics] = bleu.statistics
    scores: list[float] = bleu.finish(statistics, 1)[:, MAX_ORDER - 1].tolist()
    return scores


def _rouge_l(caption: str, references: Sequence[str]) -> float:
    return rouge_l(cached_tokenize(caption), [cached_tokenize(text) for text in references])


def length_reward(caption: str, references: Sequence[str]) -> float:
    """Return 1 minus the relative difference in length to a reference, in words; at least 0.

    With several references, the best value is returned.
    """
    num_words = len(caption.split())
    best = 0.0
    for reference in references:
        target = max(len(reference.split()), 1)
        best = max(best, 1 - abs(num_words - target) / target)
    return best


def _for_each(score: Callable[[str, Sequence[str]], float]) -> RewardFunction:
    """Return a reward that scores each caption separately."""

    def reward(records: Sequence[RewardedRecord], captions: Sequence[str]) -> list[float]:
        return [score(caption, record.references) for caption, record in zip(captions, records)]

    return reward


# ---- weighted sums ----


def parse_rewards(text: str) -> dict[str, float]:
    """Parse `--reward`: names with weights, such as "cider=1.0,length=0.1"; no weight means 1.

    Raises:
        ValueError: A name is unknown or repeated, or a weight is not a number.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in BUILT_IN and ":" not in name:
            raise ValueError(
                f"--reward {text}: unknown reward {name!r}; expected {', '.join(BUILT_IN)}, or module:function."
            )
        if name in weights:
            raise ValueError(f"--reward {text}: {name} occurs twice. Pass each reward once.")
        try:
            weight = float(value) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(
                f"--reward {text}: the weight of {name} must be a number, not {value!r}. Pass weights as in "
                "cider=1.0,length=0.1."
            )
        weights[name] = weight
    return weights


class Reward:
    """A weighted sum of rewards.

    Args:
        text: `--reward`.
        references: The references of each training record, for the document frequencies of `cider`.
        options: Options that only some rewards need.

    Raises:
        ValueError: A reward is unknown, an option that it needs is missing, or its function cannot be imported.
    """

    def __init__(
        self,
        text: str,
        references: Iterable[Sequence[str]],
        options: RewardOptions = RewardOptions(),
    ) -> None:
        self._weights = parse_rewards(text)
        check_reward_options(self._weights, options)
        self._functions: dict[str, RewardFunction] = {}
        self._counts = Counter[str]()
        for name in self._weights:
            self._functions[name] = _build(name, references, options, self._counts)

    def __call__(self, records: Sequence[RewardedRecord], captions: Sequence[str]) -> list[float]:
        """Return the reward of each caption.

        Args:
            records: The record of each caption.
            captions: The captions.

        Raises:
            ValueError: A reward fails, or is not finite; the message names the record.
        """
        totals = [0.0] * len(captions)
        for name, weight in self._weights.items():
            values = self._functions[name](records, captions)
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    raise ValueError(
                        f"--reward {name}: the reward of {records[index].id} is {value}; "
                        f"its caption is {captions[index]!r}."
                    )
                totals[index] += weight * value
        return totals

    def pop_counts(self) -> dict[str, int]:
        """Return the counts of `QaReward` since the last call: questions that were asked, and left unanswered."""
        counts = dict(self._counts)
        self._counts.clear()
        return counts


def check_reward_options(names: Iterable[str], options: RewardOptions) -> None:
    """Check that every reward has the options that it needs.

    Args:
        names: Names of the rewards.
        options: Options that only some rewards need.

    Raises:
        ValueError: An option is missing, has no effect, or has an invalid value.
    """
    names = set(names)
    has_function = any(":" in name for name in names)
    needs = (
        ("clipscore", "--reward_clip", options.clip, "the folder of a CLIP model"),
        ("qa", "--reward_endpoint", options.endpoint, "the URL of a server with OpenAI's API"),
        ("qa", "--reward_endpoint_model", options.endpoint_model, "the name of its model"),
    )
    # Reject a missing option, and an option that would be ignored.
    for name, option, value, meaning in needs:
        if name in names and not value:
            raise ValueError(f"--reward {name} requires {option}: {meaning}.")
        if value and name not in names:
            raise ValueError(
                f"{option} has no effect without the reward {name}. Remove the option, or add {name} to --reward."
            )
    if has_function and options.workers < 0:
        raise ValueError(f"--reward_workers {options.workers}: expected 0 or more.")
    if not (options.timeout > 0 and math.isfinite(options.timeout)):
        raise ValueError(
            f"--reward_timeout {options.timeout:g}: expected a number of seconds above 0."
        )
    if options.tries < 1:
        raise ValueError(f"--reward_tries {options.tries}: expected 1 or more.")


def _build(
    name: str,
    references: Iterable[Sequence[str]],
    options: RewardOptions,
    counts: Counter[str],
) -> RewardFunction:
    """Return the function that computes the reward `name`; `counts` is updated by the reward `qa`."""
    if name == "cider":
        return _for_each(CiderScorer(_frequencies(references, options)).score)
    if name == "bleu4":
        return _bleu4
    if name == "rouge_l":
        return _for_each(_rouge_l)
    if name == "word_f1":
        return _for_each(word_f1)
    if name == "length":
        return _for_each(length_reward)
    if name == "clipscore":
        return _clipscore(options)
    if name == "qa":
        return _qa(options, counts)
    return _user_function(name, options)


def _frequencies(
    references: Iterable[Sequence[str]], options: RewardOptions
) -> DocumentFrequencies:
    """Return the document frequencies that the run has stored. If there are none, count and store them."""
    path = options.frequencies_file
    # With the stored frequencies, a resumed run computes the same rewards and need not count again.
    stored = DocumentFrequencies.load(path, options.data_digest) if path else None
    if stored is not None:
        return stored
    counted = DocumentFrequencies.count(references)
    if path:
        counted.save(path, options.data_digest)
    return counted


def _clipscore(options: RewardOptions) -> RewardFunction:
    """Return the reward `clipscore`."""
    # Import this here, because most runs need neither CLIP nor a server.
    from llava_simplified.training.clip_reward import ClipReward

    clip = ClipReward(options.clip, options.device)

    def reward(records: Sequence[RewardedRecord], captions: Sequence[str]) -> list[float]:
        return clip(
            [record.id for record in records], [record.image for record in records], captions
        )

    return reward


def _qa(options: RewardOptions, counts: Counter[str]) -> RewardFunction:
    """Return the reward `qa`, which updates `counts`."""
    from llava_simplified.captioning.endpoint_options import EndpointOptions
    from llava_simplified.training.qa_reward import QaReward

    endpoint = EndpointOptions(options.endpoint, options.endpoint_model, timeout=options.timeout)
    qa = QaReward(endpoint, options.tries, options.seed, counts)

    def reward(records: Sequence[RewardedRecord], captions: Sequence[str]) -> list[float]:
        return qa(
            [record.id for record in records], [record.questions for record in records], captions
        )

    return reward


def _user_function(name: str, options: RewardOptions) -> RewardFunction:
    """Return the reward function that the user wrote, given as `module:function`."""
    function = UserReward(name, options.workers, options.timeout)

    def reward(records: Sequence[RewardedRecord], captions: Sequence[str]) -> list[float]:
        return function(
            [record.id for record in records],
            [record.image for record in records],
            [record.references for record in records],
            captions,
        )

    return reward
