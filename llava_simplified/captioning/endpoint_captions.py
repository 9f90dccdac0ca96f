"""Caption records with a model on a server: many requests in flight, rows in the order of the records.

    records --> workers: read image, shrink, base64 (threads) --> slots: requests in flight --> order --> rows

A slot is the permission to have one request in flight; there are `concurrency` slots and twice as many workers. While all
slots are in use, the other workers prepare the images of the next records, so that a free slot is used immediately.
Memory does not grow with the number of records: a finished record is dropped after it is yielded, and at most `WINDOW`
finished records per slot wait for an earlier one.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from llava_simplified.captioning.caption_rows import Row, failed_row, parse_record
from llava_simplified.captioning.endpoint_client import Choice, EndpointClient, RecordError
from llava_simplified.captioning.endpoint_options import EndpointOptions
from llava_simplified.data.image_folder import NameMatches
from llava_simplified.data.images import ImageError, portable_image, read_image_bytes
from llava_simplified.data.records import Record, prediction_row
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message
from llava_simplified.workers import count_cpus, event_loop

logger = logging.getLogger(__name__)

# Maximum number of finished records per slot that wait for an earlier, slower one. Each takes about a kilobyte.
WINDOW = 64

_MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png"}


def caption_at_endpoint(
    records: Sequence[Record],
    image_folder: str | Path,
    options: GenerationOptions,
    endpoint: EndpointOptions,
    indices: Sequence[int],
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Caption records, and yield the captions in the order of the records.

    Args:
        records: Records with instructions; responses are not needed.
        image_folder: Folder that the image names are relative to.
        options: Generation options.
        endpoint: The server.
        indices: Indices of the records to caption.

    Yields:
        Whenever the next records in order are done: their prediction rows, `num_return_sequences` per record, and one
        row with the reason for each record that cannot be captioned.

    Raises:
        EndpointError: The job cannot continue: a setting is wrong, the server is gone, or it failed too often.
        ValueError: An option cannot be expressed in a request.
    """
    # This raises ValueError for options that cannot be expressed in a request, before anything is sent.
    captioner = _EndpointCaptioner(records, image_folder, options, endpoint, indices)
    # The event loop runs only while this generator waits for the next rows. In between, the caller writes them.
    try:
        with event_loop(endpoint.concurrency) as loop:
            workers = loop.create_task(captioner.run_workers())
            while (rows := loop.run_until_complete(captioner.next_rows())) is not None:
                yield rows
            # If an error has stopped the workers, raise it here.
            loop.run_until_complete(workers)
    finally:
        captioner.close()
    captioner.log_summary()


class _Result(NamedTuple):
    """A record with its outcome: its captions, or why there are none."""

    position: int
    record: Record | ValueError
    outcome: list[Choice] | ValueError


class _EndpointCaptioner:
    """Runs the workers of one job, and returns their results in the order of the records."""

    def __init__(
        self,
        records: Sequence[Record],
        image_folder: str | Path,
        options: GenerationOptions,
        endpoint: EndpointOptions,
        indices: Sequence[int],
    ) -> None:
        self._records = records
        self._image_folder = image_folder
        self._endpoint = endpoint
        self._indices = indices
        self._client = EndpointClient(endpoint, options)
        self._matches = NameMatches()
        self._issue_counts: Counter[str] = Counter()
        # Threads can use all CPUs, because decoding releases Python's global interpreter lock.
        self._readers = ThreadPoolExecutor(count_cpus())
        # The results, in the order in which they finish; None after the last one.
        self._results: asyncio.Queue[_Result | None] = asyncio.Queue()
        # Limits how many results may wait for an earlier one.
        self._window = asyncio.Semaphore(WINDOW * endpoint.concurrency)
        self._positions = iter(range(len(indices)))
        # Position -> finished result that waits for an earlier one; and the position of the result to return next.
        self._waiting: dict[int, _Result] = {}
        self._next_position = 0

    def close(self) -> None:
        """Stop the threads."""
        self._readers.shutdown(cancel_futures=True)

    async def next_rows(self) -> tuple[list[Row], list[Row]] | None:
        """Return the rows of the next records in order, as soon as there are any; None at the end."""
        rows: list[Row] = []
        failed_rows: list[Row] = []
        while not rows and not failed_rows:
            result = await self._results.get()
            if result is None:
                return None
            # Results arrive in any order. Return all that have no gap before them.
            self._waiting[result.position] = result
            while self._next_position in self._waiting:
                self._add_rows(self._waiting.pop(self._next_position), rows, failed_rows)
                self._next_position += 1
                self._window.release()
        return rows, failed_rows

    def _add_rows(self, result: _Result, rows: list[Row], failed_rows: list[Row]) -> None:
        """Append the rows of one record."""
        index = self._indices[result.position]
        if isinstance(result.outcome, ValueError):
            row = failed_row(index, result.record, result.outcome)
            if isinstance(result.outcome, RecordError):
                # The next run retries the kinds that are the server's fault; see `SERVER_FAILURES`.
                row["kind"] = result.outcome.kind
            failed_rows.append(row)
            return
        assert isinstance(result.record, Record)  # for an error, the outcome is an error too
        for choice in result.outcome:
            row = prediction_row(index, result.record, choice.text)
            # Write the reason only if the text was cut. Rows of a local model have no reason, so leave out "stop".
            if choice.finish_reason == "length":
                row["finish_reason"] = "length"
                self._issue_counts["cut at --max-new-tokens"] += 1
            if not choice.text:
                self._issue_counts["empty"] += 1
            rows.append(row)

    # ---- workers ----

    async def run_workers(self) -> None:
        """Run all workers. When they have ended, put None into the result queue as the end marker.

        If an error stops the workers, the end marker is put there too, so that `next_rows` does not wait forever.
        """
        # Start two workers per slot; see the top of this module.
        count = min(2 * self._endpoint.concurrency, len(self._indices))
        tasks: list[asyncio.Task[None]] = []
        try:
            async with self._client:
                try:
                    tasks += [asyncio.create_task(self._work()) for _ in range(count)]
                    await asyncio.gather(*tasks)
                finally:
                    # If one worker fails, cancel the others.
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._results.put_nowait(None)

    async def _work(self) -> None:
        """Caption one record after the other."""
        while True:
            # Acquire a place in the window before choosing a record. In the other order, this worker could choose the
            # record that all finished ones wait for, and then wait for a place that only this record can free.
            await self._window.acquire()
            position = next(self._positions, None)
            if position is None:
                self._window.release()
                return
            self._results.put_nowait(await self._caption(position))

    async def _caption(self, position: int) -> _Result:
        """Caption one record. An error that concerns only this record is returned as its outcome."""
        # Parse in the event loop's thread, because record files are not thread-safe.
        record = parse_record(self._records, self._indices[position])
        if isinstance(record, ValueError):
            return _Result(position, record, record)
        loop = asyncio.get_running_loop()
        try:
            messages = await loop.run_in_executor(self._readers, self._messages, record)
            return _Result(position, record, await self._client.complete(messages))
        # These errors concern one record. An EndpointError is not caught, because it stops the job.
        except (RecordError, ImageError) as error:
            return _Result(position, record, error)

    # ---- messages ----

    def _messages(self, record: Record) -> list[dict[str, Any]]:
        """Return the conversation of a record as the messages of a request.

        Raises:
            ImageError: An image cannot be read.
        """
        # The images of all turns are in one list, in the order of their placeholders.
        images = iter(record.images)
        return [self._message(turn, images) for turn in record.turns]

    def _message(self, turn: Message, images: Iterator[str]) -> dict[str, Any]:
        """Return one turn as a message, with the images at their placeholders as data URLs."""
        # Only user turns contain images. Elsewhere, the placeholder is ordinary text.
        if turn.role != "user" or IMAGE_PLACEHOLDER not in turn.content:
            return {"role": turn.role, "content": turn.content}
        parts: list[dict[str, Any]] = []
        # Split the text at the placeholders: an image precedes every part but the first. Line breaks next to a
        # placeholder belong to it, and are not sent.
        texts = turn.content.split(IMAGE_PLACEHOLDER)
        for number, text in enumerate(texts):
            if number > 0:
                url = self._data_url(next(images))
                parts.append({"type": "image_url", "image_url": {"url": url}})
                text = text.removeprefix("\n")
            if number < len(texts) - 1:
                text = text.removesuffix("\n")
            if text.strip():
                parts.append({"type": "text", "text": text})
        return {"role": turn.role, "content": parts}

    def _data_url(self, name: str) -> str:
        """Return an image as a data URL, shrunk to `max_side`."""
        data = read_image_bytes(name, self._image_folder, self._matches)
        # Decode it as strictly as for a local model, so that no damaged image is sent.
        image = portable_image(data, self._endpoint.max_side)
        encoded = base64.b64encode(image.data).decode("ascii")
        return f"data:{_MEDIA_TYPES[image.suffix]};base64,{encoded}"

    # ---- summary ----

    def log_summary(self) -> None:
        """Log the numbers of incomplete, empty and failed captions, and of images that were found under other names."""
        if self._matches.describe():
            logger.warning("%s", self._matches.describe())
        counts = self._issue_counts + self._client.failures
        if counts:
            described = ", ".join(f"{count:,} x {name}" for name, count in sorted(counts.items()))
            logger.warning("Incomplete, empty or failed captions: %s.", described)
