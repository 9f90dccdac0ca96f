"""Download a list of URLs: plan the shards once, fetch them, and merge their manifests.

    download()          plan_shards() -> shards as tasks, see `download_shard` -> merge_manifests()

`download.json` in the output contains the settings of the download and the number of rows and shards. It is written
after the plans of the shards, so its existence means that the plans are complete (if it was written by a job with
--shards, the plans of that slice). A download that is started again with
the same settings continues: finished shards are skipped, unfinished ones continue where their journals end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from llava_simplified.data.names import expand_pattern
from llava_simplified.jobs import (
    SURROGATES_AS_ESCAPES,
    atomic_file,
    compare_settings,
    encode_json_lines,
    exclusive_lock,
    remove_temporary_files,
)
from llava_simplified.options import check_at_least
from llava_simplified.prepare.convert import group_captions, request_identity
from llava_simplified.prepare.download_progress import DownloadProgress
from llava_simplified.prepare.download_shard import MANIFEST_SCHEMA, ShardSpec, fetch_shard
from llava_simplified.prepare.download_store import SETTINGS_NAME, Store
from llava_simplified.prepare.fetch_options import FAILURE_KINDS, FetchOptions
from llava_simplified.prepare.preparation_report import write_download_report
from llava_simplified.prepare.record_writer import INSTRUCTION, RecordWriter, make_record
from llava_simplified.prepare.source_rows import Columns, ParseIssues
from llava_simplified.prepare.sources import read_source
from llava_simplified.workers import check_workers, parse_slice, run_tasks

logger = logging.getLogger(__name__)

# Values of --retry in addition to FAILURE_KINDS: all, a status code (404 or http_404), or a class of codes (5xx).
_RETRY_KIND = re.compile(r"all|(http_)?\d{3}|\dxx")
_SHOWN_FAILURES = 20  # maximum number of shards that an error message names
# Run two shards per CPU, since fetching mostly waits for the network.
_SHARDS_PER_CPU = 2


def download(
    source: str,
    output: str,
    options: FetchOptions,
    *,
    columns: Columns = Columns(),  # noqa: B008 - immutable
    files: bool = False,
    shard_size: int = 10_000,
    limit: int = 0,
    retry: tuple[str, ...] = (),
    engine: str = "local",
    workers: int = 0,
    shards: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Fetch every URL of a source; continue an interrupted download.

    Args:
        source: Any source that `read_source` supports.
        output: A folder, or a URL that fsspec can write to.
        options: Options of the requests.
        columns: Column names that the user passed.
        files: Write a folder of plain images and `records.json`, instead of shards and `records.jsonl`.
        shard_size: Rows per shard.
        limit: Fetch only the first N rows; 0 means all.
        retry: Kinds of failures to fetch again ("timeout", "5xx", "all").
        engine: Run the tasks in local processes or on Ray, see `run_tasks`.
        workers: Number of shards to fetch in parallel, see `run_tasks`.
        shards: "i/n" fetches only this slice of the shards; afterward `merge_manifests` writes the report.
        progress: Show a progress line.

    Returns:
        The report. If `shards` is given, only its entry "outcomes".

    Raises:
        ValueError: The source has no URLs, the output belongs to a download with different settings, another process
            is writing to the output, a shard failed at every attempt, or the first rows all fail in the same way.
    """
    _check_arguments(options, shard_size, limit, retry, workers)
    store = Store(output)
    # Object stores charge for every request, so millions of small files would be slow and expensive.
    if files and not store.is_local:
        raise ValueError(
            f"--output {output}: plain files require a local folder. Pass --output-format shards, or a local folder."
        )
    settings = {
        "source": source,
        "files": files,
        "shard_size": shard_size,
        "limit": limit,
        "resize": options.resize,
        # Use the size to detect that the source has changed: otherwise, its new rows would never be fetched.
        "bytes": Path(source).stat().st_size if Path(source).is_file() else 0,
        **_column_settings(columns),
    }
    # The lock excludes all other runs on this output, except for other slices.
    with _run_lock(store, output, shards):
        plan = _load_or_make_plan(source, columns, store, settings, shards, output)
        if files:
            Path(store.root, "images").mkdir(exist_ok=True)
        numbers = parse_slice(shards, plan["shards"])
        # The rate in the progress line must not count the shards that an earlier run finished.
        finished_before = {int(name.removesuffix(".parquet")) for name in store.manifests()}
        rows = 0 if shards else plan["rows"]
        tracker = DownloadProgress(store.work, numbers, finished_before, rows, progress, retry)
        specs = [ShardSpec(number, output, files, retry, options) for number in numbers]
        _fetch_shards(specs, tracker, engine, workers)
        # Do not merge after a slice, because other slices may still be running.
        if shards:
            return {"outcomes": dict(tracker.total())}
        return _merge(store, output)


def _check_arguments(
    options: FetchOptions, shard_size: int, limit: int, retry: tuple[str, ...], workers: int
) -> None:
    """Raise ValueError for an option that is out of range, or an unknown kind of failure."""
    check_at_least(
        1,
        concurrency=options.concurrency,
        per_host=options.per_host,
        max_bytes=options.max_bytes,
        max_pixels=options.max_pixels,
        shard_size=shard_size,
    )
    # Options for which 0 has a meaning of its own.
    zeros = {
        "--limit": (limit, "all rows"),
        "--resize": (options.resize, "the original size"),
        "--retries": (options.retries, "no retry"),
    }
    for name, (value, meaning) in zeros.items():
        if value < 0:
            raise ValueError(f"{name} {value}: must be at least 1, or 0 for {meaning}")
    # NaN is not above 0 either.
    if not options.timeout > 0:
        raise ValueError(f"--timeout {options.timeout:g}: must be a number of seconds above 0")
    if not options.contact.isprintable():
        raise ValueError(
            f"--user-agent-contact {options.contact!r}: a header cannot contain line breaks or other control characters"
        )
    check_workers(workers)
    unknown = [
        kind for kind in retry if kind not in FAILURE_KINDS and not _RETRY_KIND.fullmatch(kind)
    ]
    if unknown:
        raise ValueError(
            f"--retry {','.join(unknown)}: unknown kind of failure. "
            f"Use all, a status code such as 404, a class of codes such as 5xx, or {', '.join(FAILURE_KINDS)}."
        )


def _run_lock(store: Store, output: str, shards: str) -> contextlib.AbstractContextManager[None]:
    """Return the lock of the run. Each slice has its own lock, so that the jobs of an array can run together."""
    name = "download.lock"
    if shards:
        name = f"download-{shards.replace('/', '-of-')}.lock"
    return exclusive_lock(store.work / name, output)


def _fetch_shards(
    specs: list[ShardSpec], tracker: DownloadProgress, engine: str, workers: int
) -> None:
    """Fetch shards, and raise a ValueError at the end if some could not be finished."""
    failed = []
    results = run_tasks(
        fetch_shard,
        specs,
        engine=engine,
        workers=workers,
        per_cpu=_SHARDS_PER_CPU,
        tick=tracker.tick,
    )
    with tracker.progress:
        for done in results:
            if done.result is None:
                failed.append(f"shard {done.spec.name}: {done.error}")
            else:
                tracker.finish_shard(done.spec.number, done.result)
    if failed:
        shown = "\n".join(failed[:_SHOWN_FAILURES])
        raise ValueError(
            f"{len(failed)} of {len(specs)} shards failed. Run the same command again to continue.\n{shown}"
        )


# ---- the plan ----


def _load_or_make_plan(
    source: str,
    columns: Columns,
    store: Store,
    settings: dict[str, Any],
    shards: str,
    output: str,
) -> dict[str, Any]:
    """Return the `download.json` of an existing download, or plan a new one."""
    known = store.settings()
    if known:
        # Version 0.1 did not store the columns. Most of its downloads used the default ones.
        compare_settings({**_column_settings(Columns()), **known}, settings, output)
        if _is_planned(store, parse_slice(shards, known["shards"])):
            _warn_if_changed(source, known, output)
            return known
    return plan_shards(source, columns, store, settings, shards)


def _warn_if_changed(source: str, known: dict[str, Any], output: str) -> None:
    """Log a warning if files were added to a source of several files, or changed, after the download was planned."""
    digest = _digest_of_files(source)
    # Version 0.1 did not store the digest.
    if known.get("source_files", digest) != digest:
        logger.warning(
            "%s: files have changed or were added since the download to %s was planned. Their new rows are not fetched; "
            "pass a new --output to fetch them.",
            source,
            output,
        )


def _digest_of_files(source: str) -> str:
    """Return a digest of the names and sizes of the files in a folder or of a pattern; "" for other sources.

    Unlike the size of a single file, which is a setting, it only leads to a warning: the folder may also contain files
    that are not read.
    """
    path = Path(source)
    if "://" in source or path.is_file():
        return ""
    if path.is_dir():
        paths = list(path.iterdir())
    else:
        paths = [Path(name) for name in expand_pattern(source)[0]]
    digest = hashlib.sha256()
    for file in sorted(paths):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"{file} {file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _column_settings(columns: Columns) -> dict[str, str]:
    """Return the settings that store the column names: "url_column", "image_column" and "caption_column"."""
    return {f"{name}_column": value for name, value in columns._asdict().items()}


def _is_planned(store: Store, numbers: range) -> bool:
    """Return whether all shards with these numbers are finished or have a plan.

    Plans may be missing although `download.json` exists, if another job of an array wrote it: on a different machine,
    that job writes only the plans of its own slice.
    """
    available = set(store.manifests())
    available.update(f"{path.stem}.parquet" for path in store.work.glob("*.plan"))
    return all(f"{number:05d}.parquet" in available for number in numbers)


def plan_shards(
    source: str, columns: Columns, store: Store, settings: dict[str, Any], shards: str
) -> dict[str, Any]:
    """Split a source into shards, and write a plan for each: a file of JSON lines (index, URL, captions).

    Args:
        source: Any source that `read_source` supports.
        columns: Column names that the user passed.
        store: The output.
        settings: Settings of the download.
        shards: "i/n" writes only the plans of this slice; "" writes all.

    Returns:
        The contents of `download.json`: settings, number of rows and shards, and the issues of the source.

    Raises:
        ValueError: The source has no rows, or no row of the first shard has a URL.
    """
    issues = ParseIssues()
    finished = set(store.manifests())
    total = number = 0
    for chunk in _plan_chunks(source, columns, settings, issues):
        if number == 0 and not any(row["url"] for row in chunk):
            raise ValueError(
                f"{source}: no URL in the first {len(chunk)} rows. Name the column with --url-column."
            )
        # The number of shards is not known yet. Whether a slice contains this shard does not depend on it.
        is_selected = number in parse_slice(shards, number + 1)
        if is_selected and f"{number:05d}.parquet" not in finished:
            _write_plan(store.work / f"{number:05d}.plan", chunk)
        number += 1
        total += len(chunk)
    if not total:
        raise ValueError(f"{source}: contains no rows")
    plan = {
        **settings,
        "source_files": _digest_of_files(source),
        "rows": total,
        "shards": number,
        "oddities": issues.lines(),
    }
    # Publish `download.json` last, because its existence means that these plans are complete. Use a unique
    # temporary name: the jobs of an array may plan at the same time, and all write the same content.
    local = store.work / f"{SETTINGS_NAME}.{uuid.uuid4().hex[:8]}"
    text = json.dumps(plan, indent=1, ensure_ascii=False)
    local.write_text(text, encoding="utf-8", errors=SURROGATES_AS_ESCAPES)
    store.publish(local, SETTINGS_NAME)
    return plan


def _plan_chunks(
    source: str, columns: Columns, settings: dict[str, Any], issues: ParseIssues
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each shard, in order."""
    rows = group_captions(
        lambda pass_issues: read_source(source, pass_issues, columns), issues, request_identity
    )
    # Number the rows before applying --limit: the index is part of an image's name, and must not change.
    numbered = islice(enumerate(rows), settings["limit"] or None)
    while True:
        chunk = []
        for index, row in islice(numbered, settings["shard_size"]):
            if not row.captions:
                kind = "no caption (the image is downloaded, but no record is written)"
                issues.note_without_caption(kind, row, row.url)
            chunk.append({"index": index, "url": row.url, "captions": row.captions})
        if not chunk:
            return
        yield chunk


def _write_plan(path: Path, rows: list[dict[str, Any]]) -> None:
    remove_temporary_files(path)
    with atomic_file(path) as part:
        part.write_bytes(encode_json_lines(rows))


# ---- merging ----


def merge_manifests(output: str) -> dict[str, Any]:
    """Merge the manifests of all finished shards of a download.

    Writes `manifest.parquet`, the records (`records.jsonl` for shards, `records.json` for plain files), and the report
    in JSON and HTML.

    Returns:
        The report; with the key "missing_shards" if not all shards are finished.

    Raises:
        ValueError: The output has no finished shard, or another process is writing to it.
    """
    fs, root = fsspec.core.url_to_fs(output)
    # Check the path before `Store` creates it, because it may be misspelled.
    if not fs.exists(root) or not Store(output).manifests():
        raise ValueError(
            f"{output}: contains no finished shard (00000.parquet) of `llava download`. Check the path."
        )
    store = Store(output)
    with _run_lock(store, output, shards=""):
        return _merge(store, output)


def _merge(store: Store, output: str) -> dict[str, Any]:
    """Merge the manifests. The caller must hold the lock of the run."""
    plan = store.settings()
    names = store.manifests()
    if not plan or not names:
        raise ValueError(
            f"{output}: contains no finished shard of `llava download`. Run it with this --output first."
        )
    records = store.work / ("records.json" if plan["files"] else "records.jsonl")
    merged = store.work / "manifest.parquet"
    remove_temporary_files(records)
    with (
        RecordWriter(records) as writer,
        pq.ParquetWriter(merged, MANIFEST_SCHEMA, compression="zstd") as merged_writer,
    ):
        for name in names:
            # Process one shard at a time, so that memory does not depend on the size of the download.
            table = store.read_manifest(name)
            merged_writer.write_table(table)
            for row in table.select(["key", "file", "captions", "status"]).to_pylist():
                if row["status"] != "ok" or not row["captions"]:
                    continue
                image = f"{name.removesuffix('.parquet')}.tar#{row['key']}"
                if plan["files"]:
                    image = f"images/{row['file']}"
                writer.write(make_record(image, INSTRUCTION, row["captions"]))
    report_json = store.work / "report.json"
    report_html = store.work / "report.html"
    report = write_download_report(merged, plan, report_json, report_html)
    # Mark the report as incomplete if other jobs have not finished their shards yet.
    missing = plan["shards"] - len(names)
    if missing > 0:
        report["missing_shards"] = missing
    # Publish the report last, so that its existence means that the other files exist too.
    for path in (records, merged, report_json, report_html):
        store.publish(path, path.name)
    return report
