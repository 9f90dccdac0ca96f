"""Words that are never generated, compared with a search in the text of every possible continuation."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import build_llava, make_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from llava_simplified.model.forbidden_words import ForbiddenWords, exclude_forbidden_words
from llava_simplified.model.generation import generate
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.prompt import Message, Prompt

PHRASES = ("a", "dog", "red car", "in the", "bed", "'s", "x y  z")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that writes spaces as "▁", and unknown characters as bytes."""
    words = [
        "▁",
        "▁a",
        "▁dog",
        "dog",
        "d",
        "og",
        "o",
        "g",
        "▁red",
        "▁car",
        "car",
        "s",
        "▁do",
        "▁in",
    ]
    words += [
        "▁the",
        "the",
        ",",
        ".",
        "▁bed",
        "bed",
        "room",
        "'",
        "c",
        "ar",
        "x",
        "y",
        "z",
        "▁y",
        "b",
    ]
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", *words])}
    for value in range(256):
        vocabulary[f"<0x{value:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token=None))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return fast


TOKENIZERS = {"byte-level": make_tokenizer, "sentencepiece": sentencepiece_tokenizer}


def search(text: str, phrases: tuple[str, ...]) -> list[int]:
    """Return where forbidden phrases end in a text."""
    ends = []
    for phrase in phrases:
        before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
        after = r"(?!\w)" if re.match(r"\w", phrase[-1]) else ""
        words = r"\s+".join(map(re.escape, phrase.split()))
        for match in re.finditer(f"(?={before}({words}){after})", text, re.IGNORECASE):
            ends.append(match.end(1))
    return ends


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_banned_tokens_are_those_that_complete_a_phrase_in_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    prompt = Prompt(tokenizer, "plain")
    texts = prompt.token_texts()
    words = ForbiddenWords(texts, PHRASES)
    # Use ASCII tokens only, because their bytes can be decoded after every token.
    ascii_ids = [index for index, text in enumerate(texts) if text.isascii() and text]
    rng = random.Random(1)
    begun = [
        b"d",
        b"do",
        b" re",
        b" red",
        b" red ",
        b"in",
        b" in",
        b"be",
        b"x",
        b" a",
        b" ",
        b"'",
        b"x y",
    ]
    beginnings = [[index for index in ascii_ids if texts[index] == text] for text in begun]
    beginnings = [ids for ids in beginnings if ids]
    num_banned = 0
    for _ in range(25):
        ids = rng.choices(ascii_ids, k=rng.randint(0, 5))
        for _ in range(rng.randint(0, 2)):
            ids += rng.choice(beginnings)
        before = len(b"".join(texts[index] for index in ids))
        # This also checks the texts of the tokens.
        assert prompt.decode(ids) == b"".join(texts[i] for i in ids).decode().removeprefix(
            prompt._lead
        )
        expected = set()
        for token in ascii_ids:
            text = b"".join(texts[index] for index in [*ids, token]).decode()
            if any(end > before for end in search(text, PHRASES)):
                expected.add(token)
        assert set(words.banned_ids(ids)) & set(ascii_ids) == expected
        num_banned += len(expected)
    assert num_banned > 50


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_token_texts_add_up_to_the_answer(name: str) -> None:
    prompt = Prompt(TOKENIZERS[name](), "plain")
    texts = prompt.token_texts()
    for answer in ("a dog's bed", "größer, 日本", "x\n\ny"):
        ids = prompt.render_branches([Message("user", "x")], [answer])[1][0]
        joined = b"".join(texts[index] for index in ids)
        assert joined.decode().removeprefix(prompt._lead) == answer
    assert all(texts[index] == b"" for index in prompt.stop_ids)


def test_banned_tokens_contain_those_of_transformers() -> None:
    """The stock processor bans one tokenization of each word. Our processor bans these tokens too."""
    tokenizer = make_tokenizer()
    prompt = Prompt(tokenizer, "plain")
    words = ForbiddenWords(prompt.token_texts(), ("bedroom", "under cherry"))
    variants = [" bedroom", " under cherry", " Bedroom"]
    bad_words = [tokenizer.encode(text, add_special_tokens=False) for text in variants]
    stock = NoBadWordsLogitsProcessor(bad_words, eos_token_id=[1])
    for variant in bad_words:
        ids = tokenizer.encode(" a red", add_special_tokens=False) + variant[:-1]
        scores = torch.zeros(1, len(tokenizer))
        excluded = stock(torch.tensor([ids]), scores).isinf().nonzero()[:, 1].tolist()
        assert variant[-1] in excluded
        assert set(excluded) <= set(words.banned_ids(ids))


@pytest.mark.parametrize(
    ("phrase", "generated", "is_banned"),
    [
        ("größe", "die größ|e", True),
        ("größe", "die Größ|E", True),
        ("größe", "die GRÖSS|E", True),
        ("größe", "die größ|er", False),
        ("größe", "die übergröß|e", False),
        ("日本", "新日|本人", True),
        ("cat", "a “ca|t”", True),
        ("cat", "a Ca|T", True),
        ("cat", "con|cat", False),
        ("cat", "ca|tegory", False),
        ("a b", "a\n\n|b", True),
        ("a b", "a|  b", True),
        ("a b", "a|b", False),
        ("café", "ein cafe|\u0301", True),  # the accent is a character of its own
    ],
)
def test_phrase_is_banned_in_any_case_script_and_spacing(
    phrase: str, generated: str, is_banned: bool
) -> None:
    texts = [part.encode() for part in generated.split("|")]
    words = ForbiddenWords(texts, (phrase,))
    assert (1 in words.banned_ids([0])) == is_banned


def test_phrase_is_found_in_tokens_that_are_parts_of_characters() -> None:
    words = ForbiddenWords([b"ein \xe6", b"\x97\xa5\xe6", b"\x9c\xac"], ("日本",))
    assert words.banned_ids([0]) == []
    assert words.banned_ids([0, 1]) == [2]


@pytest.mark.medium
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"num_beams": 3}, {}])
def test_generated_text_contains_no_forbidden_word(models_folder: Path, options: dict) -> None:
    model = build_llava(models_folder)
    prompts = [model.prompt.render([Message("user", text)], None).input_ids for text in "abcd"]
    common = {"max_new_tokens": 24, "seed": 0, **options}
    if "temperature" in options:
        common["num_return_sequences"] = 8

    def texts(**changes: object) -> list[str]:
        results = generate(model, prompts, None, GenerationOptions(**common, **changes))
        return [text for texts in results for text in texts]

    free = texts()
    # Without the option, these words occur in the captions.
    found = re.findall(r"\w+", " ".join(free))
    forbidden = tuple(sorted({word for word in found if word.isascii()}))[:40]
    assert forbidden
    assert any(search(text, forbidden) for text in free)
    start = "Zzyx"
    for changed in (texts(forbid=forbidden), texts(forbid=forbidden, start_with=start)):
        assert [text for text in changed if search(text, forbidden)] == []
    assert all(text.startswith(start) for text in texts(forbid=forbidden, start_with=start))


def test_forced_beginning_counts_as_the_beginning_of_a_phrase(models_folder: Path) -> None:
    """If `start_with` is the beginning of a forbidden phrase, the model cannot complete the phrase."""
    model = build_llava(models_folder)
    prompts = [model.prompt.render([Message("user", text)], None).input_ids for text in "abcd"]
    texts = model.prompt.token_texts()
    following = [text.decode() for text in texts if text.isascii() and text.decode().strip()]
    phrases = tuple(f"one two{text}" for text in following)
    for beams in (1, 2):
        options = GenerationOptions(max_new_tokens=12, num_beams=beams, start_with="one two")
        free = generate(model, prompts, None, options)
        assert any(search(text, phrases) for (text,) in free)
        changed = generate(model, prompts, None, replace(options, forbid=phrases))
        assert not any(search(text, phrases) for (text,) in changed)


def test_options_refuse_a_beginning_that_is_forbidden() -> None:
    GenerationOptions(start_with="A photograph of", forbid=("photo", "of a"))
    with pytest.raises(ValueError, match="start_with.*A photo of.*a  photo"):
        GenerationOptions(start_with="A photo of", forbid=("a  photo",))
    assert GenerationOptions(forbid=["a", "b"]).forbid == ("a", "b")
    with pytest.raises(ValueError, match="forbid"):
        GenerationOptions(forbid="word")


def test_tokens_without_a_row_in_the_embedding_table_are_ignored() -> None:
    words = ForbiddenWords([b"a", b" ", b" dog"], ["dog"])
    logits = torch.zeros(1, 2)
    exclude_forbidden_words(logits, [[0]], words)
    assert logits.tolist() == [[0, 0]]
