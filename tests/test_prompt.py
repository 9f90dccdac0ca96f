"""The specification of prompts: their token ids, and which of them are trained.

Each family is a small tokenizer of the real kind (byte-level, like those of Llama 3, Qwen and SmolLM;
sentencepiece-like, like those of Llama 2, Gemma and Zephyr; the real vocabularies of Mistral) with the chat template
of that family. The references are independent of our code: `apply_chat_template`, mistral-common, and `spell_out`,
which decodes ids with the vocabulary alone.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sampling import num_examples
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX, Message, Prompt, count_images

# The families are built once for each process.
pytestmark = pytest.mark.xdist_group("prompt")

CORPUS = [
    "a bedroom with a double bed. party in the park, under cherry blossoms! two dogs run; 3 cats & 12 birds",
    "Generate a caption of this image:\nUSER: what is it? ASSISTANT: system user assistant model INST /INST",
    "You are a helpful assistant. Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024\n<|user|>\n",
]

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes an empty block of reasoning before the last answer only.
QWEN3 = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)
# Trims texts, and writes the current date into the system turn.
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Trims texts, begins each exchange with BOS, and puts a space before the end token.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}"
    "{% else %}{% set system = false %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Role names are ordinary text.
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Has no end token: only the next question ends an answer.
ALPACA = (
    "{% for message in messages %}{{ '### ' + message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)
MISTRAL_V1 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system_message is defined %}"
    "{{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}"
    "{%- endfor %}"
)
# [INST] is a control token; the system's text goes into the last question.
MISTRAL_V3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
# Writes no space before the answer.
MISTRAL_V3_TIGHT = MISTRAL_V3.replace("{{- ' ' + message", "{{- message")


# Writes an image token of its own before the first question, between two other control tokens.
JOYCAPTION = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' + system_message + '<|eot_id|>' }}"
    "{%- set state = namespace(first=true) %}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if state.first and message['role'] == 'user' %}{%- set state.first = false %}"
    "{{- '<|start|><|picture|><|stop|>' + message['content'].replace('<|picture|>', '').lstrip() }}"
    "{%- else %}{{- message['content'] }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# Accepts lists of parts only. Writes the images of a question first, then its texts.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


# ---- the tokenizers ----


def byte_level(control: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 3's, Qwen's and SmolLM's: bytes, split by a regular expression."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


def sentencepiece_like(control: list[str], style: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer like those of Llama 2 and Gemma, with bytes for what the vocabulary lacks.

    Args:
        control: Names of the control tokens.
        style: Where a space is added: before the "first" text of a sequence, "always" (before every text), "legacy"
            (before every text, by a normalizer), or "none".
        **kwargs: Arguments of PreTrainedTokenizerFast.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    # Sentencepiece is trained on lines, without the newlines.
    lines = "\n".join(CORPUS).splitlines()
    trained.train_from_iterator(lines * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges_of(trained), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if style in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    elif style == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style != "none":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ["<unk>", "<s>", "</s>", *control]]
    )
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@functools.cache
def mistral_file(version: str) -> Path:
    import mistral_common

    names = {"v1": "tokenizer.model.v1", "v2": "mistral_instruct_tokenizer_240216.model.v2"}
    names["v3"] = "mistral_instruct_tokenizer_240323.model.v3"
    return Path(mistral_common.__file__).parent / "data" / names[version]


def mistral(version: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a real vocabulary of Mistral, converted by Transformers."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file(version)))
    control = [pieces.id_to_piece(i) for i in range(pieces.vocab_size()) if pieces.is_control(i)]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(mistral_file(version), Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder, additional_special_tokens=control[2:])
    # Its backend has them too. Without them, the tokenizer is copied and pickled in a third of the time.
    tokenizer._vocab, tokenizer._merges = {}, []
    return tokenizer


def legacy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Change a tokenizer to the older form: a normalizer adds a space after every control token."""
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = None  # type: ignore[assignment]
    return tokenizer


def qwen3() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.add_tokens(
        [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    )
    return tokenizer


def phi3() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose control tokens include the white space after them."""
    tokenizer = sentencepiece_like([], "first")
    names = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokens = [AddedToken(name, rstrip=True, normalized=False, special=True) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


def smollm() -> PreTrainedTokenizerFast:
    return byte_level(
        ["<|im_start|>", "<|im_end|>"], bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def llama3() -> PreTrainedTokenizerFast:
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return byte_level(
        [*ends.values(), "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], **ends
    )


def gemma() -> PreTrainedTokenizerFast:
    ends = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return sentencepiece_like([*ends.values(), "<start_of_turn>", "<end_of_turn>"], "none", **ends)


def llama2() -> PreTrainedTokenizerFast:
    return sentencepiece_like([], "first")


def base() -> PreTrainedTokenizerFast:
    return byte_level(["<|endoftext|>"], eos_token="<|endoftext|>")


# name: (tokenizer, chat template, end token of an answer, space in the first token of an answer)
FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str | None, str, str]] = {
    "smollm": (smollm, CHATML, "<|im_end|>", ""),
    "qwen3": (qwen3, QWEN3, "<|im_end|>", ""),
    "llama3": (llama3, LLAMA3, "<|eot_id|>", ""),
    "phi3": (phi3, PHI3, "<|end|>", ""),
    "gemma": (gemma, GEMMA, "<end_of_turn>", ""),
    "llama2": (llama2, LLAMA2, "</s>", " "),
    "llama2-legacy": (lambda: legacy(llama2()), LLAMA2, "</s>", " "),
    "zephyr": (llama2, ZEPHYR, "</s>", ""),
    "zephyr-legacy": (lambda: legacy(llama2()), ZEPHYR, "</s>", ""),
    "alpaca": (base, ALPACA, "<|endoftext|>", " "),
    "plain": (llama2, None, "</s>", " "),
    "plain-bytes": (base, None, "<|endoftext|>", " "),
    "plain-bare": (llama2, None, "</s>", ""),
    "plain-bare-bytes": (smollm, CHATML, "<|im_end|>", ""),
    "mistral-v1": (lambda: mistral("v1"), MISTRAL_V1, "</s>", " "),
    "mistral-v1-legacy": (lambda: legacy(mistral("v1")), MISTRAL_V1, "</s>", " "),
    "mistral-v2": (lambda: mistral("v2"), MISTRAL_V3, "</s>", " "),
    "mistral-v3": (lambda: mistral("v3"), MISTRAL_V3, "</s>", " "),
    "mistral-v3-tight": (lambda: mistral("v3"), MISTRAL_V3_TIGHT, "</s>", ""),
    "always-tight": (
        lambda: sentencepiece_like(["[INST]", "[/INST]"], "always"),
        MISTRAL_V3_TIGHT,
        "</s>",
        " ",
    ),
}


class Family(NamedTuple):
    """A tokenizer with its prompt.

    Attributes:
        tokenizer: The tokenizer, with the chat template of the family.
        prompt: The prompt renderer for this tokenizer.
        end: The token that ends an answer.
        lead: The space that belongs to the first token of an answer, or "".
        preserve: Returns a text as it is after encoding and decoding: sentencepiece has one symbol for "▁" and space.
    """

    tokenizer: PreTrainedTokenizerFast
    prompt: Prompt
    end: str
    lead: str
    preserve: Callable[[str], str]


@functools.cache
def family(name: str) -> Family:
    make, template, end, lead = FAMILIES[name]
    tokenizer = make()
    tokenizer.chat_template = template
    bytes_only = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    return Family(
        tokenizer,
        Prompt(tokenizer, "bare" if "bare" in name else "auto"),
        end,
        lead,
        lambda text: text if bytes_only else text.replace("▁", " "),
    )


# ---- references ----


def spell_out(tokenizer: PreTrainedTokenizerFast, ids: list[int], errors: str = "strict") -> str:
    """Return the text of token ids, symbol by symbol from the vocabulary, without a decoder."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    text = b""
    for token in tokenizer.convert_ids_to_tokens(ids):
        if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            text += bytes(bytes_of[symbol] for symbol in token)
        elif match := re.fullmatch("<0x(..)>", token):
            text += bytes.fromhex(match[1])
        else:
            text += token.replace("▁", " ").encode()
    return text.decode(errors=errors)


def stock_ids(name: str, messages: list[Message], **kwargs: Any) -> list[int]:
    """Return the ids of `apply_chat_template`, with `<image>` as a control token, as in stock LLaVA."""
    tokenizer, image = with_image_token(name)
    ids = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        enable_thinking=False,
        date_string="26 Jul 2024",
        **kwargs,
    )["input_ids"]
    return [IMAGE_INDEX if i == image else i for i in ids]


@functools.cache
def with_image_token(name: str) -> tuple[PreTrainedTokenizerFast, int]:
    tokenizer = copy.deepcopy(family(name).tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer, tokenizer.convert_tokens_to_ids("<image>")


def trained_ids(labels: list[int]) -> list[int]:
    return [label for label in labels if label != IGNORE_INDEX]


def user_turn(text: str = "<image>\nGenerate a caption of this image:") -> list[Message]:
    return [Message("user", text)]


every_family = pytest.mark.parametrize("name", FAMILIES)
WITH_TEMPLATE = [name for name in FAMILIES if not name.startswith(("plain", "alpaca"))]
LOOKS_LIKE_CONTROL = [
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<image>",
    "<think>",
    "</think>",
    "<end_of_turn>",
    "<unk>",
    "<0x0A>",
    "<|end|>",
    "<|endoftext|>",
    "⟦assistant 1⟧",
    "USER:",
    "ASSISTANT:",
    "{{ bos_token }}",
]
any_text = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from([*LOOKS_LIKE_CONTROL, " ", "  ", "\n", "\n\n", "a cat"]),
    ),
    max_size=6,
).map("".join)
any_answer = any_text.filter(str.strip)
words = st.from_regex(r"[A-Za-z][a-z]{0,8}", fullmatch=True) | st.sampled_from(
    ["3", "it's", "tree,", "(old)", "café", "猫", "🙂"]
)
ordinary_text = st.lists(words, min_size=1, max_size=6).map(" ".join)


# ---- what is trained ----


@pytest.mark.medium
@every_family
@settings(max_examples=num_examples(60), deadline=None, derandomize=True)
@given(question=any_text, answer=any_answer)
@example(question="<image>", answer=" a cat")
@example(question="<image>\nwhat?", answer="\na cat\n")
@example(question="a <image> b<image>", answer="</s>")
@example(question="", answer="a </s><|im_end|><|eot_id|><end_of_turn> [INST] <image> b")
def test_render_trains_the_answer_and_its_end_token_and_nothing_else(
    name: str, question: str, answer: str
) -> None:
    tokenizer, prompt, end, lead, preserve = family(name)
    sequence = prompt.render(user_turn(question), answer)
    start = len(prompt.render(user_turn(question), None).input_ids)

    assert sequence.input_ids[:start] == prompt.render(user_turn(question), None).input_ids
    assert sequence.labels == [IGNORE_INDEX] * start + sequence.input_ids[start:]
    *answer_ids, last = sequence.labels[start:]
    assert tokenizer.convert_ids_to_tokens(last) == end
    assert spell_out(tokenizer, answer_ids) == preserve(lead + answer)
    assert prompt.decode(sequence.labels[start:]) == preserve(answer)
    control = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    assert not control & set(answer_ids)
    assert (
        sequence.input_ids.count(IMAGE_INDEX)
        == question.count("<image>")
        == count_images(user_turn(question))
    )


@every_family
@settings(max_examples=num_examples(20), deadline=None, derandomize=True)
@given(question=any_text)
def test_render_adds_no_control_token_for_text_that_looks_like_one(
    name: str, question: str
) -> None:
    tokenizer, prompt, *_ = family(name)
    control = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    plain = [i for i in prompt.render(user_turn("x"), None).input_ids if i in control]
    turns = [Message("system", question), *user_turn(question)]
    assert [i for i in prompt.render(user_turn(question), None).input_ids if i in control] == plain
    assert prompt.render(turns, None).input_ids.count(IMAGE_INDEX) == question.count("<image>")


@every_family
def test_render_trains_earlier_answers_too(name: str) -> None:
    prompt = family(name).prompt
    turns = [
        Message("system", "Be brief."),
        *user_turn(),
        Message("assistant", " two </s> cats"),
        Message("user", "Where?"),
    ]
    sequence = prompt.render(turns, "On a bench")
    ids = trained_ids(sequence.labels)
    first = ids.index(prompt.end_id)
    assert prompt.decode(ids) == " two </s> cats"
    assert prompt.decode(ids[first + 1 :]) == "On a bench"
    assert ids.count(prompt.end_id) == 2 and ids[-1] == prompt.end_id
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(sequence.input_ids, sequence.labels))
    assert set(prompt.render(turns, None).labels) == {IGNORE_INDEX}


@every_family
def test_render_branches_share_one_prompt(name: str) -> None:
    prompt = family(name).prompt
    prefix, branches = prompt.render_branches(user_turn(), ["a cat", " a dog\n"])
    for text, branch in zip(["a cat", " a dog\n"], branches):
        assert prompt.render(user_turn(), text) == (
            prefix.input_ids + branch,
            prefix.labels + branch,
        )


# ---- decoding generated tokens, which may end in the middle of a character ----


@every_family
@settings(max_examples=num_examples(60), deadline=None, derandomize=True)
@given(data=st.data())
def test_decode_marks_only_what_is_not_a_whole_character(name: str, data: st.DataObject) -> None:
    tokenizer, prompt, _, lead, _ = family(name)
    ids = data.draw(generated_ids(name))
    spelled = spell_out(tokenizer, ids, "replace")
    assert prompt.decode(ids) == spelled.removeprefix(lead)
    # The decoder skips control tokens, even between the bytes of one character.
    skipped = set(tokenizer.all_special_ids) - set(prompt.stop_ids)
    for token in sorted(skipped)[:1]:
        position = data.draw(st.integers(0, len(ids)))
        assert prompt.decode([*ids[:position], token, *ids[position:]]) == prompt.decode(ids)


@every_family
@settings(max_examples=num_examples(60), deadline=None, derandomize=True)
@given(data=st.data())
def test_decode_of_unfinished_text_is_the_beginning_of_the_whole(
    name: str, data: st.DataObject
) -> None:
    prompt = family(name).prompt
    ids = data.draw(generated_ids(name))
    before = ""
    for length in range(len(ids) + 1):
        text = prompt.decode(ids[:length], finished=False)
        whole = prompt.decode(ids[:length])
        assert text.startswith(before)
        assert whole.startswith(text)
        assert set(whole[len(text) :]) <= {"\ufffd"}
        before = text


@functools.cache  # the vocabulary is long, and a test calls this function for each example
def generated_ids(name: str) -> st.SearchStrategy[list[int]]:
    """Return a strategy for token ids as a model may generate them: words, and cut characters."""
    tokenizer = family(name).tokenizer
    backend = tokenizer.backend_tokenizer
    added = set(tokenizer.added_tokens_decoder)
    vocabulary = sorted(set(backend.get_vocab().values()) - added)

    def spell(data: bytes) -> list[int]:
        if isinstance(backend.decoder, decoders.ByteLevel):
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            symbols = bytes_to_unicode()
            return [backend.token_to_id(symbols[byte]) for byte in data]
        return [backend.token_to_id(f"<0x{byte:02X}>") for byte in data]

    characters = st.text("é日本🙂a", min_size=1, max_size=4).map(str.encode)
    cut = st.tuples(characters, st.integers(1, 3)).map(lambda pair: pair[0][: -pair[1]])
    spelled = st.one_of(characters, cut, st.binary(max_size=3)).map(spell)
    word = st.sampled_from(vocabulary).map(lambda token: [token])
    return st.lists(st.one_of(spelled, word), max_size=8).map(lambda parts: [*chain(*parts)])


# ---- equal to the tokenizer's own chat template, and to Mistral's own code ----


@pytest.mark.medium
@pytest.mark.parametrize("name", WITH_TEMPLATE)
@settings(max_examples=num_examples(30), deadline=None, derandomize=True)
@given(
    question=ordinary_text,
    answer=ordinary_text,
    image=st.sampled_from(["<image>\n{}", "{}\n<image>", "{0} <image> {0}", "{}"]),
)
def test_render_ordinary_text_equals_apply_chat_template(
    name: str, question: str, answer: str, image: str
) -> None:
    tokenizer, prompt, *_ = family(name)
    turns = user_turn(image.format(question))
    ours = prompt.render(turns, answer).input_ids
    theirs = stock_ids(name, [*turns, Message("assistant", answer)])
    if name.startswith("llama2"):
        # The template of Llama 2 has a space between the answer and </s>. Our prompt omits it.
        theirs = [*theirs[:-2], theirs[-1]]
    assert theirs[: len(ours)] == ours
    # A template may add white space after the end token.
    assert not spell_out(tokenizer, theirs[len(ours) :]).strip()
    ours = prompt.render(turns, None).input_ids
    assert ours == stock_ids(name, turns, add_generation_prompt=True)


@pytest.mark.parametrize("name", [name for name in WITH_TEMPLATE if not name.startswith("llama2")])
def test_render_conversation_equals_apply_chat_template(name: str) -> None:
    turns = [
        *user_turn(),
        Message("assistant", "two cats"),
        Message("user", "Where?"),
        Message("assistant", "on a bench"),
    ]
    # These templates put the system's text elsewhere; see the tests of system turns below.
    system_elsewhere = ("mistral-v2", "mistral-v3", "gemma", "always-tight")
    if not name.startswith(system_elsewhere):
        turns = [Message("system", "You are brief."), *turns]
    ours = family(name).prompt.render(turns[:-1], turns[-1].content).input_ids
    assert stock_ids(name, turns)[: len(ours)] == ours


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@settings(max_examples=num_examples(60), deadline=None, derandomize=True)
@given(question=any_answer, answer=any_answer)
@example(question="what is [INST] this?", answer="a </s> cat [/INST] <s>")
def test_render_equals_mistral_common(version: str, question: str, answer: str) -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    # Single spaces only: when Transformers 5 converts the .model file, the merges of spaces ("▁▁") come
    # first, where sentencepiece has them last (score -1e9). That is a fault of the tokenizer.
    question = re.sub("[ ▁]+", " ", question.replace("<image>", "image")).strip()
    answer = re.sub("[ ▁]+", " ", answer).strip()
    assume(question and answer)
    request = ChatCompletionRequest(
        messages=[UserMessage(content=question), AssistantMessage(content=answer)]
    )
    theirs = mistral_common(version).encode_chat_completion(request).tokens
    assert (
        family(f"mistral-{version}").prompt.render(user_turn(question), answer).input_ids == theirs
    )


@functools.cache
def mistral_common(version: str) -> Any:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(mistral_file(version)), mode=ValidationMode.finetuning)


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v1-legacy", "mistral-v3"])
def test_render_on_mistral_trains_the_caption_and_the_end_token(name: str) -> None:
    tokenizer, prompt, *_ = family(name)
    tokens = tokenizer.convert_ids_to_tokens(
        trained_ids(prompt.render(user_turn(), "a bedroom with a double bed").labels)
    )
    assert tokens == ["▁a", "▁bedroom", "▁with", "▁a", "▁double", "▁bed", "</s>"]


def test_plain_template_names_the_roles() -> None:
    tokenizer, prompt, *_ = family("plain")
    text = "<s>USER: what is it? ASSISTANT: two cats</s>USER: where? ASSISTANT: on a bench</s>"
    turns = [
        Message("user", "what is it?"),
        Message("assistant", "two cats"),
        Message("user", "where?"),
    ]
    assert (
        prompt.render(turns, "on a bench").input_ids
        == tokenizer(text, add_special_tokens=False).input_ids
    )
    assert prompt.name == "plain"


def test_bare_template_names_no_roles() -> None:
    tokenizer, prompt, *_ = family("plain-bare-bytes")
    text = "<|im_start|>what is it?\ntwo cats<|im_end|>where?\non a bench<|im_end|>"
    turns = [
        Message("user", "what is it?"),
        Message("assistant", "two cats"),
        Message("user", "where?"),
    ]
    assert (
        prompt.render(turns, "on a bench").input_ids
        == tokenizer(text, add_special_tokens=False).input_ids
    )
    assert prompt.name == "bare"


# ---- BOS, end tokens, dates, reasoning ----


@pytest.mark.parametrize("name", ["llama3", "gemma", "plain", "mistral-v1", "mistral-v3"])
def test_render_has_one_bos_token(name: str) -> None:
    tokenizer, prompt, *_ = family(name)
    ids = prompt.render(
        [Message("system", "<s>"), *user_turn("<s><bos><|begin_of_text|>")], "<s> a"
    ).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_stop_ids_are_the_end_of_the_turn_and_of_the_text() -> None:
    tokenizer, prompt, *_ = family("llama3")
    assert tokenizer.convert_ids_to_tokens(prompt.end_id) == "<|eot_id|>"
    assert set(tokenizer.convert_ids_to_tokens(prompt.stop_ids)) == {
        "<|eot_id|>",
        "<|end_of_text|>",
    }
    cat = prompt.render_branches(user_turn(), ["a cat"])[1][0]
    assert prompt.decode([*cat, *cat]) == "a cat"
    assert prompt.decode([*cat[:-1], tokenizer.eos_token_id, *cat]) == "a cat"


def test_end_token_is_eos_if_the_template_has_none() -> None:
    tokenizer, prompt, *_ = family("alpaca")
    turns = [Message("user", "what?"), Message("assistant", "a cat"), Message("user", "where?")]
    text = spell_out(
        tokenizer, [i for i in prompt.render(turns, "here").input_ids if i != prompt.end_id]
    )
    assert text == "### user: what?\n### assistant: a cat\n### user: where?\n### assistant: here"
    assert len([i for i in prompt.render(turns, "here").labels if i == tokenizer.eos_token_id]) == 2


def test_render_writes_a_fixed_date() -> None:
    tokenizer, prompt, *_ = family("llama3")
    assert "\nToday Date: 26 Jul 2024\n\n" in tokenizer.decode(
        prompt.render(user_turn("x"), None).input_ids
    )


def test_render_writes_empty_reasoning_into_the_prompt() -> None:
    tokenizer, prompt, *_ = family("qwen3")
    assert tokenizer.decode(prompt.render(user_turn("x"), None).input_ids).endswith(
        "<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("name", ["mistral-v3", "mistral-v3-tight"])
def test_render_keeps_the_system_turn_of_mistral(name: str) -> None:
    """Mistral's template omits the system's text unless the last turn is a question, as it is for generation."""
    turns = [Message("system", "Be brief."), *user_turn()]
    ours = family(name).prompt.render(turns, None).input_ids
    assert ours == stock_ids(name, turns, add_generation_prompt=True)


def test_render_turns_reasoning_off() -> None:
    """The template of SmolLM3 writes into the prompt, before the question, whether the model should reason."""
    tokenizer = copy.deepcopy(family("smollm").tokenizer)
    thinking = "{{ 'think' if enable_thinking is not defined or enable_thinking else 'no think' }}"
    tokenizer.chat_template = thinking + CHATML
    assert tokenizer.decode(Prompt(tokenizer).render(user_turn("x"), None).input_ids).startswith(
        "no think<|im_start|>"
    )


def test_render_puts_the_system_text_into_the_question_if_there_is_no_system_role() -> None:
    prompt = family("gemma").prompt
    folded = prompt.render([Message("system", "Be brief."), *user_turn("What?")], None)
    assert folded == prompt.render(user_turn("Be brief.\n\nWhat?"), None)


# ---- templates that write the image token ----


def joycaption() -> tuple[PreTrainedTokenizerFast, Prompt]:
    tokenizer = llama3()
    tokens = ["<|start|>", "<|picture|>", "<|stop|>"]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    return with_template(tokenizer, JOYCAPTION, "<|picture|>")


def llava_hf() -> tuple[PreTrainedTokenizerFast, Prompt]:
    tokenizer = llama2()
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    return with_template(tokenizer, LLAVA_HF, "<image>")


def with_template(
    tokenizer: PreTrainedTokenizerFast, template: str, image_token: str
) -> tuple[PreTrainedTokenizerFast, Prompt]:
    """Save a tokenizer in the same way as `llava import`. Return the tokenizer loaded from there, and its prompt."""
    tokenizer.chat_template = template
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder, image_token=image_token).save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
    return loaded, Prompt(loaded)


def template_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids of `apply_chat_template`, with the image token replaced."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return [IMAGE_INDEX if i == tokenizer.image_token_id else i for i in ids]


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_image_token_in_the_question_is_the_placeholder() -> None:
    """JoyCaption's template writes the image token, so its messages are strings without an image."""
    tokenizer, prompt = joycaption()
    assert prompt.image_token == "<|picture|>"
    system = Message("system", "You are a helpful image captioner.")
    expected = template_ids(tokenizer, [message(*system), message("user", "Describe it:")])
    assert expected.count(IMAGE_INDEX) == 1
    for content in ("<image>\nDescribe it:", "<image>Describe it:", "Describe it:\n<image>"):
        turns = [system, Message("user", content)]
        assert prompt.render(turns, None).input_ids == expected, content
        sequence = prompt.render(turns, "a cat")
        assert sequence.input_ids[: len(expected)] == expected
        assert trained_ids(sequence.labels) == [*tokenizer.encode("a cat"), prompt.end_id]

    chat = ["<image>\nDescribe it:", "a cat", "Where?"]
    turns = [Message(role, text) for role, text in zip(("user", "assistant", "user"), chat)]
    expected = template_ids(
        tokenizer,
        [message("user", "Describe it:"), message("assistant", "a cat"), message("user", "Where?")],
    )
    assert prompt.render(turns, None).input_ids == expected


def test_image_token_of_a_question_without_an_image_stays_a_token() -> None:
    """Without an image, the image token is embedded like any other token."""
    tokenizer, prompt = joycaption()
    ids = prompt.render(user_turn("Who are you?"), None).input_ids
    expected = template_ids(tokenizer, [message("user", "Who are you?")])
    assert ids == [tokenizer.image_token_id if i == IMAGE_INDEX else i for i in expected]
    assert tokenizer.image_token_id in prompt.usable_tokens()
    # The template has no image token for a later question, so the image is at the place of `<image>` in the text.
    turns = [Message("user", "Hello."), Message("assistant", "Hi."), Message("user", "<image>?")]
    ids = prompt.render(turns, None).input_ids
    assert ids.count(IMAGE_INDEX) == 1
    assert tokenizer.decode(ids[ids.index(IMAGE_INDEX) + 1 :]).startswith("?<|eot_id|>")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<image>\nWhat is it?", ["image", "What is it?"]),
        ("What is it?\n<image>", ["What is it?", "image"]),
        ("Compare\n<image>\nwith\n<image>", ["Compare", "image", "with", "image"]),
        ("What is it?", ["What is it?"]),
        ("<image>", ["image"]),
    ],
)
def test_template_of_parts_gets_images_and_texts(content: str, parts: list[str]) -> None:
    """The templates of llava-hf accept lists of parts, but no strings."""
    tokenizer, prompt = llava_hf()
    assert prompt.image_token == "<image>"
    stock = [
        {"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts
    ]
    hello = {"type": "text", "text": "Hello"}
    for history in ([], [Message("user", "Hello"), Message("assistant", "Hello")]):
        turns = [*history, Message("user", content)]
        messages = [message(turn.role, [hello]) for turn in history]
        expected = template_ids(tokenizer, [*messages, message("user", stock)])
        ids = prompt.render(turns, None).input_ids
        if history:  # our prompt adds an end token after the answer, which this template lacks
            ids.remove(prompt.end_id)
        assert ids == expected


def test_template_with_an_image_token_refuses_other_numbers_of_images() -> None:
    _, prompt = joycaption()
    with pytest.raises(ValueError, match=r"row 3: turn 1 has 2 image.*picture.* 1 time"):
        prompt.render(user_turn("<image>\n<image>\nWhat?"), None, "row 3")
    tokenizer, _ = llava_hf()
    only_first = LLAVA_HF.replace("'<image>\n'", "'<image>\n' if message == messages[0]")
    tokenizer.chat_template = only_first
    turns = [
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", "<image>\nWhat?"),
    ]
    with pytest.raises(ValueError, match="turn 3 has 1 image.* 0 time"):
        Prompt(tokenizer).render(turns, None)


def test_image_token_is_used_only_if_the_template_writes_it() -> None:
    tokenizer = copy.deepcopy(family("llama3").tokenizer)
    expected = family("llama3").prompt.render(user_turn(), None)
    tokenizer.add_tokens(["<unused>"], special_tokens=True)
    _, prompt = with_template(tokenizer, LLAMA3, "<unused>")
    assert prompt.image_token is None
    assert prompt.render(user_turn(), None) == expected
    for template in ("plain", "bare"):
        assert Prompt(joycaption()[0], template).image_token is None


# ---- errors ----


@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_render_refuses_an_empty_answer_and_names_the_record(answer: str) -> None:
    with pytest.raises(ValueError, match=r"train\.json row 17: the answer is empty"):
        family("llama3").prompt.render(user_turn(), answer, "train.json row 17")
    turns = [*user_turn(), Message("assistant", answer), Message("user", "Where?")]
    with pytest.raises(ValueError, match="row 3: the answer is empty"):
        family("llama3").prompt.render(turns, "a cat", "row 3")


def test_render_continues_a_conversation_with_an_empty_answer() -> None:
    """A model may generate an empty answer, which a client sends back. It is rendered as the end token alone."""
    prompt = family("llama3").prompt
    before = prompt.render(user_turn(), None).input_ids
    turns = [*user_turn(), Message("assistant", ""), Message("user", "Where?")]
    ids = prompt.render(turns, None).input_ids
    assert ids[: len(before) + 1] == [*before, prompt.end_id]
    other = [*user_turn(), Message("assistant", "a cat"), Message("user", "Where?")]
    other_ids = prompt.render(other, None).input_ids
    rest = ids[len(before) + 1 :]
    assert other_ids[-len(rest) :] == rest


@pytest.mark.parametrize(
    "roles", ["", "assistant", "user user", "user assistant", "user system user"]
)
def test_render_refuses_turns_out_of_order(roles: str) -> None:
    turns = [Message(role, "x") for role in roles.split()]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row 3: the roles of the turns are"):
        family("smollm").prompt.render(turns, "a cat", "row 3")


def test_render_refuses_half_a_surrogate_pair_and_names_the_record() -> None:
    with pytest.raises(ValueError, match="row 3: .*Unicode"):
        family("smollm").prompt.render(user_turn(), "a \ud83d cat", "row 3")
    with pytest.raises(ValueError, match="row 3: .*Unicode"):
        family("smollm").prompt.render(user_turn("\ud83d"), "a cat", "row 3")


def test_prompt_refuses_an_unusable_tokenizer() -> None:
    base = byte_level(["<|endoftext|>"])
    with pytest.raises(ValueError, match="token that ends an answer"):
        Prompt(base)
    base.eos_token = "<|endoftext|>"
    assert Prompt(base).name == "plain", "a BOS token is not required: Qwen has none"
    with pytest.raises(ValueError, match="no chat template"):
        Prompt(base, "chat")
    with pytest.raises(ValueError, match="unknown prompt template 'vicuna'"):
        Prompt(base, "vicuna")
    with pytest.raises(ValueError, match=r"object has no tokenizer\.json"):
        Prompt(object())


def test_prompt_refuses_a_template_that_drops_text_or_fails() -> None:
    tokenizer = copy.deepcopy(family("smollm").tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.content[1].text }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"cannot render .*--template plain"):
        Prompt(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(ValueError, match="not today"):
        Prompt(tokenizer)


# ---- shared state ----


@pytest.mark.medium
@every_family
def test_prompt_neither_changes_the_tokenizer_nor_depends_on_its_state(name: str) -> None:
    tokenizer = copy.deepcopy(family(name).tokenizer)
    before = tokenizer.backend_tokenizer.to_str()
    prompt = Prompt(tokenizer)
    ids = prompt.render(user_turn(), "a </s> cat")
    # Rendering does not change the tokenizer, and other calls of the tokenizer do not change the prompt.
    assert tokenizer.backend_tokenizer.to_str() == before
    tokenizer("</s>", split_special_tokens=True, truncation=True, max_length=2)
    assert prompt.render(user_turn(), "a </s> cat") == ids
    unpickled = pickle.loads(pickle.dumps(prompt))
    assert unpickled.render(user_turn(), "a </s> cat") == ids
