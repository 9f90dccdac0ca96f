"""Convert preference pairs to rows in LLaVA's form, with the texts `chosen` and `rejected`.

    {"image": "0.jpg", "instruction": "Describe it.", "chosen": "a cat", "rejected": "a dog"}         ours

    {"images": ["0.jpg"],                                                                             TRL
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
     "chosen": [{"role": "assistant", "content": "a cat"}],
     "rejected": [{"role": "assistant", "content": "a dog"}]}

    {"chosen": [user, assistant], "rejected": [user, assistant]}    TRL without a prompt: both begin with its turns
    {"prompt": "What?", "chosen": "a cat", "rejected": "a dog"}     TRL without roles; also with the key `question`
    {"conversations": [...], "chosen": {"from": "gpt", "value": "a cat"}, "rejected": {...}}          LLaMA-Factory

A pair is one question with two answers, so the turns of `chosen` and `rejected` may differ in the last one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_simplified.data.chat_rows import convert_chat, is_chat, join_parts, turn_of
from llava_simplified.foreign_files import shorten

PAIR_KEYS = ("chosen", "rejected")
_PROMPT_KEYS = ("messages", "prompt", "question")


def is_pair(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a preference pair.

    A row with only one of the two answers counts as a pair, so that `convert_pair` reports the missing answer.
    """
    has_both = all(key in row for key in PAIR_KEYS)
    # In a table with several kinds of rows, every row has these columns. They are null in the rows that are not pairs.
    return has_both and any(row[key] is not None for key in PAIR_KEYS)


def convert_pair(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert a pair: make both answers texts, and bring the prompt to LLaVA's form. Other keys are kept.

    Args:
        row: A row for which `is_pair` is true.
        where: File name and row number, for error messages.

    Raises:
        ValueError: A turn is malformed, or the two answers do not follow the same turns.
    """
    plain = dict(row)
    key = next((key for key in _PROMPT_KEYS if plain.get(key) is not None), "")
    prompt = plain.pop(key, None)
    turns: list[Any] = []
    if isinstance(prompt, list):
        turns = prompt
    elif prompt is not None:
        plain.setdefault("instruction", prompt)
    chosen, chosen_turns = _split_answer(plain["chosen"], "chosen", where)
    rejected, rejected_turns = _split_answer(plain["rejected"], "rejected", where)
    if chosen_turns != rejected_turns:
        raise ValueError(
            f"{where}: 'chosen' and 'rejected' must differ in their last turn only, since they are two answers to the "
            "same question"
        )
    turns = [*turns, *chosen_turns]
    if turns:
        plain["messages"] = turns
    plain |= {"chosen": chosen, "rejected": rejected}
    return convert_chat(plain, where) if is_chat(plain) else plain


def _split_answer(value: Any, key: str, where: str) -> tuple[str, list[Any]]:
    """Return an answer as text, and the turns before it.

    Args:
        value: The answer: a text, a turn, or a list of turns that ends with the answer.
        key: "chosen" or "rejected", for error messages.
        where: File name and row number, for error messages.

    Raises:
        ValueError: The value has another form, or its last turn is not the assistant's.
    """
    where = f"{where}: {key!r}"
    if isinstance(value, str):
        return value, []
    turns = value if isinstance(value, list) else [value]
    if not turns or not isinstance(turns[-1], dict):
        raise ValueError(f"{where} must be a text, a turn or a list of turns, got {shorten(value)}")
    role, content = turn_of(turns[-1])
    if role not in ("assistant", "gpt"):
        raise ValueError(f"{where} must end with an assistant turn, got the role {role!r}")
    images: list[Any] = []
    text = join_parts(content, images, where)
    if images or not isinstance(text, str):
        raise ValueError(f"{where}: an answer must be a text, got {shorten(content)}")
    return text, turns[:-1]
