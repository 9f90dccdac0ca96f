"""Prompts and pictures -> captions: encode and prefill once, then decode many samples, token by token.

Greedy search and sampling are our own loop: N samples of a picture are copies of one prefilled cache, a row that has
ended leaves the batch, and every row draws from a generator of its own, so that a caption does not depend on its
neighbours. Beam search is transformers' own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad as nn_pad
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.generation import logits_process

from llava_simplified.data.collate import expand_image_placeholders, pad_sequences
from llava_simplified.model.language_model import cache_kwarg_name, lm_head_at_positions
from llava_simplified.model.protocols import CaptionModel
from llava_simplified.prompt import IMAGE_INDEX

DEFAULT_TEMPERATURE = 0.7  # the temperature of several answers to one question, where none is given


@dataclass(frozen=True)
class GenerationOptions:
    """How to decode.

    Attributes:
        max_new_tokens, min_new_tokens: the longest and the shortest caption, in tokens.
        temperature: 0 is greedy; higher is more varied.
        top_p: sample from the most likely tokens that together have this probability.
        top_k: sample from so many of the most likely tokens; 0 means all.
        repetition_penalty: over 1, tokens already said become less likely (Keskar et al., 2019).
        num_beams, length_penalty: over 1 beam: beam search; the score is divided by length ** penalty.
        num_return_sequences: captions per picture.
        seed: of the sampling; a row's draws depend on it, the picture and the prompt alone (of beams that are sampled,
            on the batch too). None: another each time.
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

    def __post_init__(self) -> None:
        if (
            self.temperature < 0
            or not 0 < self.top_p <= 1
            or self.num_beams < 1
            or self.max_new_tokens < 1
        ):
            raise ValueError(
                "temperature >= 0, 0 < top_p <= 1, num_beams >= 1 and max_new_tokens >= 1 are needed"
            )
        if (
            self.top_k < 0
            or self.repetition_penalty <= 0
            or not 0 <= self.min_new_tokens <= self.max_new_tokens
        ):
            raise ValueError(
                "top_k >= 0, repetition_penalty > 0 and min_new_tokens <= max_new_tokens are needed"
            )
        if self.num_return_sequences > self.num_beams and (
            self.temperature == 0 or self.num_beams > 1
        ):
            raise ValueError(
                "several different captions of a picture need temperature > 0, or as many beams"
            )


class DecodingBatch:
    """A batch under way. `step` gives every live row one token more; rows that have ended leave, others may join.

    Args:
        prompts: token ids from `Prompt.render(turns, None)`, one IMAGE_INDEX per image.
        image_features: (images, tokens, vision width) from the tower, all prompts' images in order; None: text only.
        options: for all prompts, or one each. `num_return_sequences` rows are made of a prompt, side by side.
        keys: what a prompt's random draws are derived from, beside the seed.

    Attributes:
        tokens: row -> what it has said. Who keeps a batch going for long deletes the rows that it has done with.
        live: the rows that have not ended.
        errors: row -> why no token could be chosen for it. Such a row has ended; the others continue.
    """

    def __init__(
        self,
        model: CaptionModel,
        prompts: Sequence[Sequence[int]],
        image_features: torch.Tensor | None,
        options: GenerationOptions | Sequence[GenerationOptions],
        keys: Sequence[bytes] | None = None,
    ) -> None:
        self.model = model
        self.tokens: dict[int, list[int]] = {}
        self.live: list[int] = []
        self.errors: dict[int, Exception] = {}
        self._numbers = count()
        # of the live rows: options and random numbers; what of the cache they see (live, length), their next place and
        # its scores
        self._options: dict[int, GenerationOptions] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._mask = self._next = self._logits = torch.empty(0)
        self._cache: Any = None
        self._cache_kwarg_name = cache_kwarg_name(model.language_model)
        self.join(prompts, image_features, options, keys)

    @torch.inference_mode()
    def join(
        self,
        prompts: Sequence[Sequence[int]],
        image_features: torch.Tensor | None,
        options: GenerationOptions | Sequence[GenerationOptions],
        keys: Sequence[bytes] | None = None,
    ) -> list[int]:
        """Let more prompts into the batch, whatever its rows have said meanwhile; returns the new rows."""
        model, device = self.model, self.model.device
        per_prompt = (
            [options] * len(prompts) if isinstance(options, GenerationOptions) else list(options)
        )
        if any(option.num_beams > 1 for option in per_prompt):
            raise ValueError("beam search is no matter of single steps: use generate")
        copies = [option.num_return_sequences for option in per_prompt]

        # padded left, so that every row's next token is the last column's
        rows = [
            expand_image_placeholders(prompt, model.vision_tower.num_tokens) for prompt in prompts
        ]
        input_ids = pad_sequences(rows, model.prompt.end_id, side="left").to(device)
        mask = pad_sequences([np.ones(len(row)) for row in rows], 0, side="left").to(device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        last = torch.arange(1, len(rows) + 1, device=device) * mask.shape[1] - 1
        text_model: Any = model.language_model
        cache: Any = DynamicCache(config=model.config)
        with lm_head_at_positions(text_model, last):
            outputs = text_model(
                inputs_embeds=model.splice(input_ids, image_features),
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{self._cache_kwarg_name: cache},
            )

        # One column more than anybody sees: transformers drops a mask that hides nothing, and without one PyTorch's
        # CPU kernel takes six times as long where several heads share their keys.
        longest = max(mask.shape[1], int(self._mask.sum(1).max()) if self.live else 0) + (
            device.type == "cpu"
        )
        _set_length(cache, longest)
        prompt_of = torch.arange(len(rows), device=device).repeat_interleave(
            torch.tensor(copies, device=device)
        )
        if len(prompt_of) > len(rows):
            cache.reorder_cache(prompt_of)
        new = (
            nn_pad(mask, (longest - mask.shape[1], 0)),
            positions[:, -1] + 1,
            outputs.logits.flatten(0, -2),
        )
        state = [value[prompt_of] for value in new]
        if self.live:
            _set_length(self._cache, longest)
            old = (nn_pad(self._mask, (longest - self._mask.shape[1], 0)), self._next, self._logits)
            state = [torch.cat(pair) for pair in zip(old, state)]
            _append(self._cache, cache)
        else:
            self._cache = cache
        self._mask, self._next, self._logits = state

        joined: list[int] = []
        for option, key in zip(per_prompt, keys or [b""] * len(prompts)):
            for sample in range(option.num_return_sequences):
                joined.append(row := next(self._numbers))
                self.tokens[row] = []
                self._options[row] = option
                self._generators[row] = _generator(option.seed, key, sample, device)
        self.live += joined
        return joined

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """One token for every live row: (row, token id). The end token is among them; its row is live no more."""
        if not self.live:
            return []
        chosen = self._choose()
        stop = set(self.model.prompt.stop_ids)
        kept: list[int] = []
        for place, row in enumerate(self.live):
            if row not in chosen:
                continue
            self.tokens[row].append(chosen[row])
            is_full = len(self.tokens[row]) >= self._options[row].max_new_tokens
            if chosen[row] not in stop and not is_full:
                kept.append(place)
        self._keep(kept)
        if self.live:
            last = torch.tensor(
                [[self.tokens[row][-1]] for row in self.live], device=self.model.device
            )
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.live), 1)], dim=1)
            text_model: Any = self.model.language_model
            attends = any(isinstance(layer, DynamicLayer) for layer in self._cache.layers)
            outputs = text_model(
                input_ids=last,
                attention_mask=self._mask
                if attends
                else None,  # a state (Mamba) has no columns to hide
                position_ids=self._next[:, None],
                use_cache=True,
                **{self._cache_kwarg_name: self._cache},
            )
            self._logits = outputs.logits[:, -1]
            self._next = self._next + 1
        return list(chosen.items())

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """End a row now, whatever it was about to say."""
        if row in self.live:
            self._keep([place for place, live in enumerate(self.live) if live != row])

    def _keep(self, places: list[int]) -> None:
        if len(places) == len(self.live):
            return
        index = torch.tensor(places, dtype=torch.long, device=self.model.device)
        before, self.live = self.live, [self.live[place] for place in places]
        for row in set(before) - set(self.live):
            del self._options[row], self._generators[row]
        self._mask, self._next, self._logits = (
            self._mask[index],
            self._next[index],
            self._logits[index],
        )
        if self.live:
            self._cache.reorder_cache(index)
        else:
            self._cache = None  # frees its memory

    def _choose(self) -> dict[int, int]:
        """Choose the next token of every live row, under the row's own options.

        Rows with the same options and the same number of tokens are processed together. If such a group
        fails, its rows are processed one by one, so that only the row at fault ends up in `errors`.
        """
        chosen: dict[int, int] = {}
        groups: dict[tuple[GenerationOptions, int], list[int]] = {}
        for place, row in enumerate(self.live):
            groups.setdefault((self._options[row], len(self.tokens[row])), []).append(place)
        for (options, _), places in groups.items():
            # Drawn once, before anything can fail: the second attempt must not advance the generators.
            numbers = self._random_numbers(places) if options.temperature else None
            try:
                chosen.update(self._choose_together(places, options, numbers))
            except Exception:  # noqa: BLE001 - whatever it is, it must not end the other rows
                chosen.update(self._choose_separately(places, options, numbers))
        return chosen

    def _choose_separately(
        self, places: list[int], options: GenerationOptions, numbers: torch.Tensor | None
    ) -> dict[int, int]:
        """Do the same as `_choose_together` row by row; the exceptions go to `errors`."""
        chosen: dict[int, int] = {}
        for position, place in enumerate(places):
            number = None if numbers is None else numbers[position : position + 1]
            try:
                chosen.update(self._choose_together([place], options, number))
            except Exception as error:  # noqa: BLE001
                self.errors[self.live[place]] = error
        return chosen

    def _choose_together(
        self, places: list[int], options: GenerationOptions, numbers: torch.Tensor | None
    ) -> dict[int, int]:
        """Choose the next token of rows that have the same options and the same number of tokens.

        Args:
            places: Indices into `live`.
            options: The options of these rows.
            numbers: (rows,) random numbers in [0, 1); None for greedy decoding.

        Raises:
            FloatingPointError: The scores of a row contain NaN or infinity.
        """
        rows = [self.live[place] for place in places]
        scores = self._logits[places].float()
        if len(self.tokens[rows[0]]) < options.min_new_tokens:
            scores[:, self.model.prompt.stop_ids] = -torch.inf
        scores = process_logits(scores, [self.tokens[row] for row in rows], options)
        # The maximum is NaN if any score is. Single scores may be -inf: those tokens are excluded.
        if not scores.amax(-1).isfinite().all():
            raise FloatingPointError("the scores of the next token contain NaN or infinity")
        tokens = scores.argmax(-1) if numbers is None else _draw(scores, numbers)
        return dict(zip(rows, tokens.tolist()))

    def _random_numbers(self, places: list[int]) -> torch.Tensor:
        """Draw a number in [0, 1) from the generator of each of these rows: (rows,)."""
        device = self._logits.device
        numbers = [
            torch.rand(1, generator=self._generators[self.live[place]], device=device)
            for place in places
        ]
        return torch.cat(numbers)


def _set_length(cache: Any, length: int) -> None:
    """Lengthen or shorten what a cache remembers, at its beginning: with columns that no mask shows."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):  # a linear attention: its state has no length
            continue
        kept = length
        if isinstance(layer, DynamicSlidingWindowLayer):
            kept = min(length, layer.sliding_window - 1)
            layer.cumulative_length = length
        for name in ("keys", "values"):
            old = getattr(layer, name)
            setattr(layer, name, nn_pad(old, (0, 0, kept - old.shape[-2], 0)))


def _append(cache: Any, added: Any) -> None:
    """The rows of one cache behind those of another of the same length."""
    for layer, new in zip(cache.layers, added.layers):
        if isinstance(layer, DynamicLayer):
            for name in ("keys", "values"):
                setattr(layer, name, torch.cat([getattr(layer, name), getattr(new, name)]))
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for name in ("conv_states", "recurrent_states"):
                states, more = getattr(layer, name), getattr(new, name)
                states.update(
                    {
                        i: torch.cat([state, more[i]])
                        for i, state in states.items()
                        if state is not None
                    }
                )


def process_logits(
    scores: torch.Tensor, said: Sequence[Sequence[int]], options: GenerationOptions
) -> torch.Tensor:
    """Next-token scores (rows, vocabulary) under penalty, temperature, top-k and top-p, in transformers' order."""
    ids = torch.tensor(said, device=scores.device, dtype=torch.long)
    processors: list[Any] = []
    if options.repetition_penalty != 1:
        processors.append(
            logits_process.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
        )
    if options.temperature > 0:
        processors.append(logits_process.TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            processors.append(logits_process.TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(logits_process.TopPLogitsWarper(options.top_p))
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def _draw(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A token a row (rows,): the one in whose share of [0, 1) the row's random number falls."""
    sums = scores.softmax(-1).cumsum(-1)
    return torch.searchsorted(sums / sums[:, -1:], numbers[:, None], right=True)[:, 0]


def _generator(seed: int | None, key: bytes, sample: int, device: torch.device) -> torch.Generator:
    """Random numbers of one sample of one picture; without a seed they follow torch's global generator."""
    start = int(torch.randint(2**62, ())) if seed is None else seed
    digest = hashlib.sha256(key + f"|{start}|{sample}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.inference_mode()
def encode(model: CaptionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patch features (images, tokens, width) of pictures, uint8 (images, 3, height, width)."""
    with eval_mode(model):
        return model.vision_tower(pixel_values.to(model.device))


def generate(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None,
    options: GenerationOptions,
) -> list[list[str]]:
    """Continue each prompt.

    Args:
        prompts: token ids from `Prompt.render(turns, None)`, one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width), all prompts' images in order; None: text only.

    Returns:
        For each prompt, `num_return_sequences` texts, without special tokens and outer white space.
    """
    features = None if pixel_values is None else encode(model, pixel_values)
    return generate_from(model, prompts, features, options, prompt_hashes(prompts, pixel_values))


@torch.inference_mode()
def generate_from(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    image_features: torch.Tensor | None,
    options: GenerationOptions,
    keys: Sequence[bytes],
) -> list[list[str]]:
    """`generate`, of pictures that are encoded already; `keys` as `DecodingBatch` takes them."""
    with eval_mode(model):
        if options.num_beams > 1:
            answers = _beam_search(model, prompts, image_features, options)
        else:
            decoding = DecodingBatch(model, prompts, image_features, options, keys)
            while decoding.live:
                decoding.step()
            for error in decoding.errors.values():
                raise error
            answers = list(decoding.tokens.values())
    texts = [model.prompt.decode(ids).strip() for ids in answers]
    each = options.num_return_sequences
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def stream(
    model: CaptionModel,
    prompt: Sequence[int],
    pixel_values: torch.Tensor | None,
    options: GenerationOptions,
) -> Iterator[str]:
    """One answer, as `generate` gives it: all of it so far, again and again, longer each time."""
    if options.num_return_sequences > 1:
        raise ValueError("one answer can be streamed, not several")
    with eval_mode(model):
        features = None if pixel_values is None else encode(model, pixel_values)
        decoding = DecodingBatch(
            model, [prompt], features, options, prompt_hashes([prompt], pixel_values)
        )
        while decoding.live:
            decoding.step()
            for error in decoding.errors.values():
                raise error
            text = model.prompt.decode(decoding.tokens[0])
            if (
                not text.endswith("\ufffd") or not decoding.live
            ):  # else the next token completes a letter
                yield text.lstrip()


@contextmanager
def eval_mode(model: CaptionModel) -> Iterator[None]:
    """No dropout meanwhile."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def prompt_hashes(
    prompts: Sequence[Sequence[int]], pixel_values: torch.Tensor | Sequence[torch.Tensor] | None
) -> list[bytes]:
    """For each prompt a digest of its text and its pictures: the same in whatever batch they come."""
    keys, pictures = [], iter(() if pixel_values is None else pixel_values)
    for prompt in prompts:
        digest = hashlib.sha256(repr(list(prompt)).encode())
        for picture in islice(pictures, list(prompt).count(IMAGE_INDEX)):
            digest.update(picture.cpu().numpy().tobytes())
        keys.append(digest.digest())
    return keys


def _beam_search(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    features: torch.Tensor | None,
    options: GenerationOptions,
) -> list[list[int]]:
    """transformers' own; with a temperature, beam sampling. `num_return_sequences` beams of each prompt."""
    rows = [expand_image_placeholders(prompt, model.vision_tower.num_tokens) for prompt in prompts]
    input_ids = pad_sequences(rows, model.prompt.end_id, side="left").to(model.device)
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    if options.temperature and options.seed is not None:
        torch.manual_seed(options.seed)
    text_model: Any = model.language_model
    return text_model.generate(
        inputs_embeds=model.splice(input_ids, features),
        attention_mask=pad_sequences([np.ones(len(row)) for row in rows], 0, side="left").to(
            model.device
        ),
        eos_token_id=model.prompt.stop_ids,
        pad_token_id=model.prompt.end_id,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        # not as an option: in a padded batch transformers 5 counts the padding off what is penalised
        logits_processor=[
            logits_process.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
        ],
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        num_return_sequences=options.num_return_sequences,
        do_sample=options.temperature > 0,
        **(sampling if options.temperature else {}),
    ).tolist()
