"""Multiple-choice questions about the image of a record, for the reward `qa` (see `training.qa_reward`).

{"image": "0.jpg", "instruction": "Describe it.", "response": "a red car",
 "multiple_choice": [{"question": "What color is the car?", "options": ["red", "blue"], "answer": "red"}]}
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from llava_simplified.foreign_files import shorten

QUESTIONS_KEY = "multiple_choice"
_MAX_OPTIONS = len(ascii_uppercase)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its options.

    Attributes:
        text: The question.
        options: Two options or more, all different.
        answer: Index of the correct option.
    """

    text: str
    options: tuple[str, ...]
    answer: int


def parse_questions(value: Any, where: str) -> tuple[Question, ...]:
    """Parse the questions of a row.

    Args:
        value: The value of "multiple_choice": a list of objects with "question", "options" and "answer", the text of the
            correct option.
        where: File name and row number, for error messages.

    Raises:
        ValueError: The value has another format, or a question does not have exactly one correct option.
    """
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: {QUESTIONS_KEY!r} must be a list of questions, got {shorten(value)}"
        )
    return tuple(_parse_question(question, where) for question in value)


def _parse_question(value: Any, where: str) -> Question:
    # Treat a value that is not an object like an empty one: the first check reports the missing keys.
    fields = value if isinstance(value, dict) else {}
    text: Any = fields.get("question")
    options: Any = fields.get("options")
    answer: Any = fields.get("answer")
    are_texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not isinstance(text, str) or not are_texts or not 2 <= len(options) <= _MAX_OPTIONS:
        raise ValueError(
            f"{where}: a question of {QUESTIONS_KEY!r} needs 'question' (a string) and 'options' (2 to {_MAX_OPTIONS} "
            f"strings), got {shorten(value)}"
        )
    if len(set(options)) < len(options) or answer not in options:
        raise ValueError(
            f"{where}: the options of a question must differ, and 'answer' must be one of them, got {shorten(value)}"
        )
    return Question(text, tuple(options), options.index(answer))
