"""Fetch one shard of a download, and resume it after the process was killed.

While it is fetched, a shard is three files in the work folder:

    00012.plan       which rows belong to it: JSON lines with index, URL and captions
    00012.tar.part   the tar as far as it has come
    00012.journal    one JSON line per finished row

The line of a row is written after its image is in the tar. So whatever kills the process, the journal says exactly
what is done:

    fetch image -> append to tar -> append to journal
                                 ^ killed here: the sample is in the tar, but not in the journal. The next run cuts
                                   the tar off behind the last sample that the journal knows, and fetches the row again.

After the last row the journal becomes the manifest, and tar and manifest are renamed into the output: first the tar,
then the manifest, whose existence means that the shard is finished.
"""

from __future__ import annotations

import asyncio
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
from llava_simplified.workers import tune_malloc

PLAN_COLUMNS = {"index": pa.int64(), "url": pa.string(), "captions": pa.list_(pa.string())}
MANIFEST_SCHEMA = pa.schema(
    {
        **PLAN_COLUMNS,
        "key": pa.string(),  # of the sample in the tar
        "status": pa.string(),  # ok or failed
        "error": pa.string(),  # the kind of failure: timeout, dns, http_404, html, truncated, opt_out, ...
        "detail": pa.string(),
        "http": pa.int16(),
        "sha256": pa.string(),  # of the image as it is stored
        "bytes": pa.int64(),  # as received
        "width": pa.int32(),
        "height": pa.int32(),
        "file": pa.string(),
        "offset": pa.int64(),  # of the image in the tar
        "length": pa.int32(),
        "seconds": pa.float32(),
        "at": pa.float64(),  # Unix time
    }
)
_OUTCOME_COLUMNS = MANIFEST_SCHEMA.names[len(PLAN_COLUMNS) :]
_SAMPLE_COLUMNS = ("key", "sha256", "width", "height")  # what a sample's .json repeats
_END_MARK = -1  # index of the journal's line that holds only the end of a tar that is opened again
_SPARE_FILES = 64  # open files besides connections
_RETURNED_BLOCK_BYTES = 4_000_000
_TLS_BUFFER_BYTES = 1 << 14  # the size of a TLS record


@dataclass(frozen=True)
class ShardSpec:
    """One shard to fetch: everything that a worker process needs to know.

    Attributes:
        number: The number of the shard.
        output: The output of the download.
        files: Write plain files instead of a tar.
        retry: Kinds of failures that are fetched again.
        options: How to fetch.
    """

    number: int
    output: str
    files: bool
    retry: tuple[str, ...]
    options: FetchOptions

    @property
    def name(self) -> str:
        """The name of the shard's files without suffix."""
        return f"{self.number:05d}"


def fetch_shard(spec: ShardSpec) -> dict[str, int]:
    """Fetch what is missing of a shard. Running it again on a finished shard does nothing.

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
    """The files of one shard, and the steps to finish it. The lock of the shard must be held."""

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
        # A journal beside a manifest means that a retry was killed: it goes on below.
        if finished is not None and not self.journal.exists():
            kept = [row for row in finished if not self._is_retried(row)]
            if len(kept) == len(finished):
                return count_outcomes(finished)
            self._reopen_journal(kept)
        rows = finished
        if rows is None:
            rows = [row for row, _ in read_json_lines(self.plan)]
        # A finished shard has no plan any more, but its manifest contains the same columns.
        planned = [{name: row[name] for name in PLAN_COLUMNS} for row in rows]
        outcomes = self._fetch_missing(planned)
        # The order is that of the plan, although rows finish in any order.
        self._publish_manifest([{**outcomes[row["index"]], **row} for row in planned])
        # The manifest is in place: the shard is finished, whatever happens to these two.
        self.plan.unlink(missing_ok=True)
        self.journal.unlink()
        return count_outcomes(outcomes.values())

    def _is_retried(self, row: dict[str, Any]) -> bool:
        return matches_kind(row["error"], self.spec.retry)

    def _reopen_journal(self, kept: list[dict[str, Any]]) -> None:
        """Make a journal of the rows of a finished shard that are not fetched again."""
        rows: list[dict[str, Any]] = []
        for row in kept:
            rows.append({name: row[name] for name in row if name not in ("url", "captions")})
        if not self.spec.files:
            # New samples go behind the old ones, over the end-of-archive mark.
            tar_size = self.store.fs.size(self.store.path(self.tar_name))
            if tar_size > len(END_OF_ARCHIVE):
                rows.append({"index": _END_MARK, "end": tar_size - len(END_OF_ARCHIVE)})
        remove_temporary_files(self.journal)
        with atomic_file(self.journal) as part:
            part.write_bytes(encode_json_lines(rows))

    def _fetch_missing(self, planned: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Fetch the rows that the journal does not have. Returns the outcome of every row by its index."""
        if not self.spec.files and not self.tar.exists() and self.store.exists(self.tar_name):
            # To retry failures; or the process was killed between publishing the tar and the manifest.
            self.store.fetch(self.tar_name, self.tar)
        tar_size = self.tar.stat().st_size if self.tar.exists() else 0
        with Journal(self.journal) as journal:
            # Everything in the tar behind `end` was not recorded, and is cut off by the writer.
            recorded, end = finished_rows(journal.rows(), tar_size)
            outcomes = {index: row for index, row in recorded.items() if not self._is_retried(row)}
            missing = [row for row in planned if row["index"] not in outcomes]
            writer = None if self.spec.files else ShardWriter(self.tar, end)
            # `outcomes` has the rows that were fetched before, and gets the others as they finish.
            asyncio.run(self._fetch_rows(missing, journal, writer, outcomes))
        # `close` waits until the disk has everything; before that the tar must not be published.
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
            # A row without an image adds nothing to the tar.
            end = 0
            if fetched.image is not None:
                data, suffix = fetched.image.data, fetched.image.suffix
                if writer is None:
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
            # The image is in its place. Whatever happens now, the row is not fetched again.
            outcomes[index] = outcome
            journal.append([{**outcome, "end": end}])

    def _write_file(self, data: bytes, name: str) -> None:
        """Write an image of a download to plain files; it appears at once with all its content."""
        # One temporary name per shard, in the work folder: a killed process leaves no litter among the images.
        part = self.store.work / f"{self.spec.name}.image"
        part.write_bytes(data)
        part.replace(Path(self.store.root, "images", name))

    def _publish_manifest(self, rows: list[dict[str, Any]]) -> None:
        local = self.store.work / self.manifest_name
        pq.write_table(_manifest_table(rows), local, compression="zstd")
        self.store.publish(local, self.manifest_name)


def _prepare_process(options: FetchOptions) -> None:
    """Adapt this process to many connections. Only worker processes of a download call this."""
    # Every connection holds a buffer of this size; asyncio's default is 16 times as large.
    asyncio.sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES
    # At its usual pace the garbage collector takes a tenth of the time.
    gc.set_threshold(20_000, 50)
    # Each thread that decodes images would keep the memory of its largest one.
    tune_malloc(_RETURNED_BLOCK_BYTES)
    # A request has a connection, and perhaps one that is closing.
    _raise_file_limit(2 * options.concurrency + _SPARE_FILES)


def _raise_file_limit(count: int) -> None:
    """Let this process open `count` files, since every connection is one.

    What cannot be opened would otherwise be recorded as a failure of the server.
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
            f"--concurrency: {count} open files are needed, but the limit is {hard_limit} (ulimit -Hn). "
            f"Pass --concurrency {max(1, (hard_limit - _SPARE_FILES) // 2)} or less."
        ) from None


def make_outcome(index: int, fetched: FetchResult) -> dict[str, Any]:
    """Return the columns of the manifest that describe the outcome of a row; those of the image's place are None."""
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
    """Return what the journal of a shard says.

    An image that the tar is too short to contain was lost by the disk (the machine went down): its row counts as not
    fetched.

    Args:
        rows: The rows of the journal.
        tar_size: Bytes of the tar; 0 for plain files.

    Returns:
        The outcomes by the index of their row, and the end of the last complete sample in the tar.
    """
    outcomes: dict[int, dict[str, Any]] = {}
    tar_end = 0
    for row in rows:
        row_end = row.pop("end", 0)
        if not row_end:
            # A row of a shard that was finished before says where its image is, but not where the sample ends.
            row_end = (row["offset"] or 0) + (row["length"] or 0)
        is_in_tar = row.get("file") is not None and bool(row.get("offset"))
        if is_in_tar and row_end > tar_size:
            continue
        outcomes[row["index"]] = row
        # A maximum, because rows of a shard that was finished before are in the order of the plan.
        tar_end = max(tar_end, min(row_end, tar_size))
    outcomes.pop(_END_MARK, None)
    return outcomes, tar_end


def count_outcomes(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return the number of rows by outcome."""
    return Counter(row["error"] or "ok" for row in rows)


def matches_kind(error: str | None, kinds: tuple[str, ...]) -> bool:
    """Return whether a failure is one of `kinds`: `404`, `http_404`, `4xx`, `all`, or any other kind by its name."""
    if not error:
        return False
    names = {"all", error}
    if error.startswith("http_"):
        status = error.removeprefix("http_")
        names.update((status, f"{status[0]}xx"))
    return not names.isdisjoint(kinds)


def _manifest_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return the rows as a table.

    It goes through Arrow's JSON reader, because `Table.from_pylist` imports pandas if it is installed: 50 MB in each
    worker.
    """
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    return pa.json.read_json(
        io.BytesIO(lines),
        read_options=pa.json.ReadOptions(use_threads=False, block_size=len(lines)),
        parse_options=pa.json.ParseOptions(explicit_schema=MANIFEST_SCHEMA),
    )
