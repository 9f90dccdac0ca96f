"""Log-likelihoods of answers, compared with one plain forward per answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from model_helpers import LANGUAGE_MODELS, make_images
from tiny import build_llava

from llava_simplified.data.collate import expand_image_placeholders
from llava_simplified.model import answer_scores
from llava_simplified.model.answer_scores import AnswerScore, Question, score_answers
from llava_simplified.model.generation import DecodingBatch, encode_images
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message

TEXTS_AND_ANSWERS = [
    ("<image>\nWhat is this?", ["a red car", "two dogs run over a green field", "a"]),
    ("Compare <image> with <image>.", ["a man reads a book", "party"]),
    ("Is it?", ["yes", "no"]),
    ("<image>\nAgain?", ["a bench in the park"]),
]


def make_questions(model: Llava) -> list[Question]:
    """Return questions about one image, two and none; the last has one answer only."""
    images = make_images(model, 4)
    questions: list[Question] = []
    for text, answers in TEXTS_AND_ANSWERS:
        prefix, ids = model.prompt.render_branches([Message("user", text)], answers)
        num_images = text.count("<image>")
        pixels = images[:num_images] if num_images else None
        images = images[num_images:]
        questions.append(Question(prefix.input_ids, ids, pixels))
    return questions


@torch.no_grad()
def plain_score(model: Llava, question: Question, answer: list[int]) -> AnswerScore:
    """Score one answer in a separate sequence, from the logits of all positions."""
    ids = expand_image_placeholders([*question.prompt, *answer], model.vision_tower.num_tokens)
    features = None
    if question.pixel_values is not None:
        features = model.vision_tower(question.pixel_values)
    embeds = model.splice(torch.from_numpy(ids)[None], features)
    logits = model.language_model(inputs_embeds=embeds).logits[0]
    log_probabilities = logits.log_softmax(-1)[-len(answer) - 1 : -1]
    target = torch.tensor(answer)
    return AnswerScore(
        log_probabilities.gather(1, target[:, None]).sum().item(),
        bool((log_probabilities.argmax(1) == target).all()),
    )


def assert_equals_plain_loop(model: Llava, questions: list[Question]) -> None:
    # The eager kernel of Transformers computes its softmax in float32, whatever the model's dtype.
    is_eager = model.config._attn_implementation == "eager"
    tolerance = 1e-7 if is_eager else 1e-10
    all_scores = score_answers(model, questions)
    for question, scores in zip(questions, all_scores, strict=True):
        expected = [plain_score(model, question, answer) for answer in question.answers]
        assert [s.log_likelihood for s in scores] == pytest.approx(
            [e.log_likelihood for e in expected], rel=tolerance
        )
        assert [s.is_greedy for s in scores] == [e.is_greedy for e in expected]


@contextmanager
def count_forwards(model: Llava) -> Iterator[list[int]]:
    """Yield a list to which each forward pass of the language model appends its number of positions."""
    positions: list[int] = []

    def note(_: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        positions.append(kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1])

    handle = model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield positions
    finally:
        handle.remove()


@pytest.mark.parametrize("text", [*LANGUAGE_MODELS, "opt"])
def test_scores_equal_a_plain_loop_in_float64(models_folder: Path, text: str) -> None:
    model = build_llava(models_folder, text).double()
    assert_equals_plain_loop(model, make_questions(model))


def test_scores_are_exact_with_the_eager_kernel(models_folder: Path) -> None:
    model = build_llava(models_folder, "mistral").double()
    model.language_model.set_attn_implementation("eager")
    assert_equals_plain_loop(model, make_questions(model))


def test_models_without_shared_prompts_score_answers_separately(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_llava(models_folder, "llama").double()
    monkeypatch.setattr(answer_scores, "supports_shared_prompts", lambda _: False)
    monkeypatch.setattr(
        "llava_simplified.model.llava.attention_kwargs", None
    )  # a call would be an error
    assert_equals_plain_loop(model, make_questions(model))


def test_all_answers_of_a_question_are_one_forward(models_folder: Path) -> None:
    model = build_llava(models_folder)
    question = make_questions(model)[0]
    with count_forwards(model) as positions:
        score_answers(model, [question])
    prompt_length = len(question.prompt) - 1 + model.vision_tower.num_tokens
    assert positions == [prompt_length + sum(map(len, question.answers))]


def test_many_answers_are_split_into_several_sequences(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_llava(models_folder).double()
    questions = make_questions(model)
    longest = max(map(len, questions[0].answers))
    monkeypatch.setattr(answer_scores, "MAX_ANSWER_TOKENS", longest)
    with count_forwards(model) as positions:
        assert_equals_plain_loop(model, questions[:1])
    # The first forwards are those of `score_answers`: the long answer is alone in its sequence.
    assert len(positions) == 3 + len(questions[0].answers)


def test_is_greedy_marks_the_generated_answer_and_its_beginning(models_folder: Path) -> None:
    model = build_llava(models_folder)
    question = make_questions(model)[0]
    assert question.pixel_values is not None
    features = encode_images(model, question.pixel_values)
    options = GenerationOptions(max_new_tokens=5)
    batch = DecodingBatch(model, [question.prompt], features, options)
    while batch.active:
        batch.step()
    greedy = batch.generated_ids[0]
    other = [*greedy[:-1], (greedy[-1] + 1) % 100 + 3]
    [scores] = score_answers(model, [question._replace(answers=[other, greedy, greedy[:2]])])
    assert [score.is_greedy for score in scores] == [False, True, True]
