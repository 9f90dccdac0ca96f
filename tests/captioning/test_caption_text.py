"""Tests of the changes to a generated text before it is written: loops, length, template, prefix and suffix."""

from __future__ import annotations

import random
import re

import pytest

from llava_simplified.captioning.caption_text import (
    FinishedCaption,
    TextOptions,
    end_at_loop,
    fill_fields,
    finish_caption,
    image_fields,
    limit_words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog and a dog and a dog and a", "a dog and"),
        ("The sky. The sky. The sky. The sky.", "The sky."),
        ("a very very very very very big dog", "a very"),  # five times
        ("a very very very very big dog", None),  # four times: three repeat the first
        ("red hair, red eyes, red dress, red hat, red shoes", None),
        ("a cat on a mat and a cat on a sofa", None),
        (
            "one two three four five one two three four five",
            None,
        ),  # the repeated part is longer than the longest one that is searched for
        ("one two three four one two three four", "one two three four"),
        ("A cat, a cat, a cat, a cat, asleep", "A cat"),
        ("你好你好你好", "你好"),
        ("", None),
        ("word", None),
    ],
)
def test_end_at_loop_keeps_what_comes_before_the_repetition(
    text: str, expected: str | None
) -> None:
    assert end_at_loop(text, 4) == (text if expected is None else expected)


def test_end_at_loop_equals_a_direct_search() -> None:
    """Compare with a search that tries every position and every length."""
    rng = random.Random(0)
    for _ in range(500):
        words = rng.choices("ab", k=rng.randint(0, 14))
        expected = len(words)
        for end in range(len(words), 0, -1):
            for length in range(1, 5):
                start = end - 4
                repeats = start - length >= 0 and all(
                    words[i] == words[i - length] for i in range(start, end)
                )
                if repeats:
                    expected = start
        assert end_at_loop(" ".join(words), 4).split() == words[:expected]


@pytest.mark.parametrize(
    ("text", "max_words", "expected"),
    [
        ("a red car", 3, "a red car"),
        ("a red car, parked on a street", 3, "a red car"),
        ("A car is here. It is red and new.", 6, "A car is here."),
        (
            "Yes. It is a red car on a long street",
            6,
            "Yes. It is a red car",
        ),  # too little would remain
        ("one  two\nthree four", 3, "one  two\nthree"),
        ("一只猫。它在睡觉。", 5, "一只猫。"),
        ("v1.5 of a.b.c is here now", 3, "v1.5 of a.b.c"),
    ],
)
def test_limit_words_ends_with_a_sentence_or_a_word(
    text: str, max_words: int, expected: str
) -> None:
    assert limit_words(text, max_words) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{caption}, {tags}", "a cat"),
        ("{tags}, {caption}", "a cat"),
        ("sks, {tags}, {caption}", "sks, a cat"),
        ("{caption}, {tags}, {tags}", "a cat"),
        ("{caption} ({tags})", "a cat ()"),
        ("{caption} {not a field} {}", "a cat {not a field} {}"),
    ],
)
def test_fill_fields_leaves_no_comma_for_an_empty_field(template: str, expected: str) -> None:
    assert fill_fields(template, {"caption": "a cat", "tags": ""}) == expected


def test_fill_fields_does_not_read_values_as_templates() -> None:
    fields = {"caption": "{tags}, \0", "tags": "{caption}"}
    assert fill_fields("{caption}; {tags}", fields) == "{tags}, ; {caption}"


def test_finish_caption_puts_prefix_and_suffix_around_the_template() -> None:
    options = TextOptions(prefix="sks, ", suffix=" --end", template="{caption}, {tags}")
    finished = finish_caption(" a cat ", options, {"tags": "indoors, asleep"})
    assert finished == FinishedCaption("sks, a cat, indoors, asleep --end", "")


def test_finish_caption_names_what_ended_it() -> None:
    options = TextOptions(max_words=3, loop_guard=4)
    assert finish_caption("a b a b a b a b a b", options, {}) == ("a b", "loop")
    assert finish_caption("a b c d e", options, {}) == ("a b c", "max_words")
    assert finish_caption("a b c", options, {}) == ("a b c", "")
    assert finish_caption("a b c d e", TextOptions(), {}) == ("a b c d e", "")


def test_finish_caption_keeps_an_empty_caption_empty() -> None:
    options = TextOptions(prefix="sks", template="{caption} {tags}")
    assert finish_caption(" ", options, {"tags": "indoors"}).text == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{tags}"}, "caption"),
        ({"template": "{caption}, {tag}"}, re.escape("{tag}")),
        ({"max_words": 0}, "--max-words"),
        ({"loop_guard": -1}, "--loop-guard"),
    ],
)
def test_text_options_refuse_wrong_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextOptions(**options)


@pytest.mark.parametrize(
    ("image", "name", "folder"),
    [
        ("a.b.jpg", "a.b", "photos"),
        ("10_sks dog/a.jpg", "a", "10_sks dog"),
        ("/elsewhere/b.png", "b", "elsewhere"),
        ("00000.tar#key", "key", "00000"),
        ("noextension", "noextension", "photos"),
    ],
)
def test_image_fields(image: str, name: str, folder: str) -> None:
    fields = image_fields(image, "/data/photos", "x")
    assert fields == {"name": name, "folder": folder, "tags": "x"}
