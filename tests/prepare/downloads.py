"""Write lists of URLs on the faulty server of `benchmarks/loopback.py`, and check complete downloads from it."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import loopback

from llava_simplified.data.images import decode_image, read_image_bytes

# The share of each kind of URL, without those that the server answers slowly or not at all.
FAST_MIX = {kind: share for kind, share in loopback.MIX.items() if kind not in ("hang", "drip")}
SHARD_SIZE = 50

Job = tuple[str, str, int]  # URL, kind of the server's response, number of the image


def write_source(
    folder: Path, port: int, count: int = 120, mix: dict[str, int] = FAST_MIX
) -> tuple[Path, list[Job]]:
    """Write a TSV of URLs; return its path, and the `Job` of each URL."""
    url_jobs = [(url, kind, number) for url, kind, number in loopback.urls(count, port, mix=mix)]
    path = folder / "train.tsv"
    path.write_text("".join(f"caption {number}\t{url}\n" for url, _, number in url_jobs))
    return path, url_jobs


def read_manifest(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "manifest.parquet").to_pylist()


def check_output(output: Path, url_jobs: list[Job]) -> None:
    """Check that each row is in the output once, with the correct outcome and exactly the bytes of its image."""
    rows = read_manifest(output)
    assert [row["url"] for row in rows] == [url for url, _, _ in url_jobs]
    for (url, kind, number), row in zip(url_jobs, rows):
        outcome, digest = loopback.expected(kind, number)
        assert ((row["error"] or "ok"), row["sha256"] or "") == (outcome, digest), (url, row)
        if digest:
            image = f"{row['index'] // SHARD_SIZE:05d}.tar#{row['key']}"
            pixels = decode_image(read_image_bytes(image, output))
            assert pixels.shape[:2] == (row["height"], row["width"])
    for path in output.glob("*.tar"):
        with tarfile.open(path) as archive:
            names = archive.getnames()
        assert len(names) == len(set(names)), "no image twice"
        assert path.read_bytes().endswith(b"\0" * 1024), "complete"
