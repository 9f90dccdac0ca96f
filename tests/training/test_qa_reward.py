"""Questions that a model on a server answers from the caption alone; the server is a fake one on this machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from faulty_endpoint import FaultyEndpoint, faulty_endpoint

from llava_simplified.captioning import endpoint_client
from llava_simplified.captioning.endpoint_options import EndpointOptions
from llava_simplified.data.questions import Question, parse_questions
from llava_simplified.data.records import Record
from llava_simplified.training.qa_reward import QaReward, find_letter
from llava_simplified.training.rewards import Reward, RewardOptions

COLOR = Question("Which color?", ("red", "blue", "green"), 0)
COUNT = Question("How many?", ("one", "two"), 1)
CAPTIONS = ["two red cars", "a red car", "two cars", "nothing"]
OPTION = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)


def prompt_of(body: dict[str, Any]) -> str:
    (message,) = body["messages"]
    content: str = message["content"]
    return content


def read_caption(body: dict[str, Any]) -> str:
    """Answer like a model that knows only the caption: the letter of an option in the caption, or "I do not know"."""
    prompt = prompt_of(body)
    caption = next(caption for caption in CAPTIONS if f"\n{caption}\n" in prompt)
    for letter, option in OPTION.findall(prompt):
        if option in caption.split():
            return f"({letter})"
    return "i do not know"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyEndpoint]:
    # Shorten the pauses before retries.
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.01)
    with faulty_endpoint() as endpoint:
        endpoint.text_of = read_caption
        yield endpoint


def make_reward(server: FaultyEndpoint, tries: int = 1, **options: Any) -> QaReward:
    endpoint = EndpointOptions(server.url, "text-model", **options)
    return QaReward(endpoint, tries, seed=7, counts=Counter())


def ask(reward: QaReward, captions: list[str] = CAPTIONS) -> list[float]:
    ids = ["train.json row 3"] * len(captions)
    return reward(ids, [[COLOR, COUNT]] * len(captions), captions)


def test_reward_is_the_share_of_right_answers(server: FaultyEndpoint) -> None:
    reward = make_reward(server)
    assert ask(reward) == [1.0, 0.5, 0.5, 0.0]
    assert reward._counts == {"questions": 8, "questions_unanswered": 4}
    body = server.requests[0]
    assert body["temperature"] == 0
    # Text alone: neither the image nor the references are sent.
    assert all(isinstance(message["content"], str) for message in body["messages"])


def test_constant_letter_is_right_by_chance_only(server: FaultyEndpoint) -> None:
    server.text_of = lambda body: "A"
    reward = make_reward(server, tries=8)
    values = ask(reward)
    # A constant letter is right for about a third of the orders of three options, and half of those of two.
    assert 0.1 < values[0] < 0.8
    assert reward._counts == {"questions": 8 * 2 * len(CAPTIONS)}


def test_options_are_shuffled_for_each_try_and_equally_for_all_captions(
    server: FaultyEndpoint,
) -> None:
    first = make_reward(server, tries=6)
    ask(first, CAPTIONS[:2])
    orders: dict[str, set[str]] = {}
    for body in server.requests:
        prompt = prompt_of(body)
        caption = "two" if CAPTIONS[0] in prompt else "a"
        shown = "".join(option[0] for _, option in OPTION.findall(prompt))
        orders.setdefault(caption, set()).add(shown)
    assert orders["two"] == orders["a"]
    assert len(orders["a"]) > 3
    before = sorted(prompt_of(body) for body in server.requests)
    server.requests.clear()
    # A resumed run sends the same prompts.
    ask(make_reward(server, tries=6), CAPTIONS[:2])
    assert sorted(prompt_of(body) for body in server.requests) == before


def test_failures_are_retried(server: FaultyEndpoint) -> None:
    server.faults[b""] = ["500", "cut", "bad json"]
    reward = make_reward(server)
    assert ask(reward) == [1.0, 0.5, 0.5, 0.0]
    assert len(server.requests) == 2 * len(CAPTIONS) + 3


def test_server_that_keeps_failing_is_an_error_with_the_record(server: FaultyEndpoint) -> None:
    server.always[b""] = "500"
    with pytest.raises(ValueError, match=r"train\.json row 3.*failed with 500"):
        ask(make_reward(server, retries=1))


def test_refusals_are_counted_and_get_no_reward(server: FaultyEndpoint) -> None:
    server.always[b""] = "refusal"
    reward = make_reward(server)
    assert ask(reward, CAPTIONS[:1]) == [0.0]
    assert reward._counts == {"questions": 2, "questions_unanswered": 2}


def test_reward_option_asks_the_questions_of_the_records(server: FaultyEndpoint) -> None:
    @dataclass
    class CaptionedRecord:
        id: str
        image: str = ""
        references: tuple[str, ...] = ()
        questions: tuple[Question, ...] = ()

    options = RewardOptions(endpoint=server.url, endpoint_model="text-model")
    reward = Reward("qa=2", [], options)
    assert reward([CaptionedRecord("row 1", questions=(COLOR, COUNT))], ["two cars"]) == [1.0]
    assert reward.pop_counts() == {"questions": 2, "questions_unanswered": 1}
    assert reward.pop_counts() == {}
    with pytest.raises(ValueError, match="row 2 has no questions"):
        reward([CaptionedRecord("row 2")], ["two cars"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (B)", "B"),
        ("B. red", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("A red car: B", "A"),
        ("A", "A"),
        ("D", None),
        ("blue", None),
        ("", None),
    ],
)
def test_find_letter_returns_the_letter_of_an_answer_or_none(text: str, letter: str | None) -> None:
    assert find_letter(text, 3) == letter


def test_questions_are_part_of_a_record() -> None:
    row = {
        "image": "0.jpg",
        "instruction": "Describe it.",
        "response": "a red car",
        "multiple_choice": [
            {"question": "Which color?", "options": ["red", "blue", "green"], "answer": "red"},
            {"question": "How many?", "options": ["one", "two"], "answer": "two"},
        ],
    }
    assert Record.from_json(row, "row 0").questions == (COLOR, COUNT)
    del row["multiple_choice"]
    assert Record.from_json(row, "row 0").questions == ()


@pytest.mark.parametrize(
    "value",
    [
        "which?",
        ["which?"],
        [{"question": "which?", "options": ["a"], "answer": "a"}],
        [{"question": "which?", "options": ["a", "a"], "answer": "a"}],
        [{"question": "which?", "options": ["a", "b"], "answer": "c"}],
        [{"question": "which?", "options": "ab", "answer": "a"}],
        [{"question": 3, "options": ["a", "b"], "answer": "a"}],
        [{"question": "which?", "options": [str(i) for i in range(27)], "answer": "3"}],
    ],
)
def test_malformed_questions_are_an_error_with_the_record(value: Any) -> None:
    with pytest.raises(ValueError, match="row 5"):
        parse_questions(value, "row 5")
