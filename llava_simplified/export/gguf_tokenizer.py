"""The tokenizer for llama.cpp: the `tokenizer.*` keys of `model.gguf`.

llama.cpp has its own tokenizers. Two families are supported here:

| `tokenizer.ggml.model` | algorithm                                      | models                         |
|------------------------|------------------------------------------------|--------------------------------|
| `gpt2`                 | byte-level BPE: words are split by a regular   | SmolLM2, Llama 3, Qwen         |
|                        | expression, then merged by a list of merges    |                                |
| `llama`                | sentencepiece: no words; pieces have scores;   | Llama 2, Mistral               |
|                        | unknown characters become bytes (<0x0A>)       |                                |
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_simplified.export.chat_template import FLATTEN_CONTENT_WITH_MARKERS, get_chat_template
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message

Metadata = dict[str, Any]

# The regular expression by which Qwen2 and Llama 3 split a text into words. The two differ only in the maximum
# number of digits in a word: below, NUMBERS is replaced by the expression for these digits.
_WORDS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps by which a byte-level tokenizer splits a text into words (see `_pre_tokenizer_name`) ->
# llama.cpp's name for them, `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "words": "gpt-2",
    "digits words": "smollm",
    _WORDS_PATTERN.replace("NUMBERS", r"\p{N}"): "qwen2",
    _WORDS_PATTERN.replace("NUMBERS", r"\p{N}{1,3}"): "llama-bpe",
}
# Score of a piece that is not the result of a merge: lower than that of any merge.
_UNMERGED_SCORE = -1e6


@dataclass(frozen=True)
class _Vocabulary:
    """A BPE tokenizer, read from `tokenizer.json`."""

    spec: dict[str, Any]  # contents of tokenizer.json
    pieces: dict[int, str]  # token id -> text
    added: dict[int, dict[str, Any]]  # token id -> entry in "added_tokens"
    num_rows: int  # rows of the embedding table, which can be more than the tokens

    @property
    def bpe(self) -> dict[str, Any]:
        """The BPE model: merges, byte fallback, the unknown token."""
        return self.spec["model"]

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces, in the order in which they are merged."""
        pairs = []
        for merge in self.bpe["merges"]:
            # Older files contain "a b", newer ones ["a", "b"].
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append((first, second))
        return pairs


def vocabulary_settings(model: Llava) -> Metadata:
    """Return the tokenizer and the chat template as GGUF metadata.

    Raises:
        ValueError: The tokenizer is not BPE, or llama.cpp does not support its pre-tokenizer.
    """
    vocabulary = _read_vocabulary(model)
    values = _common_metadata(model, vocabulary)
    if vocabulary.bpe["byte_fallback"]:
        values |= _sentencepiece_metadata(vocabulary)
    else:
        values |= _byte_level_metadata(vocabulary)
    chat_template = FLATTEN_CONTENT_WITH_MARKERS + get_chat_template(model)
    metadata: Metadata = {}
    for name, value in values.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    metadata["tokenizer.chat_template"] = chat_template
    return metadata


def _read_vocabulary(model: Llava) -> _Vocabulary:
    """Read a BPE tokenizer; raise ValueError for other kinds."""
    tokenizer: Any = model.tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = spec["model"]["type"]
    if kind != "BPE":
        raise ValueError(
            f"--format gguf: only BPE tokenizers are supported, not {kind}. Use --format hf."
        )
    embeddings = model.language_model.get_input_embeddings()
    return _Vocabulary(
        spec=spec,
        pieces={token_id: piece for piece, token_id in tokenizer.get_vocab().items()},
        added={token["id"]: token for token in spec["added_tokens"]},
        num_rows=len(embeddings.weight),
    )


def _common_metadata(model: Llava, vocabulary: _Vocabulary) -> Metadata:
    """Return the metadata of both families: tokens, token types, and special tokens."""
    tokenizer: Any = model.tokenizer
    num_rows = vocabulary.num_rows
    metadata: Metadata = {
        # Give rows of the embedding table that belong to no token a name that does not occur in texts.
        "tokens": [vocabulary.pieces.get(i, f"[PAD{i}]") for i in range(num_rows)],
        "token_type": [_token_type(vocabulary, i) for i in range(num_rows)],
        "add_eos_token": False,
    }
    # Make llama.cpp add a BOS token if our prompts start with one.
    prompt = model.prompt.render([Message("user", "a")], None)
    metadata["add_bos_token"] = prompt.input_ids[0] == tokenizer.bos_token_id
    special_tokens = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": model.prompt.end_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name, token_id in special_tokens.items():
        if token_id is not None and token_id < num_rows:
            metadata[f"{name}_token_id"] = token_id
    return metadata


def _token_type(vocabulary: _Vocabulary, token_id: int) -> int:
    """Return llama.cpp's type of a token."""
    import gguf

    types = gguf.TokenType
    bpe = vocabulary.bpe
    if token_id not in vocabulary.pieces:
        return int(types.UNUSED)
    piece = vocabulary.pieces[token_id]
    if piece == bpe["unk_token"]:
        return int(types.UNKNOWN)
    if token_id in vocabulary.added:
        is_special = vocabulary.added[token_id]["special"]
        return int(types.CONTROL if is_special else types.USER_DEFINED)
    if bpe["byte_fallback"] and re.fullmatch(r"<0x..>", piece):
        return int(types.BYTE)
    return int(types.NORMAL)


def _sentencepiece_metadata(vocabulary: _Vocabulary) -> Metadata:
    """Return the metadata of a sentencepiece tokenizer.

    llama.cpp repeatedly joins the two adjacent pieces whose union has the highest score. Using the
    negative rank of its merge as the score of a piece gives the merge order of our tokenizer.
    """
    scores_by_piece: dict[str, float] = {}
    for rank, (first, second) in enumerate(vocabulary.merges):
        scores_by_piece.setdefault(first + second, -float(rank))  # keep the earliest merge
    scores = []
    for token_id in range(vocabulary.num_rows):
        piece = vocabulary.pieces.get(token_id, "")
        scores.append(scores_by_piece.get(piece, _UNMERGED_SCORE))

    normalizers = _steps(vocabulary.spec["normalizer"], "normalizers")
    pre_tokenizers = _steps(vocabulary.spec["pre_tokenizer"], "pretokenizers")
    # Texts begin with a space if a normalizer (older tokenizers) or a pre-tokenizer (newer ones) prepends it.
    add_space_prefix = False
    for step in normalizers + pre_tokenizers:
        if step["type"] == "Prepend" or step.get("prepend_scheme") == "always":
            add_space_prefix = True
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "add_space_prefix": add_space_prefix,
    }


def _byte_level_metadata(vocabulary: _Vocabulary) -> Metadata:
    """Return the metadata of a byte-level BPE tokenizer."""
    steps = _steps(vocabulary.spec["pre_tokenizer"], "pretokenizers")
    return {
        "model": "gpt2",
        "pre": _pre_tokenizer_name(steps),
        "merges": [f"{first} {second}" for first, second in vocabulary.merges],
    }


def _pre_tokenizer_name(steps: Sequence[dict[str, Any]]) -> str:
    """Return llama.cpp's name for the steps by which a byte-level tokenizer splits a text into words.

    Raises:
        ValueError: llama.cpp has no name for these steps.
    """
    signature = []
    for step in steps:
        if step["type"] == "Split":
            signature.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            signature.append("digits")
        elif step["type"] != "ByteLevel" or step["add_prefix_space"]:
            signature.append(json.dumps(step))  # unknown; matches none of the known signatures
        elif step["use_regex"]:
            signature.append("words")  # GPT-2's own regular expression
    name = PRE_TOKENIZERS.get(" ".join(signature))
    if name is None:
        raise ValueError(
            "--format gguf does not support the pre-tokenizer of this model. Use --format hf. The "
            f"pre-tokenizer: {steps}."
        )
    return name


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer: none, one, or all steps of a sequence.

    Args:
        step: Entry of tokenizer.json.
        key: Key of the steps in a sequence: "normalizers" or "pretokenizers".
    """
    if step is None:
        return []
    if step["type"] == "Sequence":
        return step[key]
    return [step]
