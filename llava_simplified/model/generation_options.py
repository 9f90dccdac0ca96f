"""The options of text generation. This module does not import torch, so that commands start quickly."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The temperature if several sequences per prompt are requested without a temperature. Greedy search would
# generate the same sequence every time.
DEFAULT_TEMPERATURE = 0.7


@dataclass(frozen=True)
class GenerationOptions:
    """The options of text generation, with the names that Transformers uses where it has the same option.

    Attributes:
        max_new_tokens: Maximum number of generated tokens, including the end token.
        min_new_tokens: Minimum number of generated tokens. The end token is excluded until it is reached.
        temperature: Divisor of the logits; 0 means greedy search, higher values result in more varied texts.
        top_p: Sample from the most likely tokens whose probabilities add up to this value.
        top_k: Sample from this many of the most likely tokens; 0 means all tokens.
        repetition_penalty: Above 1, generated tokens become less likely (Keskar et al., 2019).
        num_beams: Number of beams; above 1, beam search is used (with a temperature, beam sampling).
        length_penalty: Beam search only: the score of a beam is divided by length ** length_penalty.
        num_return_sequences: Number of generated sequences per prompt.
        seed: Random seed of sampling. The result for a prompt depends only on the seed, the prompt and its
            images (with beam sampling, also on the batch). With None, the result is different every time.
        start_with: Text that every sequence begins with. It is part of the result, but `max_new_tokens` counts
            only the tokens after it.
        forbid: Words and phrases that are never generated; see `llava_simplified.model.forbidden_words`.
        loop_guard: End a sequence in which at least this many words repeat the words directly before them; see
            `llava_simplified.model.loop_guard`. The repeated words are part of the result. 0: never. Beam search
            ignores it.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int | None = None
    start_with: str = ""
    forbid: tuple[str, ...] = ()
    loop_guard: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.forbid, str):
            raise ValueError(f"forbid must be a list of words, not the text {self.forbid!r}")
        # Convert a list to a tuple: options must be hashable, because a batch groups its sequences by them.
        object.__setattr__(self, "forbid", tuple(self.forbid))
        requirements = {
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                "must be between 0 and max_new_tokens",
            ),
            "temperature": (self.temperature >= 0, "must be at least 0"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "must be at least 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be above 0"),
            "num_beams": (self.num_beams >= 1, "must be at least 1"),
            "num_return_sequences": (self.num_return_sequences >= 1, "must be at least 1"),
            "loop_guard": (self.loop_guard >= 0, "must be at least 0"),
        }
        for name, (fulfilled, requirement) in requirements.items():
            # NaN does not meet any of the requirements, because every comparison with NaN is false.
            if not fulfilled:
                raise ValueError(f"{name} {requirement}, not {getattr(self, name)}")
        for phrase in self.forbid:
            if _contains(self.start_with, phrase):
                raise ValueError(
                    f"start_with {self.start_with!r} contains {phrase!r}, which forbid excludes; change one of the two"
                )
        if self.num_return_sequences <= self.num_beams:
            return
        if self.num_beams > 1:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} must not be greater than "
                f"num_beams={self.num_beams} with beam search"
            )
        if self.temperature == 0:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} requires a temperature above 0, or num_beams of at "
                "least this number: greedy search has only one result"
            )


def _contains(text: str, phrase: str) -> bool:
    """Return whether a text contains a phrase as whole words, regardless of upper and lower case."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return bool(words and re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE))
