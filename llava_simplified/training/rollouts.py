"""Rollouts: sample several captions of each image, and arrange them as branches of one shared prompt.

    record --> prompt, image features --prefill once--> caption 1 --+
                                                        caption 2 --+--> one example with branches
                                                        caption 3 --+    (see `data.collate`)

The prompt is computed only once, both in sampling (`DecodingBatch` copies its KV cache where captions diverge)
and in training (`Llava.forward` computes a shared prompt once for all of its branches).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, cast

import torch

from llava_simplified.data.collate import Batch, Collator, Example
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.data.images import ImageError
from llava_simplified.data.packing import plan_packs
from llava_simplified.data.questions import Question
from llava_simplified.data.records import Record
from llava_simplified.model.generation import DecodingBatch, encode_images, eval_mode
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX
from llava_simplified.training.rewards import rewarded_image

# Answers[prompt][sample] are token ids. The last one is the end token, unless the answer was cut off.
Answers = list[list[list[int]]]


@dataclass(slots=True)
class PromptExample(Example):
    """A prompt without an answer; answers are sampled later.

    Attributes:
        references: The responses of the record. Rewards compare sampled answers with them.
        image: Path of the first image; empty for a record without images.
        questions: The multiple-choice questions of the record.
        reference_answers: The token ids of each reference, if references are trained too.
    """

    references: tuple[str, ...] = ()
    image: str = ""
    questions: tuple[Question, ...] = ()
    reference_answers: list[list[int]] = field(default_factory=list)


class PromptDataset(CaptionDataset):
    """A dataset with one prompt per record, and the record's responses as references.

    Attributes:
        trains_references: Tokenize the references, for `--sft_weight`.
    """

    trains_references = False

    def tokenize(self, record: Record, responses: Sequence[str]) -> PromptExample:
        """Return the prompt of a record, without its images."""
        trained = responses if self.trains_references else ()
        prefix, answers, warnings = self.tokenize_answers(record, trained)
        prompt = prefix.input_ids
        return PromptExample(
            prompt,
            # Earlier answers of a conversation are not sampled, so they get no labels either.
            [IGNORE_INDEX] * len(prompt),
            warnings=warnings,
            id=record.id,
            references=tuple(responses),
            image=self._rewarded_image(record),
            questions=record.questions,
            reference_answers=answers,
        )

    def _rewarded_image(self, record: Record) -> str:
        """Return the path of the image; empty if it is outside the image folder."""
        try:
            return rewarded_image(record, self.image_folder)
        except ImageError:
            return ""  # `load_images` refuses it too, and then the record is counted as bad


class PromptBatch(TypedDict):
    """A micro-batch before its captions are sampled."""

    examples: list[PromptExample]


class PromptCollator(Collator):
    """Collate examples of the validation set as usual, and pass prompts on as they are."""

    def __call__(self, rows: Sequence[Example | Sequence[Example]]) -> Batch:
        """Return a `Batch`, or a `PromptBatch` if the rows are prompts."""
        prompts = [row for row in rows if isinstance(row, PromptExample)]
        if not prompts:
            return super().__call__(rows)
        return PromptBatch(examples=prompts)  # type: ignore[return-value]


def encode_prompt_images(model: Llava, examples: Sequence[Example]) -> list[torch.Tensor | None]:
    """Return the features of the images of each example: (images, tokens, hidden size), or None."""
    features: list[torch.Tensor | None] = []
    for example in examples:
        # A dataset returns features if they are cached, otherwise pixels.
        if example.image_features is not None:
            features.append(example.image_features.to(model.device))
        elif example.pixel_values is not None:
            features.append(encode_images(model, example.pixel_values))
        else:
            features.append(None)
    return features


def sample_answers(
    model: Llava,
    examples: Sequence[Example],
    image_features: Sequence[torch.Tensor | None],
    options: GenerationOptions,
    step: int,
) -> Answers:
    """Generate `num_return_sequences` answers for each prompt.

    The random numbers of a sample depend only on the seed, the step, the record and the number of the
    sample, and not on the batch. A resumed run therefore samples the same answers as an uninterrupted one.

    Args:
        model: The model.
        examples: The prompts.
        image_features: The features of their images, from `encode_prompt_images`.
        options: Options for all prompts, with a seed.
        step: Number of the training step.

    Raises:
        FloatingPointError: The logits of a sequence are not finite.
    """
    prompts = [example.input_ids for example in examples]
    given = [features for features in image_features if features is not None]
    all_features = torch.cat(given) if given else None
    hashes = [hashlib.sha256(f"{step}|{example.id}".encode()).digest() for example in examples]
    # Do not use compiled layers here: they would be compiled again for each length of the sequence.
    with eval_mode(model), torch.compiler.set_stance("force_eager"):
        batch = DecodingBatch(model, prompts, all_features, options, hashes)
        while batch.active:
            batch.step()
            batch.raise_errors()
    sequences = list(batch.generated_ids.values())
    samples = options.num_return_sequences
    return [sequences[start : start + samples] for start in range(0, len(sequences), samples)]


# Samples of an image are often equal, especially if the model is certain. Equal captions have equal gradients, so
# each distinct caption is trained once, with the sum of the weights. The examples then differ much in length, so
# several short ones are packed into a row as long as the longest one.
#
#     5 samples of image 1:  a cat, a cat, my pet, a cat, a cat      rows    prompt 1  a cat  my pet
#     5 samples of image 2:  a dog, a dog, a dog, a dog, a dog               prompt 2  a dog  |  prompt 3  a red car
#     ...


class TrainedAnswer(NamedTuple):
    """One or several equal answers to a prompt, and how they are trained.

    Attributes:
        ids: Token ids, with the end token.
        scale: Normalization of each token's loss, summed over the equal answers; 0 if the answer was not sampled.
        weight: Factor of each token's loss, summed over the equal answers.
        num_samples: Number of equal samples; 0 if the answer was not sampled.
    """

    ids: tuple[int, ...]
    scale: float
    weight: float
    num_samples: int


def merge_equal_answers(answers: Sequence[TrainedAnswer]) -> list[TrainedAnswer]:
    """Return each distinct answer once, in the order of first occurrence."""
    merged: dict[tuple[int, ...], TrainedAnswer] = {}
    for answer in answers:
        nothing = TrainedAnswer(answer.ids, scale=0.0, weight=0.0, num_samples=0)
        before = merged.get(answer.ids, nothing)
        merged[answer.ids] = TrainedAnswer(
            answer.ids,
            before.scale + answer.scale,
            before.weight + answer.weight,
            before.num_samples + answer.num_samples,
        )
    return list(merged.values())


def collate_answers(
    collator: Collator,
    prompts: Sequence[Example],
    answers: Sequence[Sequence[TrainedAnswer]],
    share_prefix: bool,
) -> dict[str, Any]:
    """Return a `Batch` of prompts and their answers, with three more tensors, one value per label.

    Args:
        collator: Collates examples.
        prompts: The prompts and their images.
        answers: The answers to each prompt.
        share_prefix: Train the answers as branches of one sequence.

    Returns:
        The batch. For each label, `token_scales`, `token_weights` and `token_counts` contain the `scale`,
        `weight` and `num_samples` of its `TrainedAnswer`.
    """
    examples: list[Example] = []
    answers_of_example: list[Sequence[TrainedAnswer]] = []
    for prompt, group in zip(prompts, answers):
        examples += branch_examples(prompt, [answer.ids for answer in group], share_prefix)
        answers_of_example += [group] if share_prefix else [[answer] for answer in group]
    rows = [[index] for index in range(len(examples))]
    if share_prefix:
        lengths = [_length(example, collator.tokens_per_image) for example in examples]
        rows = plan_packs(lengths, max(lengths), seed=0)
    packs: list[list[Example]] = []
    # List the values in the order of the labels: row by row, and in a row example by example.
    scales: list[float] = []
    weights: list[float] = []
    counts: list[int] = []
    for row in rows:
        packs.append([examples[index] for index in row])
        for index in row:
            for answer in answers_of_example[index]:
                scales += [answer.scale] * len(answer.ids)
                weights += [answer.weight] * len(answer.ids)
                counts += [answer.num_samples] * len(answer.ids)
    batch = cast("dict[str, Any]", collator(packs))
    batch["token_scales"] = torch.tensor(scales)
    batch["token_weights"] = torch.tensor(weights)
    batch["token_counts"] = torch.tensor(counts)
    return batch


def _length(example: Example, tokens_per_image: int) -> int:
    """Return the number of positions of an example."""
    num_images = example.input_ids.count(IMAGE_INDEX)
    return len(example.input_ids) + num_images * (tokens_per_image - 1)


def branch_examples(
    prompt: Example, answers: Sequence[Sequence[int]], share_prefix: bool
) -> list[Example]:
    """Return one example with the answers as branches, or one example per answer.

    Args:
        prompt: The prompt and its images; its labels are not used.
        answers: Token ids of each answer. All of them are trained, the end token included.
        share_prefix: Return one example with a branch per answer.
    """
    if share_prefix:
        groups = [list(answers)]
    else:
        groups = [[answer] for answer in answers]
    examples: list[Example] = []
    for group in groups:
        input_ids = list(prompt.input_ids)
        labels = [IGNORE_INDEX] * len(input_ids)
        branches = [0] * len(input_ids)
        for number, answer in enumerate(group, start=1):
            input_ids += answer
            labels += answer
            branches += [number] * len(answer)
        example = Example(
            input_ids,
            labels,
            prompt.pixel_values,
            prompt.image_features,
            branches=branches if len(group) > 1 else None,
            id=prompt.id,
        )
        # Attach the warnings of a record to one of its examples only, so that they are counted once.
        example.warnings = [] if examples else prompt.warnings
        examples.append(example)
    return examples
