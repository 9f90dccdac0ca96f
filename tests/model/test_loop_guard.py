"""Sequences that repeat themselves are stopped. Once the loop is cut off, the texts are the same as without stopping."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from model_helpers import make_images
from tiny import build_llava, looping, make_tokenizer

from llava_simplified.captioning.caption_text import end_at_loop
from llava_simplified.model.generation import DecodingBatch, encode_images
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.model.loop_guard import find_loop, is_looping
from llava_simplified.prompt import Message, Prompt

LOOP = "two dogs run over a green field"
MAX_NEW_TOKENS = 90


@pytest.fixture(scope="module")
def model(models_folder: Path) -> Llava:
    return build_llava(models_folder, "llama")


def generated(model: Llava, options: list[GenerationOptions]) -> list[list[int]]:
    """Return the token ids for each of the options. The sequences are in one batch, each with a different image."""
    prompt = model.prompt.render([Message("user", "<image>\nWhat?")], None).input_ids
    features = encode_images(model, make_images(model, len(options)))
    batch = DecodingBatch(model, [prompt] * len(options), features, options)
    while batch.active:
        batch.step()
    return list(batch.generated_ids.values())


def test_decoding_batch_ends_only_a_looping_sequence_with_the_guard(model: Llava) -> None:
    plain = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS)
    unguarded = [replace(plain, start_with="two"), plain, replace(plain, start_with="two"), plain]
    guarded = [replace(unguarded[0], loop_guard=8), replace(plain, loop_guard=8), *unguarded[2:]]
    with looping(model, LOOP):
        before = generated(model, unguarded)
        after = generated(model, guarded)
    assert after[1:] == before[1:], "rows without a loop or without the guard are the same"
    assert after[0] == before[0][: len(after[0])]
    words = model.prompt.decode(after[0]).split()
    # The sentence, eight words of its repetition, and one more word, which shows that the eighth is complete.
    assert words == (LOOP.split() * 3)[: 7 + 8 + 1]
    assert len(before[0]) > MAX_NEW_TOKENS > 2 * len(after[0])
    whole, ended = (end_at_loop(model.prompt.decode(ids[0]), 8) for ids in (before, after))
    assert whole == ended == LOOP


def test_loop_does_not_end_a_sequence_before_min_new_tokens(model: Llava) -> None:
    options = GenerationOptions(
        max_new_tokens=MAX_NEW_TOKENS, min_new_tokens=70, start_with="two", loop_guard=8
    )
    with looping(model, LOOP):
        (ids,) = generated(model, [options])
    assert len(ids) - len(model.prompt.encode_start("two")) == 70


@pytest.mark.parametrize("num_repeated", [1, 3, 5])
def test_sequence_that_loops_is_cut_there_however_it_continues(num_repeated: int) -> None:
    """Compare random texts of few different words, processed token by token, with the cut of the complete text."""
    prompt = Prompt(make_tokenizer())
    rng = random.Random(num_repeated)
    num_found = 0
    for _ in range(150):
        words = rng.choices(["a", "dog", "dogs", "Dog,", "日本", "日"], k=rng.randint(1, 25))
        if rng.random() < 0.5:
            words += rng.choices(words, k=2) * 6
        text = " ".join(words)
        ids = prompt.encode_start(text)
        looping_after = [n for n in range(len(ids)) if is_looping(prompt, ids[:n], num_repeated)]
        if looping_after:
            start = prompt.decode(ids[: looping_after[0]])
            assert find_loop(text, num_repeated) == find_loop(start, num_repeated) is not None
            num_found += 1
    assert num_found > 50


def test_word_that_may_continue_is_not_a_repetition_yet() -> None:
    prompt = Prompt(make_tokenizer())
    assert not is_looping(prompt, [], 2)
    assert not is_looping(prompt, prompt.encode_start("a dog a dog"), 2)
    assert is_looping(prompt, prompt.encode_start("a dog a dog a"), 2)


def test_options_refuse_a_negative_loop_guard() -> None:
    with pytest.raises(ValueError, match="loop_guard must be at least 0, not -1"):
        GenerationOptions(loop_guard=-1)
