"""Make preference pairs from sampled captions: of two captions, the one with the higher reward is chosen.

    samples of 0.jpg    reward    --pairing best_worst     --pairing ranked

    a black cat         1.0       a black cat chosen,      a black cat chosen, a bird rejected
    a cat               0.8       a bird rejected          a cat chosen, a dog rejected
    a dog               0.1
    a bird              0.0

`best_worst` gives one pair per image, with the largest difference. `ranked` pairs the best sample with the worst one, the second
best with the second worst, and so on: N samples give up to N / 2 pairs, in which a caption takes part as often as it is sampled.
At the start of training, the gradient of these pairs is a policy gradient: each sample above the median of its image becomes more
likely, and each one below it less likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from llava_simplified.data.images import ImageError
from llava_simplified.data.questions import Question
from llava_simplified.data.records import Record, Records, response_problem
from llava_simplified.data.rows import open_rows
from llava_simplified.prepare.record_writer import RecordWriter
from llava_simplified.prompt import IMAGE_PLACEHOLDER
from llava_simplified.training.rewards import Reward, rewarded_image

SUFFIXES = (".json", ".jsonl")
Pairing: TypeAlias = Literal["best_worst", "ranked"]
# The captions of this many records are passed to the reward at once, which matters for rewards that run a model.
_REWARD_BATCH = 1024


@dataclass
class _SampledRecord:
    """A record, as rewards read it (see `rewards.RewardedRecord`)."""

    id: str
    image: str
    references: tuple[str, ...]
    questions: tuple[Question, ...]


class _Candidate(NamedTuple):
    """A record that may give pairs, and its captions in the order of the file."""

    record: Record
    rewarded: _SampledRecord
    captions: list[str]


def read_samples(path: Path, records: Records) -> dict[int, list[str]]:
    """Read the captions that `llava predict` has generated for each record.

    Args:
        path: The prediction file: one row per caption, with the `index` of the record.
        records: The records that were captioned.

    Returns:
        Index of a record -> its captions, in the order of the file.

    Raises:
        ValueError: A row is not a prediction, or belongs to other records. The message names the file and the row.
    """
    samples: dict[int, list[str]] = {}
    rows = open_rows(path)
    for number in range(len(rows)):
        row = rows[number]
        where = f"{path} row {number}"
        index, caption = row.get("index"), row.get("pred_output")
        if type(index) is not int or not isinstance(caption, str):
            raise ValueError(
                f"{where}: expected a row of `llava predict`, with the keys index and pred_output; got {sorted(row)}"
            )
        _check_same_image(row, index, records, where)
        samples.setdefault(index, []).append(caption.strip())
    return samples


def _check_same_image(row: Mapping[str, Any], index: int, records: Records, where: str) -> None:
    """Check that a prediction is about the image of the record with its index.

    Raises:
        ValueError: There is no such record, or it has another image.
    """
    if not 0 <= index < len(records):
        raise ValueError(
            f"{where}: index {index}, but --data-path has only {len(records)} records; pass the file that was captioned"
        )
    images = records[index].images
    expected = images[0] if images else None
    if row.get("image") != expected:
        raise ValueError(
            f"{where}: the image is {row.get('image')!r}, but record {index} in --data-path has the image {expected!r}; "
            "pass the file that was captioned"
        )


def write_pairs(
    samples: Mapping[int, Sequence[str]],
    records: Records,
    reward: Reward,
    output: Path,
    *,
    image_folder: Path,
    pairing: Pairing = "best_worst",
    min_difference: float = 0.0,
) -> Counter[str]:
    """Write the pairs of each record whose captions differ in reward.

    Args:
        samples: The captions of each record, see `read_samples`.
        records: The records that were captioned, with their references.
        reward: The reward of captions.
        output: Output file: .json or .jsonl.
        image_folder: Folder of the images.
        pairing: Which captions of a record are compared: "best_worst", those with the highest and the lowest reward, or
            "ranked", also the second highest with the second lowest, and so on.
        min_difference: Minimum difference of the rewards of chosen and rejected; pairs with equal rewards are
            never written.

    Returns:
        The number of pairs, and the number of records without a pair by the reason.

    Raises:
        ValueError: A reward fails, or no record gives a pair.
    """
    counts: Counter[str] = Counter()
    candidates: list[_Candidate] = []
    for index, captions in samples.items():
        record = records[index]
        # Empty captions cannot be trained on: DPO needs two answers.
        usable = [caption for caption in captions if caption]
        if response_problem(record):
            counts["without a reference"] += 1
        elif len(set(usable)) < 2:
            counts["with fewer than two distinct captions"] += 1
        else:
            try:
                image = rewarded_image(record, image_folder)
            except ImageError:
                counts["with an image outside the image folder"] += 1
                continue
            rewarded = _SampledRecord(record.id, image, record.responses, record.questions)
            candidates.append(_Candidate(record, rewarded, usable))

    with RecordWriter(output) as writer:
        for start in range(0, len(candidates), _REWARD_BATCH):
            batch = candidates[start : start + _REWARD_BATCH]
            for candidate, rewards in zip(batch, _rewards(batch, reward)):
                compared = _compared_captions(candidate.captions, rewards, pairing)
                pairs = [
                    (better, worse)
                    for better, worse in compared
                    if rewards[better] > rewards[worse]
                    and rewards[better] - rewards[worse] >= min_difference
                ]
                for better, worse in pairs:
                    writer.write(_pair(candidate.record, better, worse))
                counts["pairs"] += len(pairs)
                if not pairs:
                    counts["with too small a difference of rewards"] += 1
        # Raise inside the `with` block, so that the empty file is discarded.
        if not writer.count:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            raise ValueError(
                f"no record has two captions whose rewards differ enough ({reasons}). Sample more captions with `llava "
                "predict` (--trials, --temperature), or lower --min-difference."
            )
    return counts


def _rewards(batch: Sequence[_Candidate], reward: Reward) -> list[dict[str, float]]:
    """Return the reward of each distinct caption of each record, computed in one call."""
    distinct = [dict.fromkeys(candidate.captions, 0.0) for candidate in batch]
    records = [candidate.rewarded for candidate, captions in zip(batch, distinct) for _ in captions]
    values = iter(reward(records, [caption for captions in distinct for caption in captions]))
    return [{caption: next(values) for caption in captions} for captions in distinct]


def _compared_captions(
    captions: Sequence[str], rewards: Mapping[str, float], pairing: Pairing
) -> list[tuple[str, str]]:
    """Return the captions of a record that are compared: (higher reward, lower reward); see `write_pairs`."""
    if pairing == "best_worst":
        return [(max(rewards, key=rewards.__getitem__), min(rewards, key=rewards.__getitem__))]
    ranked = sorted(captions, key=rewards.__getitem__, reverse=True)
    return list(zip(ranked[: len(ranked) // 2], reversed(ranked)))


def _pair(record: Record, chosen: str, rejected: str) -> dict[str, Any]:
    """Return the prompt of a record with two answers, as a JSON object."""
    answers = {"chosen": chosen, "rejected": rejected}
    [*others, last] = record.turns
    if not others and len(record.images) <= 1:
        # The placeholder in front is inserted again when the pair is read.
        instruction = last.content.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
        image = record.images[0] if record.images else None
        return {"image": image, "instruction": instruction, **answers}
    turns = [{"from": turn.role, "value": turn.content} for turn in record.turns]
    return {"images": list(record.images), "conversations": turns, **answers}
