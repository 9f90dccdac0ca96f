"""Requests share the model: each joins the batch under way, wherever that is, and leaves it when it is answered.

    with worker.place() as place:                     # Busy where too many wait already
        await place.ask(turns, images, options)       # ValueError: what is wrong with the request
        async for piece in place:
            print(piece.text, end="")

All bookkeeping is done on one event loop, all work on the model in one thread of its own: neither needs a lock. Whoever
leaves the `with` early, because a client went away or its time is up, frees the rows for others.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, TypeVar

import torch

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

from llava_simplified.data.images import ImageSource
from llava_simplified.model.generation import DecodingBatch, encode_images
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.model.sampling import prompt_hashes
from llava_simplified.prompt import Message

T = TypeVar("T")
_READERS = 2  # threads that decode pictures: one of 50 megapixels takes 150 MB


class Busy(Exception):
    """All places are taken; `retry_after`: the seconds that an answer takes at present."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"all places are taken; try again in {retry_after} s")
        self.retry_after = retry_after


class Piece(NamedTuple):
    """What an answer goes on with.

    Attributes:
        sample: which of the `num_return_sequences` answers.
        text: the pieces of a sample, joined, are the text that `Llava.caption` gives.
        tokens: so many it has by now.
        finish: "" while it goes on, then "stop" (it has ended) or "length" (it had to).
    """

    sample: int
    text: str
    tokens: int
    finish: str


class Place:
    """One request, from before its body is read until its last piece is written."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._start = time.monotonic()
        self._pieces = asyncio.Queue[Piece | Exception]()
        self._said: dict[int, str] = {}  # sample -> text that has gone out
        self._stop: Sequence[str] = ()
        self.options = GenerationOptions()
        self.prompt: list[int] = []
        self.pixels: torch.Tensor | None = None
        self.key = b""
        self.prompt_tokens = 0
        self.closed = False

    def __enter__(self) -> Place:
        self._worker.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._worker.leave(self, time.monotonic() - self._start)

    @property
    def left(self) -> float:
        """Seconds until its time is up."""
        return self._start + self._worker.timeout - time.monotonic()

    def deadline(self) -> AbstractAsyncContextManager[Any]:
        """What is awaited within it raises TimeoutError when the time is up.

        Not `asyncio.wait_for`: before Python 3.12 that loses a cancellation which comes together with the result, and
        who has left would be answered to the end.
        """
        return timeout(self.left)

    async def ask(
        self,
        turns: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        options: GenerationOptions | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """Read the pictures and get in line.

        Args:
            turns, images: as `Llava.stream` takes them.
            options: one beam; as many sequences as a batch has rows at most.
            stop: texts before which an answer ends.

        Raises:
            ValueError: an image can't be read (ImageError), or the request asks for what can't be done.
            TimeoutError
        """
        self._stop = stop
        await self.read(turns, images, options)
        self._worker.enqueue(self)

    async def read(
        self,
        turns: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        options: GenerationOptions | None = None,
    ) -> None:
        """Decode the images and tokenize the conversation into `pixels` and `prompt`, without joining the queue.

        Arguments and exceptions are those of `ask`.
        """
        loop, worker = asyncio.get_running_loop(), self._worker
        self.options = options or self.options
        if self.options.num_beams > 1 or self.options.num_return_sequences > worker.batch_size:
            raise ValueError(f"one beam, and {worker.batch_size} answers at most, are decoded here")
        reading = loop.run_in_executor(worker.readers, self._read, turns, images)
        async with self.deadline():
            await reading

    def _read(self, turns: str | Sequence[Message], images: Sequence[ImageSource]) -> None:
        model, context = self._worker.model, self._worker.context
        if len(images) * model.vision_tower.num_tokens >= context:  # before they are decoded
            raise ValueError(
                f"{len(images)} pictures do not fit into the {context} tokens of the context"
            )
        self.prompt, self.pixels = model.prepare_inputs(turns, images)
        self.prompt_tokens = len(self.prompt) + len(images) * (model.vision_tower.num_tokens - 1)
        longest = self.prompt_tokens + self.options.max_new_tokens
        if not self.prompt or longest > context:
            raise ValueError(
                f"{self.prompt_tokens} tokens are asked, pictures included, and up to {self.options.max_new_tokens} "
                f"answered; together they may be {context}"
            )
        (self.key,) = prompt_hashes([self.prompt], self.pixels)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces of all samples, as they come.

        Raises:
            TimeoutError: the time is up.
            RuntimeError: the model failed.
        """
        going_on = self.options.num_return_sequences
        while going_on:
            async with self.deadline():
                piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise RuntimeError("the model failed") from piece
            going_on -= bool(piece.finish)
            yield piece

    def put(self, piece: Piece | Exception) -> None:
        self._pieces.put_nowait(piece)

    def go_on(self, sample: int, tokens: Sequence[int], live: bool) -> Piece:
        """What a sample says beyond what has gone out, now that it has these tokens."""
        prompt = self._worker.model.prompt
        text = prompt.decode(tokens).lstrip()
        end = min((at for word in self._stop if (at := text.find(word)) >= 0), default=-1)
        finish = "" if live else "stop" if tokens[-1] in prompt.stop_ids else "length"
        if end >= 0:
            text, finish = text[:end], "stop"
        elif live:
            # kept back: half a letter, white space that may be the last, and what may be the beginning of a stop
            text = text.rstrip("\ufffd")
            beginnings = (word[:size] for word in self._stop for size in range(1, len(word)))
            text = text[
                : len(text)
                - max((len(part) for part in beginnings if text.endswith(part)), default=0)
            ]
        text, said = text.rstrip(), self._said.get(sample, "")
        self._said[sample] = text
        return Piece(sample, text[len(said) :], len(tokens), finish)


class Worker:
    """Owns the model while it serves. Use as an async context manager, on the event loop of the requests.

    Args:
        batch_size: rows that are decoded at the same time.
        queue: requests beside these that may wait; more are refused.
        timeout: seconds that a request may take, its waiting included.
        context: tokens of prompt, pictures and answer together.

    Attributes:
        places: the requests under way.
        rows: row of the batch -> whose it is, and which sample.
    """

    def __init__(
        self,
        model: Llava,
        batch_size: int = 16,
        queue: int = 64,
        timeout: float = 120.0,
        context: int = 4096,
    ) -> None:
        self.model = model.eval()
        self.batch_size, self.queue, self.timeout = batch_size, queue, timeout
        self.context = min(context, getattr(model.config, "max_position_embeddings", context))
        self.places: set[Place] = set()
        self.rows: dict[int, tuple[Place, int]] = {}
        self.readers = ThreadPoolExecutor(_READERS, "pictures")
        self._thread = ThreadPoolExecutor(1, "model")
        self._decoding: DecodingBatch | None = None
        self._waiting = deque[Place]()
        self._wake = asyncio.Event()
        self._pace = 1.0  # seconds an answer, lately

    async def __aenter__(self) -> Worker:
        self._loop = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        for threads in (self._thread, self.readers):
            threads.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        return not self._loop.done()

    def place(self) -> Place:
        """A place for one request, to be entered with `with`; raises Busy there."""
        return Place(self)

    async def call(self, work: Callable[[Llava], T]) -> T:
        """Run anything else on the model, between two steps of the batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self.model)

    # ---- what a Place calls ----

    def enter(self, place: Place) -> None:
        if len(self.places) >= self.batch_size + self.queue:
            raise Busy(max(1, round(self._pace)))
        self.places.add(place)

    def enqueue(self, place: Place) -> None:
        self._waiting.append(place)
        self._wake.set()

    def leave(self, place: Place, seconds: float) -> None:
        self._pace += 0.1 * (seconds - self._pace)
        self.places.discard(place)
        self._wake.set()

    # ---- the batch ----

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            new = self._next()
            if not (new or self.rows):
                self._wake.clear()
                continue
            try:
                said = await loop.run_in_executor(self._thread, self._advance, new)
            except Exception as error:
                logging.getLogger(__name__).exception("the model failed")
                for failed in {*new, *(place for place, _ in self.rows.values())}:
                    failed.put(error)
                self.rows, self._decoding = {}, None
                continue
            for place, piece in said:
                place.put(piece)

    def _next(self) -> list[Place]:
        """Those who have waited longest, as many as the batch has room for."""
        new: list[Place] = []
        room = self.batch_size - sum(not place.closed for place, _ in self.rows.values())
        while self._waiting and (
            self._waiting[0].closed or self._waiting[0].options.num_return_sequences <= room
        ):
            place = self._waiting.popleft()
            if not place.closed:
                new.append(place)
                room -= place.options.num_return_sequences
        return new

    def _advance(self, new: Sequence[Place]) -> list[tuple[Place, Piece]]:
        """One token for everybody, in the model's thread; the new ones are let in first."""
        for row in [row for row, (place, _) in self.rows.items() if place.closed]:
            self._forget(row)
        if new:
            self._let_in(new)
        if self._decoding is None:
            return []
        said: list[tuple[Place, Piece]] = []
        for row, _ in self._decoding.step():
            place, sample = self.rows[row]
            piece = place.go_on(
                sample, self._decoding.generated_ids[row], row in self._decoding.active
            )
            if piece.finish:
                self._forget(row)
            if piece.text or piece.finish:
                said.append((place, piece))
        return said

    def _let_in(self, new: Sequence[Place]) -> None:
        pictures = [place.pixels for place in new if place.pixels is not None]
        features = encode_images(self.model, torch.cat(pictures)) if pictures else None
        prompts, options = [place.prompt for place in new], [place.options for place in new]
        keys = [place.key for place in new]
        if self._decoding is None:
            self._decoding = DecodingBatch(self.model, prompts, features, options, keys)
            rows: Iterable[int] = list(self._decoding.active)
        else:
            rows = self._decoding.join(prompts, features, options, keys)
        owners = [
            (place, sample) for place in new for sample in range(place.options.num_return_sequences)
        ]
        self.rows.update(zip(rows, owners))

    def _forget(self, row: int) -> None:
        assert self._decoding is not None
        self._decoding.cancel(row)
        del self._decoding.generated_ids[row], self.rows[row]
