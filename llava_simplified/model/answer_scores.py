"""Log-likelihoods of given answers, with one forward pass for all answers to a question.

Multiple-choice benchmarks compare the log-likelihoods of the choices. All choices share the image and the
question, which are much longer than a choice. So the model processes image and question once, and each
choice is a branch that continues them. Training does the same for several captions of one image (see
language_model.py):

    tokens           <s>  img  img  Which  ?  |  a   cat  |  two  dogs
    branch_ids        0    0    0     0    0  |  1    1   |   2    2
    scored                                       a   cat     two  dogs
    predicted from                               ?   a        ?   two
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from llava_simplified.data.collate import Collator, Example
from llava_simplified.data.device_copy import to_device
from llava_simplified.model.generation import encode_images, eval_mode, generation_lock
from llava_simplified.model.language_model import supports_shared_prompts
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IGNORE_INDEX

# Maximum number of answer tokens of one sequence. The logits of 512 tokens with a vocabulary of 128,000 are
# 256 MB in float32. Questions with more answers than fit are split into several sequences.
MAX_ANSWER_TOKENS = 512


class Question(NamedTuple):
    """A prompt, and the answers to score.

    Attributes:
        prompt: Token ids from `Prompt.render(turns, None)`, one IMAGE_INDEX per image.
        answers: Token ids of each answer, with or without an end token; none is empty.
        pixel_values: uint8 (images, 3, height, width), or None.
    """

    prompt: list[int]
    answers: list[list[int]]
    pixel_values: torch.Tensor | None


class AnswerScore(NamedTuple):
    """The score of an answer: how probable the model considers it.

    Attributes:
        log_likelihood: Sum of the log-probabilities of its tokens, given prompt and images.
        is_greedy: Whether greedy search would generate an answer that begins with exactly these tokens.
    """

    log_likelihood: float
    is_greedy: bool


@torch.inference_mode()
def score_answers(model: Llava, questions: Sequence[Question]) -> list[list[AnswerScore]]:
    """Return the scores of all answers to some questions.

    Some language models (ALiBi, state-space models) do not support the attention masks of shared prompts. They
    compute the prompt again for every answer. The images are encoded only once in any case.

    Args:
        model: The model.
        questions: A batch that fits into memory. Most questions become one sequence each.

    Returns:
        For each question one score per answer.
    """
    examples: list[Example] = []
    for question, features in zip(questions, _encode_questions(model, questions)):
        examples += _make_examples(model, question, features)

    scores: list[AnswerScore] = []
    with generation_lock(model), eval_mode(model):
        # A question with many answers becomes several sequences, so there may be more sequences than questions.
        # Use the number of questions as the batch size, because a larger batch may not fit into memory.
        for start in range(0, len(examples), len(questions)):
            scores += _score_examples(model, examples[start : start + len(questions)])
    # The scores are in the order of the answers. Cut them into one list per question.
    by_question: list[list[AnswerScore]] = []
    start = 0
    for question in questions:
        end = start + len(question.answers)
        by_question.append(scores[start:end])
        start = end
    return by_question


def _encode_questions(model: Llava, questions: Sequence[Question]) -> list[torch.Tensor | None]:
    """Return the image features of each question, (images, tokens, vision hidden size); None without images."""
    pixels = [question.pixel_values for question in questions if question.pixel_values is not None]
    if not pixels:
        return [None] * len(questions)
    # Encode the images of all questions together. Then cut the result into one tensor per question.
    remaining = encode_images(model, torch.cat(pixels))
    features: list[torch.Tensor | None] = []
    for question in questions:
        if question.pixel_values is None:
            features.append(None)
            continue
        count = len(question.pixel_values)
        features.append(remaining[:count])
        remaining = remaining[count:]
    return features


def _make_examples(
    model: Llava, question: Question, features: torch.Tensor | None
) -> Iterator[Example]:
    """Yield the sequences of a question: one, unless its answers exceed `MAX_ANSWER_TOKENS`."""
    # Models without support for shared prompts get one answer per sequence, which a limit of 0 tokens achieves.
    limit = MAX_ANSWER_TOKENS if supports_shared_prompts(model.language_model) else 0
    group: list[list[int]] = []
    num_tokens = 0
    for answer in question.answers:
        if group and num_tokens + len(answer) > limit:
            yield _make_example(question.prompt, group, features)
            group, num_tokens = [], 0
        group.append(answer)
        num_tokens += len(answer)
    if group:
        yield _make_example(question.prompt, group, features)


def _make_example(
    prompt: list[int], answers: list[list[int]], features: torch.Tensor | None
) -> Example:
    """Return an example whose labels are the tokens of the answers.

    The model computes logits only for labels, so all other labels are IGNORE_INDEX.
    """
    input_ids = list(prompt)
    labels = [IGNORE_INDEX] * len(prompt)
    branches = [0] * len(prompt)
    for number, answer in enumerate(answers, start=1):
        input_ids += answer
        labels += answer
        branches += [number] * len(answer)
    return Example(
        input_ids,
        labels,
        image_features=features,
        # A single answer needs no branches. Without them, every kind of language model accepts the example.
        branches=branches if len(answers) > 1 else None,
    )


def _score_examples(model: Llava, examples: Sequence[Example]) -> list[AnswerScore]:
    """Return the scores of all answers of a batch, in their order."""
    batch: dict[str, Any] = dict(
        Collator(model.vision_tower.num_tokens, model.prompt.end_id)(examples)
    )
    del batch["metadata"]
    tensors = {name: to_device(tensor, model.device) for name, tensor in batch.items()}
    logits = model(**tensors).logits
    labels = tensors["labels"]

    # Compute log(softmax(logits))[label] as logits[label] - logsumexp(logits), which needs no second tensor
    # of the size of the logits. In bfloat16, similar answers would get equal scores.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    label_logits = logits.gather(1, labels[:, None])[:, 0]
    log_probabilities = (label_logits - logits.logsumexp(1)).cpu().double()
    is_argmax = (logits.argmax(1) == labels).cpu()

    # The model returns the logits of all labels of all sequences in one row. Split it into answers.
    lengths: list[int] = []
    for example in examples:
        lengths += _answer_lengths(example)
    scores: list[AnswerScore] = []
    for token_scores, matches in zip(log_probabilities.split(lengths), is_argmax.split(lengths)):
        score = AnswerScore(
            log_likelihood=token_scores.sum().item(),
            is_greedy=bool(matches.all()),
        )
        scores.append(score)
    return scores


def _answer_lengths(example: Example) -> list[int]:
    """Return the number of tokens of each answer of an example."""
    if example.branches is None:
        return [sum(label != IGNORE_INDEX for label in example.labels)]
    # Count the tokens of each branch. Branch 0 is the prompt.
    counts = torch.tensor(example.branches).bincount()
    return counts[1:].tolist()
