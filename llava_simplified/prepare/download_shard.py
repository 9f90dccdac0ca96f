"""Fetch one shard of a download, and resume it after the process was killed.

An unfinished shard consists of three files in the work folder:

    00012.plan       the rows of the shard: JSON lines with index, URL and captions
    00012.tar.part   the incomplete tar
    00012.journal    one JSON line per finished row

The journal line of a row is written after its image is in the tar. Whenever the process is killed, the journal therefore
contains exactly the finished rows:

    fetch image -> append to tar -> append to journal
                                 ^ killed here: the sample is in the tar, but not in the journal. The next run truncates
                                   the tar after the last sample in the journal, and fetches the row again.

After the last row, the journal is converted to the manifest, and tar and manifest are renamed into the output: first the
tar, then the manifest, whose existence means that the shard is finished.
"""

from __future__ import annotations

import asyncio.sslproto
import gc
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from llava_simplified.data.shards import END_OF_ARCHIVE, ShardWriter
from llava_simplified.jobs import (
    Journal,
    atomic_file,
    encode_json_lines,
    exclusive_lock,
    read_json_lines,
    remove_temporary_files,
)
from llava_simplified.prepare.download_store import Store
from llava_simplified.prepare.fetch import FetchResult
from llava_simplified.prepare.fetch_hosts import fetch_all
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prepare.record_writer import image_file_name
from llava_simplified.process_memory import return_freed_blocks
from llava_simplified.workers import event_loop

PLAN_COLUMNS = {"index": pa.int64(), "url": pa.string(), "captions": pa.list_(pa.string())}
MANIFEST_SCHEMA = pa.schema(
    {
        **PLAN_COLUMNS,
        "key": pa.string(),  # key of the sample in the tar
        "status": pa.string(),  # ok or failed
        "error": pa.string(),  # the kind of failure: timeout, dns, http_404, html, truncated, opt_out, ...
        "detail": pa.string(),
        "http": pa.int16(),  # status code; 0 without a response
        "sha256": pa.string(),  # digest of the stored image file
        "bytes": pa.int64(),  # size of the image file as received
        "width": pa.int32(),
        "height": pa.int32(),
        "file": pa.string(),  # name of the stored image file
        "offset": pa.int64(),  # position of the image file in the tar
        "length": pa.int32(),  # size of the stored image file
        "seconds": pa.float32(),  # duration of the fetch
        "at": pa.float64(),  # Unix time at which the row was finished
    }
)
_OUTCOME_COLUMNS = MANIFEST_SCHEMA.names[len(PLAN_COLUMNS) :]
_SAMPLE_COLUMNS = ("key", "sha256", "width", "height")  # columns that are also in a sample's .json
# Index of a journal line that is not a row: it contains the end of the samples in a reopened tar.
_END_MARK = -1
_SPARE_FILES = 64  # open files in addition to connections
_RETURNED_BLOCK_BYTES = 4_000_000  # see `return_freed_blocks`
_TLS_BUFFER_BYTES = 1 << 14  # the size of a TLS record


@dataclass(frozen=True)
class ShardSpec:
    """A task of a worker: fetch one shard.

    Attributes:
        number: Number of the shard.
        output: Output folder or URL of the download.
        files: Write plain files instead of a tar.
        retry: Kinds of failures to fetch again.
        options: Options of the requests.
    """

    number: int
    output: str
    files: bool
    retry: tuple[str, ...]
    options: FetchOptions

    @property
    def name(self) -> str:
        """File name of the shard without suffix."""
        return f"{self.number:05d}"


def fetch_shard(spec: ShardSpec) -> dict[str, int]:
    """Fetch the missing rows of a shard. Of a finished shard, fetch again the failures that `spec.retry` names.

    Returns:
        The number of rows by outcome: "ok" or a kind of failure.

    Raises:
        ValueError: Another process is fetching this shard, or the limit of open files is too low.
    """
    _prepare_process(spec.options)
    store = Store(spec.output)
    lock = store.work / f"{spec.name}.lock"
    with exclusive_lock(lock, f"{spec.output}, shard {spec.name}"):
        return _ShardJob(spec, store).run()


class _ShardJob:
    """The files of one shard, and the steps to finish it. The caller must hold the lock of the shard."""

    def __init__(self, spec: ShardSpec, store: Store) -> None:
        self.spec = spec
        self.store = store
        self.plan = store.work / f"{spec.name}.plan"
        self.journal = store.work / f"{spec.name}.journal"
        self.tar = store.work / f"{spec.name}.tar.part"
        self.tar_name = f"{spec.name}.tar"
        self.manifest_name = f"{spec.name}.parquet"

    def run(self) -> dict[str, int]:
        """Fetch the missing rows, and publish the shard."""
        finished: list[dict[str, Any]] | None = None
        if self.store.exists(self.manifest_name):
            finished = self.store.read_manifest(self.manifest_name).to_pylist()
        # If there are both a journal and a manifest, an earlier run was killed during a retry, or before it deleted the
        # journal: continue it below.
        if finished is not None and not self.journal.exists():
            kept = [row for row in finished if not self._is_retried(row)]
            if len(kept) == len(finished):
                return count_outcomes(finished)
            self._reopen_journal(kept)
        rows = finished
        if rows is None:
            rows = [row for row, _ in read_json_lines(self.plan)]
        # The rows of a finished shard come from its manifest, which has more columns than the plan.
        planned = [{name: row[name] for name in PLAN_COLUMNS} for row in rows]
        outcomes = self._fetch_missing(planned)
        # Write the manifest in the order of the plan, although rows finish in any order.
        self._publish_manifest([{**outcomes[row["index"]], **row} for row in planned])
        # Delete these files last. The shard is finished when its manifest exists.
        self.plan.unlink(missing_ok=True)
        self.journal.unlink()
        return count_outcomes(outcomes.values())

    def _is_retried(self, row: dict[str, Any]) -> bool:
        """Return whether a row has failed with a kind of failure that `--retry` names."""
        return matches_kind(row["error"], self.spec.retry)

    def _reopen_journal(self, kept: list[dict[str, Any]]) -> None:
        """Create a journal for a finished shard, with the rows that are not fetched again."""
        rows: list[dict[str, Any]] = []
        for row in kept:
            line = {name: row[name] for name in row if name not in ("url", "captions")}
            # `DownloadProgress` does not count these rows as rows of this run.
            rows.append({**line, "kept": True})
        if not self.spec.files:
            # Append new samples after the old ones, overwriting the end-of-archive mark.
            tar_size = self.store.fs.size(self.store.path(self.tar_name))
            if tar_size > len(END_OF_ARCHIVE):
                rows.append({"index": _END_MARK, "end": tar_size - len(END_OF_ARCHIVE)})
        remove_temporary_files(self.journal)
        with atomic_file(self.journal) as part:
            part.write_bytes(encode_json_lines(rows))

    def _fetch_missing(self, planned: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Fetch the rows that are not in the journal, and return the outcome of every row by its index."""
        if not self.spec.files and not self.tar.exists() and self.store.exists(self.tar_name):
            # Continue a published tar: to retry failures, or because the process was killed between
            # publishing the tar and the manifest.
            self.store.fetch(self.tar_name, self.tar)
        tar_size = self.tar.stat().st_size if self.tar.exists() else 0
        with Journal(self.journal) as journal:
            # The writer truncates the tar at `end`: what follows is not in the journal.
            recorded, end = finished_rows(journal.rows(), tar_size)
            outcomes = {index: row for index, row in recorded.items() if not self._is_retried(row)}
            missing = [row for row in planned if row["index"] not in outcomes]
            writer = None if self.spec.files else ShardWriter(self.tar, end)
            # Fetch the missing rows. Each one is added to `outcomes` when it finishes.
            with event_loop(self.spec.options.concurrency) as loop:
                loop.run_until_complete(self._fetch_rows(missing, journal, writer, outcomes))
        # Close the tar before publishing it, because `close` syncs it to the disk.
        if writer:
            writer.close()
            self.store.publish(self.tar, self.tar_name)
        return outcomes

    async def _fetch_rows(
        self,
        rows: list[dict[str, Any]],
        journal: Journal,
        writer: ShardWriter | None,
        outcomes: dict[int, dict[str, Any]],
    ) -> None:
        """Fetch rows. Store each image, then append its line to the journal."""
        captions = {row["index"]: tuple(row["captions"]) for row in rows}
        urls = [(row["index"], row["url"]) for row in rows]
        async for index, url, fetched in fetch_all(urls, self.spec.options):
            outcome = make_outcome(index, fetched)
            # 0 means that the row added nothing to the tar.
            end = 0
            if fetched.image is not None:
                data, suffix = fetched.image.data, fetched.image.suffix
                if writer is None:
                    # `image_file_name` always ends with ".jpg". Use the suffix of the downloaded format instead.
                    stem = image_file_name(index, url).removesuffix(".jpg")
                    outcome["file"] = f"{stem}.{suffix}"
                    self._write_file(data, outcome["file"])
                else:
                    key = outcome["key"]
                    metadata = {"url": url, "captions": captions[index]}
                    metadata.update({name: outcome[name] for name in _SAMPLE_COLUMNS})
                    outcome["file"] = f"{key}.{suffix}"
                    outcome["offset"] = writer.add(key, data, suffix, captions[index], metadata)
                    end = writer.end
            # Add the row to the journal only now that its image is stored.
            outcomes[index] = outcome
            journal.append([{**outcome, "end": end}])

    def _write_file(self, data: bytes, name: str) -> None:
        """Write an image as a plain file, atomically."""
        # Put the temporary file into the work folder, so that a killed process leaves none among the images.
        part = self.store.work / f"{self.spec.name}.image"
        part.write_bytes(data)
        part.replace(Path(self.store.root, "images", name))

    def _publish_manifest(self, rows: list[dict[str, Any]]) -> None:
        """Write the manifest in the work folder, and move it into the output."""
        local = self.store.work / self.manifest_name
        pq.write_table(_manifest_table(rows), local, compression="zstd")
        self.store.publish(local, self.manifest_name)


def _prepare_process(options: FetchOptions) -> None:
    """Prepare this process for many connections. Only worker processes of a download call this."""
    # Reduce the buffer of each connection; asyncio's default is 16 times as large.
    asyncio.sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES
    # Collect garbage less often: with the default thresholds, it takes a tenth of the run time.
    gc.set_threshold(20_000, 50)
    # Return freed memory to the system. Otherwise, each decoding thread would keep the memory of its largest image.
    return_freed_blocks(_RETURNED_BLOCK_BYTES)
    # Allow two files per request: its connection, and possibly an older one that is being closed.
    _raise_file_limit(2 * options.concurrency + _SPARE_FILES)


def _raise_file_limit(count: int) -> None:
    """Raise the limit of open files to `count`, because every connection is an open file.

    With a limit that is too low, connections that cannot be opened would be recorded as failures of the servers.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_limit >= count:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard_limit))
    except ValueError:
        raise ValueError(
            f"--concurrency: {count} open files are required, but the limit is {hard_limit} (ulimit -Hn). "
            f"Pass --concurrency {max(1, (hard_limit - _SPARE_FILES) // 2)} or less."
        ) from None


def make_outcome(index: int, fetched: FetchResult) -> dict[str, Any]:
    """Return the columns of the manifest that describe the outcome of a row.

    "file" and "offset" are None, because the image is not stored yet.
    """
    outcome: dict[str, Any] = dict.fromkeys(_OUTCOME_COLUMNS)
    outcome.update(
        index=index,
        key=f"{index:09d}",
        status="failed",
        error=fetched.kind,
        detail=fetched.detail,
        http=fetched.http,
        bytes=fetched.received,
        seconds=round(fetched.seconds, 3),
        at=round(time.time(), 2),
    )
    image = fetched.image
    if image is not None:
        outcome.update(
            status="ok",
            error=None,
            sha256=hashlib.sha256(image.data).hexdigest(),
            width=image.width,
            height=image.height,
            length=len(image.data),
        )
    return outcome


def finished_rows(
    rows: Iterable[dict[str, Any]], tar_size: int
) -> tuple[dict[int, dict[str, Any]], int]:
    """Find the finished rows in the journal of a shard.

    If the machine went down, the disk may have lost the end of the tar. Rows whose image is beyond the end of the tar
    are therefore treated as not fetched.

    Args:
        rows: The rows of the journal.
        tar_size: Bytes of the tar; 0 for plain files.

    Returns:
        The outcomes by row index, and the end of the last complete sample in the tar.
    """
    outcomes: dict[int, dict[str, Any]] = {}
    tar_end = 0
    for row in rows:
        # These keys are no columns of the manifest.
        row.pop("kept", None)
        row_end = row.pop("end", 0)
        if not row_end:
            # Rows from the manifest of a finished shard have the end of the image, but not of the sample.
            row_end = (row["offset"] or 0) + (row["length"] or 0)
        is_in_tar = row.get("file") is not None and bool(row.get("offset"))
        if is_in_tar and row_end > tar_size:
            continue
        outcomes[row["index"]] = row
        # Use the maximum, because rows from a manifest are in the order of the plan.
        tar_end = max(tar_end, min(row_end, tar_size))
    outcomes.pop(_END_MARK, None)
    return outcomes, tar_end


def count_outcomes(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return the number of rows by outcome."""
    return Counter(row["error"] or "ok" for row in rows)


def matches_kind(error: str | None, kinds: tuple[str, ...]) -> bool:
    """Return whether a failure is one of `kinds`: `404`, `http_404`, `4xx`, `all`, or the name of any other kind."""
    if not error:
        return False
    names = {"all", error}
    if error.startswith("http_"):
        status = error.removeprefix("http_")
        names.update((status, f"{status[0]}xx"))
    return not names.isdisjoint(kinds)


def _manifest_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return the rows as a table.

    Arrow's JSON reader is used, because `Table.from_pylist` imports pandas if it is installed, which takes 50 MB in each
    worker.
    """
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    return pa.json.read_json(
        io.BytesIO(lines),
        read_options=pa.json.ReadOptions(use_threads=False, block_size=len(lines)),
        parse_options=pa.json.ParseOptions(explicit_schema=MANIFEST_SCHEMA),
    )
