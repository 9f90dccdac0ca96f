"""Generate text: encode the images once, prefill once, then decode many sequences token by token.

    images --vision tower--> features --+
                                        +--splice--> prefill --> KV cache --+--> sequence 0
    prompts --tokenizer----> token ids -+           (1 row per prompt)      +--> sequence 1
                                                                            +--> sequence 2

Greedy search and sampling use our own decode loop, `DecodingBatch`, with continuous batching (Yu et
al., Orca, 2022): after each step, finished sequences leave the batch, and new ones may join. A prompt with
N samples is prefilled only once, and all samples start from the same KV cache. For beam search, we call
Transformers.

A sequence does not depend on the other sequences in the batch: padding is masked, positions are counted from
the sequence's own first token, and each sequence has its own random numbers (see
`llava_simplified.model.sampling`).

On a GPU, the steps run as CUDA graphs (see `llava_simplified.model.static_decoding`). In each step, the host
reads only one small tensor from the device: the new tokens, which decide which sequences end.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad as pad_tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import LogitsProcessor, logits_process

from llava_simplified.data.collate import (
    expand_image_placeholders,
    find_image_positions,
    pad_sequences,
)
from llava_simplified.data.device_copy import to_device
from llava_simplified.model.forbidden_words import (
    ForbiddenWordsProcessor,
    exclude_forbidden_words,
    load_forbidden_words,
)
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.kv_cache import (
    append_cache_rows,
    has_key_value_columns,
    set_cache_length,
)
from llava_simplified.model.language_model import (
    cache_kwarg_name,
    lm_head_at_positions,
    without_peft,
)
from llava_simplified.model.loop_guard import is_looping
from llava_simplified.model.protocols import CaptionModel, CausalLM
from llava_simplified.model.sampling import draw, process_logits, prompt_hashes, random_numbers
from llava_simplified.model.static_decoding import (
    BuffersTooLargeError,
    DecodingState,
    StaticDecodingError,
    disable_static_decoding,
    find_static_decoder,
)
from llava_simplified.prompt import IMAGE_INDEX

logger = logging.getLogger(__name__)

# This id takes the place of the token if the logits of a sequence are not finite.
_NO_TOKEN = -1

NOT_FINITE = "The logits of the next token contain NaN or infinity."


class DecodingBatch:
    """A batch of sequences in flight. `step` generates one token for each sequence; `join` adds sequences.

    Example:
        batch = DecodingBatch(model, prompts, features, GenerationOptions(max_new_tokens=20))
        while batch.active:
            batch.step()
        batch.generated_ids  # {0: [312, 78, 2], 1: ...}

    A sequence keeps its id for the lifetime of the batch. Its row in the batch changes when others
    leave. Sequences of one prompt that have generated the same tokens share a row: the model computes
    it once, and each of them chooses its own next token.

    Args:
        model: The model, in evaluation mode (see `eval_mode`).
        prompts: Token ids from `Prompt.render(turns, None)`, one IMAGE_INDEX per image.
        image_features: (images, tokens, vision hidden size), the images of all prompts in order; None:
            no image.
        options: One object for all prompts, or one per prompt. A prompt gets `num_return_sequences`
            consecutive sequence ids.
        hashes: One per prompt, see `prompt_hashes`. Hash and seed determine the random numbers of a
            prompt's sequences.

    Attributes:
        generated_ids: Token ids of the answer by sequence id, also for finished sequences. They begin with those
            of `GenerationOptions.start_with`. Long-running callers must delete the entries of finished sequences
            after reading them.
        active: Ids of the sequences that are not finished.
        errors: The exception that prevented choosing the next token, by sequence id. Such a sequence is
            finished; the others continue.
    """

    def __init__(
        self,
        model: CaptionModel,
        prompts: Sequence[Sequence[int]],
        image_features: torch.Tensor | None,
        options: GenerationOptions | Sequence[GenerationOptions],
        hashes: Sequence[bytes] | None = None,
    ) -> None:
        self.model = model
        self.generated_ids: dict[int, list[int]] = {}
        self.active: list[int] = []
        self.errors: dict[int, Exception] = {}
        self._new_ids = count()
        # This is the state of a batch with four active sequences before a step. Sequences 7 and 8 are samples of
        # the same prompt. They have generated the same tokens so far, so they share a row:
        #
        #                      columns of the KV cache     _mask               _next_positions  _logits
        #     row 0  id 4      . . a a a a a a             0 0 1 1 1 1 1 1     6                (3, vocab)
        #     row 1  id 7, 8   . . . b b b b b             0 0 0 1 1 1 1 1     5
        #     row 2  id 9      . . . . . d d d             0 0 0 0 0 1 1 1     3
        #
        # For active sequences only, by sequence id:
        self._options: dict[int, GenerationOptions] = {}
        self._random_numbers: dict[int, Iterator[float]] = {}
        self._num_forced: dict[int, int] = {}  # number of token ids of `start_with`
        # For active sequences only, in the order of `active`:
        self._row_of: list[int] = []  # the row of each sequence
        # By row:
        self._mask = torch.empty(0)  # int64 (rows, columns of the cache)
        self._next_positions = torch.empty(0)  # int64 (rows,)
        self._logits = torch.empty(0)  # (rows, vocabulary), of the next token
        self._cache: Any = None
        # On a GPU, the mask, the positions and the cache are moved into the buffers of this decoder (else None).
        self._static_decoder = find_static_decoder(model)
        self._cache_kwarg_name = cache_kwarg_name(model.language_model)
        self.join(prompts, image_features, options, hashes)

    # How prompts join a batch in flight: they are prefilled separately, and then their rows are appended to
    # those of the batch. Nothing is computed again for the old sequences:
    #
    #     batch   . . a a a a a a      prefill   p p p p    ->   set both caches to the same length, with
    #             . . . b b b b b                . . q q         masked columns on the left, and append:
    #
    #                                                            . . a a a a a a
    #                                                            . . . b b b b b
    #                                                            . . . . p p p p
    #                                                            . . . . . . q q
    @torch.inference_mode()
    def join(
        self,
        prompts: Sequence[Sequence[int]],
        image_features: torch.Tensor | None,
        options: GenerationOptions | Sequence[GenerationOptions],
        hashes: Sequence[bytes] | None = None,
    ) -> list[int]:
        """Add prompts to the batch, at any time. For the arguments, see the constructor.

        Returns:
            The ids of the new sequences. The ids of one prompt are consecutive.

        Raises:
            ValueError: `options` request beam search (`num_beams` above 1).
        """
        if isinstance(options, GenerationOptions):
            options = [options] * len(prompts)
        if any(option.num_beams > 1 for option in options):
            raise ValueError("`step()` does not support beam search; use `generate()`")

        # Prefill the forced beginning of an answer (`start_with`) together with the prompt.
        starts = [_start_ids(self.model, option) for option in options]
        prompts = [[*prompt, *start] for prompt, start in zip(prompts, starts)]
        mask, next_positions, logits, cache = self._prefill(prompts, image_features)

        # Give the new and the old rows the same number of columns: the number of tokens of the longest
        # sequence. This also removes the columns that only finished sequences needed.
        columns = mask.shape[1]
        self.leave_static_buffers()
        if self.active:
            self._arrange_rows(list(dict.fromkeys(self._row_of)))
            longest = self._mask.sum(1).max()
            columns = max(columns, int(longest))
        if self.model.device.type == "cpu":
            # Pad the attention mask by one fully masked column. Transformers drops a mask that masks nothing, and
            # without a mask, PyTorch's CPU kernel takes six times as long for grouped-query attention.
            columns += 1
        set_cache_length(cache, columns)
        mask = pad_tensor(mask, (columns - mask.shape[1], 0))

        # Keep the old rows first, so that a join does not change the row of an active sequence.
        first_row = len(self._logits) if self.active else 0
        if self.active:
            set_cache_length(self._cache, columns)
            append_cache_rows(self._cache, cache)
            added = columns - self._mask.shape[1]  # negative if columns are removed
            old_mask = pad_tensor(self._mask, (added, 0))
            self._mask = torch.cat([old_mask, mask])
            self._next_positions = torch.cat([self._next_positions, next_positions])
            self._logits = torch.cat([self._logits, logits])
        else:
            self._cache = cache
            self._mask = mask
            self._next_positions = next_positions
            self._logits = logits

        joined: list[int] = []
        hashes = hashes or [b""] * len(prompts)
        for row, (option, start, prompt_hash) in enumerate(zip(options, starts, hashes), first_row):
            self._row_of += [row] * option.num_return_sequences
            for sample in range(option.num_return_sequences):
                sequence_id = next(self._new_ids)
                joined.append(sequence_id)
                self.generated_ids[sequence_id] = list(start)
                self._num_forced[sequence_id] = len(start)
                self._options[sequence_id] = option
                if option.temperature:
                    self._random_numbers[sequence_id] = random_numbers(
                        option.seed, prompt_hash, sample
                    )
        self.active += joined
        return joined

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Generate one token for every active sequence.

        Returns:
            A pair (sequence id, token id) for each sequence, also if the token is an end token, which finishes
            the sequence. A sequence that fails, for example because its logits are not finite, gets an entry in
            `errors` instead.
        """
        if not self.active:
            return []
        tokens = self._choose_tokens()
        generated: list[tuple[int, int]] = []
        stop_ids = set(self.model.prompt.stop_ids)
        remaining: list[int] = []
        for position, (sequence_id, token) in enumerate(zip(self.active, tokens)):
            if token is None:
                self.errors.setdefault(sequence_id, FloatingPointError(NOT_FINITE))
                continue
            generated.append((sequence_id, token))
            self.generated_ids[sequence_id].append(token)
            if token not in stop_ids and not self._is_complete(sequence_id):
                remaining.append(position)
        # Remove finished sequences before the next forward pass, so that it computes nothing for them.
        self._keep(remaining)
        if self.active:
            self._decode()
        return generated

    def _is_complete(self, sequence_id: int) -> bool:
        """Return whether a sequence must end, even without an end token: it reached its limit, or repeats itself."""
        ids = self.generated_ids[sequence_id]
        options = self._options[sequence_id]
        num_generated = len(ids) - self._num_forced[sequence_id]
        if num_generated >= options.max_new_tokens:
            return True
        if not options.loop_guard or num_generated < options.min_new_tokens:
            return False
        return is_looping(self.model.prompt, ids, options.loop_guard)

    def raise_errors(self) -> None:
        """Raise the first of `errors`, if there are any. Use it if the failure of one sequence is fatal.

        Raises:
            Exception: The error of the sequence, for example FloatingPointError if its logits were not finite.
        """
        for error in self.errors.values():
            raise error

    @torch.inference_mode()
    def cancel(self, sequence_id: int) -> None:
        """Finish a sequence now. This has no effect if it is finished already."""
        if sequence_id in self.active:
            position = self.active.index(sequence_id)
            others = [other for other in range(len(self.active)) if other != position]
            self._keep(others)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], image_features: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Run the prompts through the language model.

        Returns:
            The attention mask (prompts, columns), the position of the next token (prompts,), its logits
            (prompts, vocabulary), and the KV cache.
        """
        model = self.model
        input_ids, mask, image_positions = _expand_and_pad(model, prompts)
        # Padding gets the position 0, which does not matter because the mask hides it.
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        # Compute logits only for the last column of each row. `last_columns` are flat indices into prompts x columns.
        row_ends = torch.arange(1, len(prompts) + 1, device=model.device) * mask.shape[1]
        last_columns = row_ends - 1
        cache: Any = DynamicCache(config=model.config)
        with lm_head_at_positions(model.language_model, last_columns):
            outputs = model.language_model(
                inputs_embeds=model.splice(input_ids, image_features, image_positions),
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{self._cache_kwarg_name: cache},
            )
        next_positions = positions[:, -1] + 1
        logits = outputs.logits.flatten(0, -2)
        return mask, next_positions, logits, cache

    def _decode(self) -> None:
        """Run the model on the newest token of each active sequence.

        This adds one column to the cache and the mask, and sets the logits of the next token.
        """
        newest = [self.generated_ids[sequence_id][-1] for sequence_id in self.active]
        if self._decode_in_static_buffers(newest):
            return
        newest = self._split_rows(newest)
        new_column = self._mask.new_ones(len(newest), 1)
        self._mask = torch.cat([self._mask, new_column], dim=1)
        # A pure state-space model (Mamba) has no columns in its cache, so there is nothing to mask.
        attention_mask = self._mask if has_key_value_columns(self._cache) else None
        outputs = self.model.language_model(
            input_ids=to_device(torch.tensor(newest), self.model.device)[:, None],
            attention_mask=attention_mask,
            position_ids=self._next_positions[:, None],
            use_cache=True,
            **{self._cache_kwarg_name: self._cache},
        )
        self._logits = outputs.logits[:, -1]
        self._next_positions = self._next_positions + 1

    # Three samples of one prompt share a row. In a step, two choose the token "a" and one chooses "my":
    #
    #     row 0  id 7, 8, 9   . p p p         row 0  id 7, 8   . p p p  a
    #                                    ->   row 1  id 9      . p p p  my
    #
    # Sharing rows saves time on a CPU, where the time of a step is nearly proportional to the number of rows, and
    # where samples often begin with the same tokens. The buffers of `static_decoding` have a fixed number of rows,
    # which are not shared: on a GPU, it would make no difference.
    def _split_rows(self, newest: Sequence[int]) -> list[int]:
        """Copy the rows of sequences that have shared a row until now, but have chosen different tokens.

        Args:
            newest: The newest token of each active sequence.

        Returns:
            The newest token of each row.
        """
        # Each different pair of an old row and a token becomes a new row.
        choices = list(zip(self._row_of, newest))
        distinct = {choice: row for row, choice in enumerate(dict.fromkeys(choices))}
        self._arrange_rows([row for row, _ in distinct], keep_logits=False)
        self._row_of = [distinct[choice] for choice in choices]
        return [token for _, token in distinct]

    def _arrange_rows(self, rows: Sequence[int], keep_logits: bool = True) -> None:
        """Replace the rows of the batch by a selection of them.

        Args:
            rows: Indices of current rows, in the new order. A row may occur several times.
            keep_logits: Also select the logits, and update the row of each sequence. Pass False if the caller
                sets both.
        """
        if list(rows) == list(range(len(self._mask))):
            return
        index = to_device(torch.tensor(rows, dtype=torch.long), self.model.device)
        self._mask = self._mask[index]
        self._next_positions = self._next_positions[index]
        self._cache.reorder_cache(index)
        if keep_logits:
            self._logits = self._logits[index]
            new_row = {row: position for position, row in enumerate(rows)}
            self._row_of = [new_row[row] for row in self._row_of]

    # ---- decoding on a GPU ----

    def _decode_in_static_buffers(self, newest: list[int]) -> bool:
        """Run the step of `_decode` in the buffers of the static decoder, if possible.

        Args:
            newest: The newest token of each active sequence.

        Returns:
            Whether the step has run. It has not if there is no static decoder, or if the decoder failed.
        """
        decoder = self._static_decoder
        if decoder is None:
            return False
        if decoder.is_loaded(self) and decoder.is_full:
            self.leave_static_buffers()
        try:
            if not decoder.is_loaded(self):
                # The buffers have a separate row for each sequence.
                self._arrange_rows(self._row_of, keep_logits=False)
                self._row_of = list(range(len(self.active)))
                state = DecodingState(self._cache, self._mask, self._next_positions)
                decoder.load(self, state, self._most_remaining_tokens())
                self._cache = None
            self._logits = decoder.step(newest)
        except BuffersTooLargeError as error:
            decoder.warn_too_large(error)
            return False
        except StaticDecodingError as error:
            self.leave_static_buffers()
            disable_static_decoding(self.model, str(error))
            self._static_decoder = None
            return False
        return True

    def leave_static_buffers(self) -> None:
        """Move the mask, the positions and the cache out of the static decoder's buffers, if they are there."""
        decoder = self._static_decoder
        if decoder is not None and decoder.is_loaded(self):
            state = decoder.unload()
            self._cache, self._mask = state.cache, state.mask
            self._next_positions = state.next_positions

    def _most_remaining_tokens(self) -> int:
        """Return the largest number of tokens that any active sequence may still generate."""
        remaining = []
        for sequence_id in self.active:
            generated = len(self.generated_ids[sequence_id]) - self._num_forced[sequence_id]
            remaining.append(self._options[sequence_id].max_new_tokens - generated)
        return max(remaining)

    def _keep(self, positions: list[int]) -> None:
        """Remove all active sequences from the batch except those at `positions`.

        Args:
            positions: Indices into `active`.
        """
        if len(positions) == len(self.active):
            return
        before = self.active
        self.active = [before[position] for position in positions]
        for sequence_id in set(before) - set(self.active):
            del self._options[sequence_id]
            del self._num_forced[sequence_id]
            self._random_numbers.pop(sequence_id, None)
        self._row_of = [self._row_of[position] for position in positions]
        if self._static_decoder is not None and self._static_decoder.is_loaded(self):
            index = to_device(torch.tensor(positions, dtype=torch.long), self.model.device)
            self._logits = self._logits[index]
            self._row_of = list(range(len(positions)))
            self._static_decoder.keep_rows(positions)
        elif not self.active:
            self._cache = None  # to free its memory
        # Otherwise, the rows of finished sequences stay for now. `_decode` or `join` removes them.

    def _choose_tokens(self) -> list[int | None]:
        """Return the next token of every active sequence, chosen with the options of the sequence.

        The token is None if a sequence failed: its logits are not finite, or it has an entry in `errors`. The
        other sequences are not affected.
        """
        # Process all sequences with the same options and the same length together. Usually, these are all
        # sequences. The lengths must be equal because the repetition penalty reads a tensor of generated ids.
        groups: dict[tuple[GenerationOptions, int], list[int]] = {}
        for position, sequence_id in enumerate(self.active):
            key = (self._options[sequence_id], len(self.generated_ids[sequence_id]))
            groups.setdefault(key, []).append(position)

        order: list[int] = []
        tokens: list[torch.Tensor] = []
        for (options, _), group in groups.items():
            # Draw the random numbers first, so that a second attempt uses the same numbers.
            numbers = self._draw_numbers(group, options)
            try:
                tokens.append(self._choose_together(group, options, numbers))
            except Exception:  # noqa: BLE001 - no failure may end the other sequences
                # Find the sequence that causes the error by repeating the attempt for each sequence alone.
                for index, position in enumerate(group):
                    number = None if numbers is None else numbers[index : index + 1]
                    tokens.append(self._choose_alone(position, options, number))
            order += group

        # Read the tokens of all groups together, because the host waits for the device here.
        chosen: list[int | None] = [None] * len(self.active)
        for position, token in zip(order, torch.cat(tokens).tolist()):
            chosen[position] = None if token == _NO_TOKEN else token
        return chosen

    def _draw_numbers(
        self, positions: list[int], options: GenerationOptions
    ) -> torch.Tensor | None:
        """Return a random number per sequence, on the device; None for greedy search."""
        if not options.temperature:
            return None
        numbers = [next(self._random_numbers[self.active[position]]) for position in positions]
        return to_device(torch.tensor(numbers), self.model.device)

    def _choose_together(
        self, positions: list[int], options: GenerationOptions, numbers: torch.Tensor | None
    ) -> torch.Tensor:
        """Choose the next token of sequences with equal options and lengths.

        Args:
            positions: Indices into `active`.
            options: Their options.
            numbers: Their random numbers.

        Returns:
            int64 (sequences,) on the device, `_NO_TOKEN` where the logits are not finite.
        """
        ids = [self.active[position] for position in positions]
        answers = [self.generated_ids[i] for i in ids]
        logits = self._logits
        rows = [self._row_of[position] for position in positions]
        if rows != list(range(len(logits))):
            logits = logits[to_device(torch.tensor(rows), logits.device)]
        logits = logits.float()
        # Equal options have the same `start_with`, so all of these sequences have generated the same number of
        # tokens after it.
        if len(answers[0]) - self._num_forced[ids[0]] < options.min_new_tokens:
            stop_ids = to_device(torch.tensor(self.model.prompt.stop_ids), logits.device)
            logits = logits.index_fill(1, stop_ids, -torch.inf)
        if options.forbid:
            words = load_forbidden_words(self.model.prompt, options.forbid)
            # Copy the logits before changing them: they may be `self._logits`, which a second attempt reads again.
            logits = logits.clone()
            exclude_forbidden_words(logits, answers, words)
        logits = process_logits(logits, answers, options)
        if numbers is None:
            tokens = logits.argmax(-1)
        else:
            tokens = draw(logits, numbers)
        # Check only the maximum: it is NaN if any logit is NaN. Some logits may be -inf (excluded tokens).
        is_finite = logits.amax(-1).isfinite()
        return tokens.where(is_finite, _NO_TOKEN)

    def _choose_alone(
        self, position: int, options: GenerationOptions, number: torch.Tensor | None
    ) -> torch.Tensor:
        """Choose the next token of one sequence. If this fails, store the exception in `errors`."""
        try:
            return self._choose_together([position], options, number)
        except Exception as error:  # noqa: BLE001
            self.errors[self.active[position]] = error
            return torch.full((1,), _NO_TOKEN, device=self.model.device)


# The locks of all models that have generated; see `generation_lock`.
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def generation_lock(model: CaptionModel) -> threading.RLock:
    """Return the lock that a thread must hold while it runs the model to generate.

    Forward passes temporarily change the model (`lm_head_at_positions`, `skip_layers`, `eval_mode`), so two threads must
    not run them at the same time. A stream holds the lock only during its steps, so that others may generate while it
    waits for its reader. The lock is not an attribute of the model, because a model must be copyable.
    """
    return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def eval_mode(model: CaptionModel) -> Iterator[None]:
    """Put the model into evaluation mode (no dropout) within a `with` block."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def encode_images(model: CaptionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Run the vision tower.

    Args:
        model: The model.
        pixel_values: uint8 (images, 3, height, width).

    Returns:
        Patch features (images, tokens, vision hidden size).
    """
    with generation_lock(model), eval_mode(model):
        return model.vision_tower(to_device(pixel_values, model.device))


# ---- the length of the context ----


def max_context_of(model: CaptionModel) -> int | None:
    """Return the maximum number of tokens of prompt, images and answer together.

    A model without position embeddings, such as Mamba, has no limit; None is returned for it.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    return None if context is None else int(context)


def count_prompt_tokens(model: CaptionModel, prompt: Sequence[int]) -> int:
    """Return the number of tokens of a prompt in the context.

    An image is one IMAGE_INDEX in the prompt, but has `vision_tower.num_tokens` tokens in the context.
    """
    return len(prompt) + prompt.count(IMAGE_INDEX) * (model.vision_tower.num_tokens - 1)


def limit_new_tokens(options: GenerationOptions, limit: int) -> GenerationOptions:
    """Return the options with at most `limit` new tokens, the number that still fits into the context."""
    if options.max_new_tokens <= limit:
        return options
    min_new_tokens = min(options.min_new_tokens, limit)
    return replace(options, max_new_tokens=limit, min_new_tokens=min_new_tokens)


def fit_to_context(
    model: CaptionModel, prompt: Sequence[int], options: GenerationOptions
) -> GenerationOptions:
    """Return the options, with as many new tokens as fit into the context after the prompt and `start_with`.

    A model with learned position embeddings has none beyond its context. Other models continue, but were not trained
    for such positions.

    Raises:
        ValueError: The prompt leaves no room for an answer.
    """
    context = max_context_of(model)
    if context is None:
        return options
    prompt_tokens = count_prompt_tokens(model, prompt) + len(_start_ids(model, options))
    if prompt_tokens >= context:
        raise ValueError(
            f"The prompt has {prompt_tokens} tokens (images included), but the context of the model has only "
            f"{context} tokens for the prompt and the answer. Shorten the conversation."
        )
    return limit_new_tokens(options, context - prompt_tokens)


# ---- generation ----


def generate(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    pixel_values: torch.Tensor | None,
    options: GenerationOptions,
) -> list[list[str]]:
    """Continue each prompt.

    Args:
        model: The model.
        prompts: Token ids from `Prompt.render(turns, None)`, one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width), the images of all prompts in order; None if
            there are none.
        options: Options for all prompts.

    Returns:
        For each prompt `num_return_sequences` texts, without special tokens and without white space at the
        beginning and at the end.

    Raises:
        ValueError: A prompt does not fit into the context of the model.
        FloatingPointError: The logits of a prompt were not finite.
    """
    # Check all prompts before the images are encoded.
    for prompt in prompts:
        fit_to_context(model, prompt, options)
    features = None if pixel_values is None else encode_images(model, pixel_values)
    hashes = prompt_hashes(prompts, pixel_values)
    return generate_from_features(model, prompts, features, options, hashes)


@torch.inference_mode()
def generate_from_features(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    image_features: torch.Tensor | None,
    options: GenerationOptions,
    hashes: Sequence[bytes],
) -> list[list[str]]:
    """Continue each prompt as `generate` does, but from images that are already encoded.

    For the arguments, see `generate_separately`. A prompt that does not fit into the context gets empty texts, and a
    warning is logged: a training run, which captions some validation images, must not end because of one of them.

    Raises:
        FloatingPointError: The logits of a prompt were not finite.
    """
    results: list[list[str]] = []
    for result in generate_separately(model, prompts, image_features, options, hashes):
        if isinstance(result, FloatingPointError):
            raise result
        if isinstance(result, ValueError):
            logger.warning("A caption is left empty: %s", result)
            result = [""] * options.num_return_sequences
        results.append(result)
    return results


@torch.inference_mode()
def generate_separately(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    image_features: torch.Tensor | None,
    options: GenerationOptions,
    hashes: Sequence[bytes],
) -> list[list[str] | FloatingPointError | ValueError]:
    """Continue each prompt. If one prompt fails, the other prompts are still continued.

    An answer ends where the context of the model is full.

    Args:
        model: The model.
        prompts: Token ids, one IMAGE_INDEX per image.
        image_features: (images, tokens, vision hidden size), the images of all prompts in order, or
            None.
        options: Options for all prompts.
        hashes: One per prompt, see `prompt_hashes`.

    Returns:
        For each prompt `num_return_sequences` texts, as `generate` returns them; or an error if the logits of
        one of the sequences were not finite (FloatingPointError), or if the prompt does not fit into the context
        (ValueError).
    """
    results: dict[int, list[str] | FloatingPointError | ValueError] = {}
    fitted: dict[int, GenerationOptions] = {}
    # If `start_with` cannot be tokenized, raise the error here, because it concerns all prompts.
    _start_ids(model, options)
    for number, prompt in enumerate(prompts):
        try:
            fitted[number] = fit_to_context(model, prompt, options)
        except ValueError as error:
            results[number] = error

    # Beam search accepts one maximum length for a batch, so prompts with a lowered one are in batches of their own.
    batches: dict[GenerationOptions, list[int]] = {}
    for number, fitted_options in fitted.items():
        key = fitted_options if options.num_beams > 1 else options
        batches.setdefault(key, []).append(number)
    for numbers in batches.values():
        texts = _generate_batch(
            model,
            [prompts[number] for number in numbers],
            _features_of_prompts(prompts, image_features, numbers),
            [fitted[number] for number in numbers],
            [hashes[number] for number in numbers],
        )
        results.update(zip(numbers, texts))
    return [results[number] for number in range(len(prompts))]


def _features_of_prompts(
    prompts: Sequence[Sequence[int]], image_features: torch.Tensor | None, numbers: Sequence[int]
) -> torch.Tensor | None:
    """Return the features of the images of some prompts.

    Args:
        prompts: All prompts.
        image_features: (images, tokens, vision hidden size), the images of all prompts in order, or None.
        numbers: Indices of prompts, in order.

    Returns:
        The features in the same form, or None if these prompts contain no images.
    """
    if image_features is None or len(numbers) == len(prompts):
        return image_features
    counts = [prompt.count(IMAGE_INDEX) for prompt in prompts]
    features_by_prompt = image_features.split(counts)
    features = torch.cat([features_by_prompt[number] for number in numbers])
    return features if len(features) else None


def _generate_batch(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    image_features: torch.Tensor | None,
    options: Sequence[GenerationOptions],
    hashes: Sequence[bytes],
) -> list[list[str] | FloatingPointError]:
    """Continue prompts that fit into the context.

    For the arguments and the result, see `generate_separately`. There is one `options` per prompt; they differ only in
    the number of new tokens, and not at all for beam search.
    """
    per_prompt = options[0].num_return_sequences
    with generation_lock(model), eval_mode(model):
        if options[0].num_beams > 1:
            sequences, failed = _beam_search(model, prompts, image_features, options[0])
        else:
            batch = DecodingBatch(model, prompts, image_features, options, hashes)
            while batch.active:
                batch.step()
            sequences = list(batch.generated_ids.values())
            failed = set()
            for sequence_id, error in batch.errors.items():
                if not isinstance(error, FloatingPointError):
                    raise error
                failed.add(sequence_id // per_prompt)
    # Group the texts by prompt. The sequences of one prompt are consecutive.
    results: list[list[str] | FloatingPointError] = []
    for number in range(len(prompts)):
        if number in failed:
            results.append(FloatingPointError(NOT_FINITE))
            continue
        ids_of_prompt = sequences[number * per_prompt : (number + 1) * per_prompt]
        results.append([model.prompt.decode(ids).strip() for ids in ids_of_prompt])
    return results


def stream(
    model: CaptionModel,
    prompt: Sequence[int],
    pixel_values: torch.Tensor | None,
    options: GenerationOptions,
) -> Iterator[str]:
    """Generate one sequence, and after every token yield the complete text so far.

    Each text begins with the previous one, and the last text is what `generate` returns.

    Args:
        model: The model.
        prompt: Token ids, one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width), or None.
        options: The options; `num_beams` and `num_return_sequences` must be 1.

    Raises:
        ValueError: `options` request several sequences or beam search, or the prompt does not fit into the context.
    """
    if options.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences must be 1 when streaming, not {options.num_return_sequences}"
        )
    if options.num_beams > 1:
        raise ValueError(f"num_beams must be 1 when streaming, not {options.num_beams}")
    options = fit_to_context(model, prompt, options)
    with eval_mode(model):
        features = None if pixel_values is None else encode_images(model, pixel_values)
        hashes = prompt_hashes([prompt], pixel_values)
        with generation_lock(model):
            batch = DecodingBatch(model, [prompt], features, options, hashes)
        while batch.active:
            # Never hold the lock at `yield`: a caller may leave the stream unfinished.
            with generation_lock(model):
                batch.step()
            batch.raise_errors()
            text = model.prompt.decode(batch.generated_ids[0], finished=not batch.active)
            # Remove white space as `generate` does. If another word follows, white space at the end is yielded with it.
            yield text.strip()


def _expand_and_pad(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Repeat each image placeholder once per patch feature, and pad the prompts on the left.

    With padding on the left, the last column contains the newest token of every row.

    Returns:
        The token ids and the attention mask, int64 (prompts, columns); and the flat indices of the image
        placeholders, int64 (placeholders,).
    """
    num_tokens = model.vision_tower.num_tokens
    expanded = [expand_image_placeholders(prompt, num_tokens) for prompt in prompts]
    input_ids = pad_sequences(expanded, model.prompt.end_id, side="left")
    ones = [np.ones(len(ids)) for ids in expanded]
    mask = pad_sequences(ones, 0, side="left")
    inputs = (input_ids, mask, find_image_positions(input_ids))
    on_device = [to_device(tensor, model.device) for tensor in inputs]
    return on_device[0], on_device[1], on_device[2]


def _beam_search(
    model: CaptionModel,
    prompts: Sequence[Sequence[int]],
    image_features: torch.Tensor | None,
    options: GenerationOptions,
) -> tuple[list[list[int]], set[int]]:
    """Run the beam search of Transformers, or its beam sampling if there is a temperature.

    Returns:
        `num_return_sequences` lists of token ids per prompt, in the order of the prompts; and the indices of the
        prompts whose logits were not finite. The token ids of these prompts are meaningless.

    Raises:
        ValueError: Transformers' beam search does not support embeddings for this family of models.
    """
    owner = without_peft(model.language_model)
    # An image is a sequence of embeddings, so a prompt cannot be passed as token ids.
    if "inputs_embeds" not in signature(owner.prepare_inputs_for_generation).parameters:
        raise ValueError(
            f"num_beams={options.num_beams}: Transformers does not support beam search with image embeddings for "
            f"{model.config.model_type}; use num_beams 1 (greedy search or sampling)"
        )
    start_ids = _start_ids(model, options)
    prompts = [[*prompt, *start_ids] for prompt in prompts]
    input_ids, attention_mask, image_positions = _expand_and_pad(model, prompts)
    if options.temperature and options.seed is not None:
        torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {}
    if options.temperature:
        sampling = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
        }
    # Pass the penalty as a logits processor, not as the option `repetition_penalty`: in a padded batch,
    # Transformers 5 does not apply the option to all generated tokens (it ignores one for each padding token).
    processors: list[logits_process.LogitsProcessor] = [
        _RepetitionPenalty(options.repetition_penalty, start_ids)
    ]
    if options.forbid:
        words = load_forbidden_words(model.prompt, options.forbid)
        processors.append(ForbiddenWordsProcessor(words, start_ids))
    generation_config = GenerationConfig(
        eos_token_id=model.prompt.stop_ids,
        pad_token_id=model.prompt.end_id,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        num_return_sequences=options.num_return_sequences,
        do_sample=options.temperature > 0,
        **sampling,
    )
    guard = _NonFiniteGuard(options.num_beams)
    with _without_generation_defaults(model.language_model):
        sequences = model.language_model.generate(
            inputs_embeds=model.splice(input_ids, image_features, image_positions),
            attention_mask=attention_mask,
            generation_config=generation_config,
            logits_processor=[guard, *processors],
        )
    return [start_ids + ids for ids in sequences.tolist()], guard.failed


def _start_ids(model: CaptionModel, options: GenerationOptions) -> list[int]:
    """Return the token ids that every answer begins with."""
    return model.prompt.encode_start(options.start_with) if options.start_with.strip() else []


class _RepetitionPenalty(logits_process.RepetitionPenaltyLogitsProcessor):
    """The repetition penalty of beam search. Like that of greedy search, it includes the tokens of `start_with`.

    Args:
        penalty: Factor of the penalty.
        start_ids: Token ids that the answer begins with. They are part of the prompt of `generate` of Transformers.
    """

    def __init__(self, penalty: float, start_ids: Sequence[int]) -> None:
        super().__init__(float(penalty))
        self._start_ids = list(start_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (rows, vocabulary), lowered for tokens of the answer so far."""
        start = input_ids.new_tensor(self._start_ids).expand(len(input_ids), -1)
        penalized: torch.Tensor = super().__call__(torch.cat([start, input_ids], dim=1), scores)
        return penalized


class _NonFiniteGuard(LogitsProcessor):
    """Records the prompts whose logits are not finite, so that beam search continues for the other prompts.

    Args:
        num_beams: Number of consecutive rows per prompt.

    Attributes:
        failed: Indices of the prompts whose logits were not finite.
    """

    def __init__(self, num_beams: int) -> None:
        self.failed: set[int] = set()
        self._num_beams = num_beams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (rows, vocabulary), with zeros in all rows that have failed."""
        # The maximum is NaN if any score is NaN. Some scores may be -inf (excluded tokens).
        is_finite = scores.amax(-1).isfinite()
        if is_finite.all():
            return scores
        for row in (~is_finite).nonzero()[:, 0].tolist():
            self.failed.add(row // self._num_beams)
        # Replace NaN, because sampling would raise an error for all prompts.
        return torch.where(is_finite[:, None], scores, 0.0)


@contextmanager
def _without_generation_defaults(language_model: CausalLM) -> Iterator[None]:
    """Hide the `generation_config.json` of a base model from `generate` of Transformers.

    Greedy search and sampling ignore that file (which may ban n-grams or tokens, or set `min_p`), so beam
    search must ignore it too. Passing a configuration is not enough: Transformers 5 fills its empty fields from
    the file.
    """
    owner = without_peft(language_model)
    defaults = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = defaults
