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
from llava_simplified.prompt import IMAGE_PLACEHOLDER

PAIR_KEYS = ("chosen", "rejected")
_PROMPT_KEYS = ("messages", "prompt", "question", "instruction")


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
        ValueError: A turn is malformed, the two answers do not follow the same turns, or there are several prompts.
    """
    plain = dict(row)
    turns, text = _take_prompt(plain, where)
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
    if text is not None:
        known_turns = plain.get("messages") or plain.get("conversations")
        if not known_turns:
            plain["instruction"] = text
        elif text:
            _check_text_is_in_turns(text, known_turns, where)
    plain |= {"chosen": chosen, "rejected": rejected}
    return convert_chat(plain, where) if is_chat(plain) else plain


def _take_prompt(row: dict[str, Any], where: str) -> tuple[list[Any], Any]:
    """Remove the keys of the prompt from a row, and return the prompt as turns and as a text.

    Returns:
        The turns, possibly empty, and the text; None if the row has no prompt that is a text.

    Raises:
        ValueError: Two keys have different turns or different texts.
    """
    turns: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    text = None
    for key in _PROMPT_KEYS:
        value = row.pop(key, None)
        if isinstance(value, list):
            turns[key] = value
        elif value:
            texts[key] = value
        elif value is not None:
            text = value  # an empty text, which is the prompt only if there is no other
    for found in (turns, texts):
        first = next(iter(found), "")
        for key, value in found.items():
            if value != found[first]:
                raise ValueError(
                    f"{where}: the prompts {first!r} and {key!r} of the pair differ; keep one of them"
                )
    return next(iter(turns.values()), []), next(iter(texts.values()), text)


def _check_text_is_in_turns(text: Any, turns: Any, where: str) -> None:
    """Refuse a pair whose prompt is a text beside turns, unless the text repeats one of the turns.

    Raises:
        ValueError: The text would be lost.
    """
    contents = []
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict):
            content = join_parts(turn_of(turn)[1], [], where)
            contents.append(str(content).replace(IMAGE_PLACEHOLDER, "").strip())
    if str(text).replace(IMAGE_PLACEHOLDER, "").strip() not in contents:
        raise ValueError(
            f"{where}: the pair has turns, and also the prompt {text!r:.80}, which is none of them; keep one of the two"
        )


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
