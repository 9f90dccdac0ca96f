"""Continuous batching: requests join and leave one running batch between two decoding steps.

    request A    P D D D D D D D            P  prefill: prompt and images -> KV cache and first logits
    request B        P D D x                D  decode: one token for every running sequence
    request C    . . . . . . P D D D D      .  waiting: the batch is full
                -----------------------> t  x  evicted: the client has disconnected

A request does not wait for the batch to finish: it is admitted before the next step, at whatever position
the other sequences are. When a sequence finishes, or its client disconnects, the next request can join.

    with engine.open_request() as request:               # QueueFullError
        await request.submit(messages, images, options)  # RequestError, ImageError, TimeoutError
        async for delta in request:                      # RuntimeError, TimeoutError
            print(delta.text, end="")
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

from llava_simplified.data.images import ImageError, ImageSource
from llava_simplified.model.generation import (
    DecodingBatch,
    count_prompt_tokens,
    encode_images,
    limit_new_tokens,
    max_context_of,
)
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.model.openmp import use_all_threads, use_one_thread
from llava_simplified.model.sampling import prompt_hashes
from llava_simplified.prompt import Message

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Number of threads that decode images. They share one budget of pixels (see `data.pixel_budget`). While one thread
# decodes a very large image and another one waits for its turn, the others still decode ordinary images.
_READER_THREADS = 4
# An upper bound that holds for any tokenizer: in natural languages, a token has 1 to 5 characters on average.
_MAX_CHARACTERS_PER_TOKEN = 32


class QueueFullError(Exception):
    """Too many requests are in flight.

    Attributes:
        retry_after: Suggested seconds until a retry, the average duration of recent requests.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The queue is full. Retry in {retry_after} s.")
        self.retry_after = retry_after


class RequestError(ValueError):
    """An invalid request.

    Attributes:
        param: The invalid field of the request, for example "messages[0].content".
        code: A short, stable identifier of the problem, for example "too_many_images".
        status: HTTP status code.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


# This is a dataclass, because in a NamedTuple the field `index` would hide the method `tuple.index`.
@dataclass(frozen=True)
class Delta:
    """New text of one sequence.

    Attributes:
        index: Index of the sequence among the request's `num_return_sequences` sequences.
        text: The new text. The deltas of a sequence, joined, are its complete answer.
        num_tokens: Number of tokens of the sequence so far.
        finish_reason: None while the sequence continues, else "stop" (an end token or a stop string) or
            "length" (`max_new_tokens`).
    """

    index: int
    text: str
    num_tokens: int
    finish_reason: str | None


@dataclass(frozen=True)
class RunningSequence:
    """A sequence in the batch: its request, and its index among the sequences of that request."""

    request: RequestHandle
    index: int


class RequestHandle:
    """One request. It is in flight while its `with` block runs.

    Attributes:
        options: Generation options.
        prompt: Token ids, with one IMAGE_INDEX per image.
        pixel_values: uint8 (images, 3, height, width), or None without images.
        prompt_hash: Hash of prompt and images, from which random numbers are derived.
        prompt_tokens: Number of tokens of the prompt, including all image tokens.
        is_closed: Whether the `with` block has ended, so that no more of the answer is needed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._start_time = time.monotonic()
        # The queue needs no bound, because an answer has at most `max_new_tokens` deltas. With a bound, the engine
        # would have to wait for slow clients.
        self._deltas = asyncio.Queue[Delta | Exception]()
        self._sent: dict[int, str] = {}  # sequence index -> text sent so far
        self._stop_strings: Sequence[str] = ()
        self.options = GenerationOptions()
        self.prompt: list[int] = []
        self.pixel_values: torch.Tensor | None = None
        self.prompt_hash = b""
        self.prompt_tokens = 0
        self.is_closed = False

    def __enter__(self) -> RequestHandle:
        self._engine.register(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True
        self._engine.unregister(self)

    @property
    def seconds_elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._start_time

    @property
    def seconds_left(self) -> float:
        """Seconds until the request times out."""
        return self._engine.timeout - self.seconds_elapsed

    def deadline(self) -> AbstractAsyncContextManager[Any]:
        """Return a context in which awaiting raises TimeoutError when the request times out.

        Do not use `asyncio.wait_for` instead: before Python 3.12 it loses a cancellation that arrives
        together with the result, and the answer of a disconnected client would be generated to the end.
        """
        return timeout(self.seconds_left)

    async def submit(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        options: GenerationOptions | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """Prepare the request and append it to the queue.

        Args:
            messages: A question or a conversation, as for `Llava.stream`.
            images: One per `<image>` in the messages.
            options: Options with one beam, and at most `batch_size` sequences. If `max_new_tokens` do not fit into
                the context, the number is lowered; `self.options` contains the lowered number.
            stop: Stop strings, which end an answer and are not part of it.

        Raises:
            ImageError: An image cannot be read.
            RequestError: The request exceeds a limit of the engine, or its messages are invalid.
            TimeoutError: The request timed out.
        """
        self._stop_strings = stop
        options = options or self.options
        await self.prepare(messages, images, options, answer_tokens=1)
        remaining = self._engine.max_context - self.prompt_tokens
        self.options = limit_new_tokens(options, remaining)
        self._engine.enqueue(self)

    async def prepare(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        options: GenerationOptions | None = None,
        answer_tokens: int = 1,
    ) -> None:
        """Set `prompt`, `pixel_values` and `options`, without joining the queue.

        Args:
            messages: See `submit`.
            images: See `submit`.
            options: See `submit`.
            answer_tokens: Number of tokens that must fit into the context after the prompt.

        Raises:
            ImageError, RequestError, TimeoutError: See `submit`.
        """
        engine = self._engine
        self.options = options or self.options
        if self.options.num_beams > 1:
            raise RequestError("Beam search is not supported by the server.", param="num_beams")
        if self.options.num_return_sequences > engine.batch_size:
            raise RequestError(
                f"n: {self.options.num_return_sequences} answers were requested, but the server "
                f"generates at most {engine.batch_size} at a time.",
                param="n",
            )
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(
            engine.reader_threads, self._prepare, messages, images, answer_tokens
        )
        async with self.deadline():
            await reading

    def _prepare(
        self,
        messages: str | Sequence[Message],
        images: Sequence[ImageSource],
        answer_tokens: int,
    ) -> None:
        """Decode the images and tokenize the messages, in a reader thread."""
        model = self._engine.model
        max_context = self._engine.max_context
        tokens_per_image = model.vision_tower.num_tokens
        # Tokenizing messages and decoding images is expensive, so reject requests that are much too long beforehand.
        contents = [messages] if isinstance(messages, str) else [m.content for m in messages]
        num_characters = sum(map(len, contents))
        max_characters = _MAX_CHARACTERS_PER_TOKEN * max_context
        if num_characters > max_characters:
            raise RequestError(
                f"The messages have {num_characters} characters. The maximum is {max_characters}, for a "
                f"context of {max_context} tokens. Shorten the conversation.",
                param="messages",
                code="context_length_exceeded",
            )
        if len(images) * tokens_per_image >= max_context:
            raise RequestError(
                f"{len(images)} images of {tokens_per_image} tokens each exceed the context of "
                f"{max_context} tokens. Send fewer images.",
                param="messages",
                code="context_length_exceeded",
            )
        try:
            self.prompt, self.pixel_values = model.prepare_inputs(messages, images)
        except ImageError:
            raise
        except ValueError as error:
            raise RequestError(str(error), param="messages") from None
        self.prompt_tokens = count_prompt_tokens(model, self.prompt)
        if not self.prompt:
            raise RequestError("The prompt is empty.", param="messages")
        if self.prompt_tokens + answer_tokens > max_context:
            raise RequestError(
                f"The prompt has {self.prompt_tokens} tokens (images included) and the answer at least "
                f"{answer_tokens}, but the context has only {max_context} tokens. Shorten the conversation.",
                param="messages",
                code="context_length_exceeded",
            )
        (self.prompt_hash,) = prompt_hashes([self.prompt], self.pixel_values)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield the deltas of all sequences as they are generated.

        Raises:
            TimeoutError: The request timed out.
            RuntimeError: The model failed.
        """
        unfinished = self.options.num_return_sequences
        while unfinished:
            async with self.deadline():
                delta = await self._deltas.get()
            if isinstance(delta, Exception):
                raise RuntimeError("The model failed to generate an answer.") from delta
            if delta.finish_reason:
                unfinished -= 1
            yield delta

    def put(self, delta: Delta | Exception) -> None:
        """Add a delta, or the exception that ends the request. Call this on the event loop."""
        self._deltas.put_nowait(delta)

    def next_delta(self, index: int, token_ids: Sequence[int], is_active: bool) -> Delta:
        """Return the text that was added to a sequence since its last delta.

        All tokens are decoded again, because the text of a token depends on the previous ones.

        Args:
            index: Index of the sequence.
            token_ids: All generated tokens of the sequence.
            is_active: Whether more tokens will follow.
        """
        prompt = self._engine.model.prompt
        text = prompt.decode(token_ids, finished=not is_active).lstrip()
        finish_reason: str | None = None
        if not is_active:
            finish_reason = "stop" if token_ids[-1] in prompt.stop_ids else "length"
        # Search the whole text, because a stop string may consist of parts of several tokens.
        stop_position = _find_first(text, self._stop_strings)
        if stop_position is not None:
            text = text[:stop_position]
            finish_reason = "stop"
        elif is_active:
            text = _remove_partial_stop_string(text, self._stop_strings)
        # Hold back whitespace at the end until more text follows: it is not part of an answer that ends here.
        text = text.rstrip()
        sent = self._sent.get(index, "")
        self._sent[index] = text
        return Delta(index, text[len(sent) :], len(token_ids), finish_reason)


def _find_first(text: str, stop: Sequence[str]) -> int | None:
    """Return the position of the first stop string in `text`, or None."""
    positions = [text.find(stop_string) for stop_string in stop]
    found = [position for position in positions if position >= 0]
    return min(found, default=None)


def _remove_partial_stop_string(text: str, stop: Sequence[str]) -> str:
    """Remove the end of a text if a stop string could begin there.

    The removed characters are sent later if the next tokens do not complete the stop string. They must wait, because
    text that has been sent cannot be taken back.
    """
    longest = 0
    for stop_string in stop:
        for length in range(1, len(stop_string)):
            if text.endswith(stop_string[:length]):
                longest = max(longest, length)
    return text[: len(text) - longest]


# How a step works. Two threads alternate: while the model thread runs a step, the event loop serves HTTP
# and does not access the batch, so no lock is needed.
#
#     event loop                                  model thread, the only one that uses the model
#     ----------                                  ----------------------------------------------
#     RequestHandle.submit: decode the images
#     (reader threads), append to the queue
#     Engine._next_requests: those that fit ----> Engine._step
#                                                   1. evict the sequences of closed requests
#                                                   2. admit the new requests: encode images, prefill
#                                                   3. DecodingBatch.step: one token per sequence
#     `async for delta in request` <------------    4. read the new text; evict finished sequences
#
# Admission. The queue is first in, first out. A request with `num_return_sequences` = n is admitted when n
# sequences of the batch are free. Later requests wait until then, because small requests could otherwise
# overtake a large one forever. All requests that are admitted in one step are prefilled together, in one forward
# pass. Running sequences wait for this pass and then continue: a long prompt delays their next token, but has no
# other effect.
#
# Independence. Every sequence has its own rows in the KV cache and in the attention mask, its own position
# ids and generation options, and a random generator seeded from its seed and its prompt. Padding is masked.
# The answer is therefore the same as without other sequences in the batch.
#
# Failure. If the logits of one sequence are not finite, or if choosing or decoding its token raises, only
# its request fails. If a forward pass raises (out of memory, for example), all requests of the batch fail,
# and the next requests start a new batch.
#
# Deadlines and back-pressure. A request has `timeout` seconds from its arrival, including the wait. At most
# `batch_size + max_queue` requests are in flight; more are rejected with QueueFullError. Leaving the `with` block
# in any way closes the request, and the next step evicts its sequences.


class Engine:
    """Generates the answers of all requests with one model.

    Use it as an async context manager, on the event loop of the requests.

    Args:
        model: The model. Only the engine may use it.
        batch_size: Maximum number of sequences in the batch.
        max_queue: Maximum number of waiting requests.
        timeout: Maximum duration of a request in seconds, including the wait.
        max_context: Maximum number of tokens of prompt, images and answer together; limited by the
            model's `max_position_embeddings`.

    Attributes:
        requests_in_flight: The open requests, which are being read, waiting or running.
        sequences_running: Id of a sequence in the batch -> the sequence. Sequences of closed requests remain
            until the next step evicts them.
        reader_threads: Executor for CPU work that does not use the language model.
    """

    def __init__(
        self,
        model: Llava,
        batch_size: int = 16,
        max_queue: int = 64,
        timeout: float = 120.0,
        max_context: int = 4096,
    ) -> None:
        self.model = model.eval()  # dropout would make answers random
        self.batch_size = batch_size
        self.max_queue = max_queue
        self.timeout = timeout
        self.max_context = min(max_context, max_context_of(model) or max_context)
        self.requests_in_flight: set[RequestHandle] = set()
        self.sequences_running: dict[int, RunningSequence] = {}
        self.reader_threads = ThreadPoolExecutor(_READER_THREADS, "reader", use_one_thread)
        self._model_thread = ThreadPoolExecutor(1, "model", use_all_threads)
        self._batch: DecodingBatch | None = None
        self._waiting = deque[RequestHandle]()
        self._has_work = asyncio.Event()
        self._seconds_per_request = 1.0  # exponential moving average

    async def __aenter__(self) -> Engine:
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        # Cancelling the loop does not interrupt a running step. The shutdown of the model thread waits for it.
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)
        for threads in (self._model_thread, self.reader_threads):
            threads.shutdown(cancel_futures=True)

    @property
    def is_running(self) -> bool:
        """Whether the engine's loop is running."""
        return not self._loop_task.done()

    def open_request(self) -> RequestHandle:
        """Return a handle for one request. Use it with `with`, which raises QueueFullError if the queue is full."""
        return RequestHandle(self)

    async def run_on_model(self, work: Callable[[Llava], T]) -> T:
        """Run a function with the model, between two steps of the batch."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._model_thread, work, self.model)

    # ---- called by RequestHandle, on the event loop ----

    def register(self, request: RequestHandle) -> None:
        """Count a request as in flight.

        Raises:
            QueueFullError: `batch_size + max_queue` requests are in flight already.
        """
        if len(self.requests_in_flight) >= self.batch_size + self.max_queue:
            raise QueueFullError(max(1, round(self._seconds_per_request)))
        self.requests_in_flight.add(request)

    def enqueue(self, request: RequestHandle) -> None:
        """Append a prepared request to the queue."""
        self._waiting.append(request)
        self._has_work.set()

    def unregister(self, request: RequestHandle) -> None:
        """Remove a closed request, also from the queue. The next step evicts its sequences."""
        # The queue would otherwise keep the pixels of closed requests, and grow without limit, while its first request
        # waits. An admitted request is no longer in the queue. Keep its pixels: the model thread may be reading them.
        if request in self._waiting:
            self._waiting.remove(request)
            request.pixel_values = None
        # Update the moving average, from which `register` computes when to retry.
        self._seconds_per_request += 0.1 * (request.seconds_elapsed - self._seconds_per_request)
        self.requests_in_flight.discard(request)
        self._has_work.set()

    # ---- the loop, on the event loop ----

    async def _run(self) -> None:
        """Run steps as long as there is work."""
        loop = asyncio.get_running_loop()
        while True:
            await self._has_work.wait()
            admitted = self._next_requests()
            if not admitted and not self.sequences_running:
                # Nothing may be awaited between the check above and this line. Otherwise, a request that arrives
                # in between would set the event before it is cleared, and wait forever.
                self._has_work.clear()
                continue
            try:
                deltas = await loop.run_in_executor(self._model_thread, self._step, admitted)
            except Exception as error:
                logger.exception("The model failed. All requests in the batch end with an error.")
                self._fail_batch(admitted, error)
                continue
            for request, delta in deltas:
                request.put(delta)

    def _next_requests(self) -> list[RequestHandle]:
        """Remove from the queue the requests that the next step admits, and return them, oldest first."""
        # Sequences of closed requests count as free, because the step evicts them before it admits new requests.
        sequences = self.sequences_running.values()
        occupied = [sequence for sequence in sequences if not sequence.request.is_closed]
        free = self.batch_size - len(occupied)
        admitted: list[RequestHandle] = []
        while self._waiting:
            request = self._waiting[0]
            if request.options.num_return_sequences > free:
                break
            free -= request.options.num_return_sequences
            admitted.append(self._waiting.popleft())
        return admitted

    def _fail_batch(self, admitted: Sequence[RequestHandle], error: Exception) -> None:
        """End all requests of a failed step with an error, and discard the batch."""
        running = [sequence.request for sequence in self.sequences_running.values()]
        for request in {*admitted, *running}:
            request.put(error)
        # Discard the batch, because a failed forward pass leaves the KV cache in an undefined state.
        self.sequences_running = {}
        self._batch = None

    # ---- one step, on the model thread ----

    def _step(
        self, admitted: Sequence[RequestHandle]
    ) -> list[tuple[RequestHandle, Delta | Exception]]:
        """Generate one token for every running sequence, after admitting new requests.

        Returns:
            Deltas and errors, each with its request.
        """
        # Evict before admitting, because `_next_requests` counted the sequences of closed requests as free.
        for sequence_id, sequence in list(self.sequences_running.items()):
            if sequence.request.is_closed:
                self._evict(sequence_id)
        if admitted:
            self._admit(admitted)
        if self._batch is None:
            return []

        self._batch.step()
        results: list[tuple[RequestHandle, Delta | Exception]] = []
        for sequence_id, sequence in list(self.sequences_running.items()):
            # This sequence may have been evicted in an earlier iteration, with a failed sequence of its request.
            if sequence_id not in self.sequences_running:
                continue
            try:
                delta = self._read_delta(sequence_id, sequence)
            except Exception as error:
                logger.exception("A sequence failed. Only its request ends with an error.")
                self._evict_request(sequence.request)
                results.append((sequence.request, error))
                continue
            if delta.finish_reason:
                self._evict(sequence_id)
            # The text is empty while a character is incomplete, or while a stop string could begin at the end.
            if delta.text or delta.finish_reason:
                results.append((sequence.request, delta))
        return results

    def _read_delta(self, sequence_id: int, sequence: RunningSequence) -> Delta:
        """Return the delta of a sequence after a step, or raise its error."""
        assert self._batch is not None
        if sequence_id in self._batch.errors:
            raise self._batch.errors[sequence_id]
        is_active = sequence_id in self._batch.active
        return sequence.request.next_delta(
            sequence.index, self._batch.generated_ids[sequence_id], is_active
        )

    def _admit(self, requests: Sequence[RequestHandle]) -> None:
        """Encode the images of new requests, prefill their prompts, and add their sequences to the batch."""
        pixel_values = [
            request.pixel_values for request in requests if request.pixel_values is not None
        ]
        features = encode_images(self.model, torch.cat(pixel_values)) if pixel_values else None
        prompts = [request.prompt for request in requests]
        options = [request.options for request in requests]
        hashes = [request.prompt_hash for request in requests]
        if self._batch is None:
            self._batch = DecodingBatch(self.model, prompts, features, options, hashes)
            ids = list(self._batch.active)
        else:
            ids = self._batch.join(prompts, features, options, hashes)
        # The sequence ids are in the order of the requests, and the ids of one request are consecutive.
        sequences = [
            RunningSequence(request, index)
            for request in requests
            for index in range(request.options.num_return_sequences)
        ]
        self.sequences_running.update(zip(ids, sequences))

    def _evict(self, sequence_id: int) -> None:
        """Remove a finished or running sequence from the batch."""
        assert self._batch is not None
        # `cancel` keeps the tokens and the error of a sequence for the caller. Delete them, or they would stay in
        # memory as long as the batch exists.
        self._batch.cancel(sequence_id)
        del self._batch.generated_ids[sequence_id], self.sequences_running[sequence_id]
        self._batch.errors.pop(sequence_id, None)

    def _evict_request(self, request: RequestHandle) -> None:
        """Remove all sequences of a request from the batch."""
        for sequence_id, sequence in list(self.sequences_running.items()):
            if sequence.request is request:
                self._evict(sequence_id)
