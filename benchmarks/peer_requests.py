"""The tutorial's way to download: a pool of processes, one request each; for bench_download.py."""

import multiprocessing
import sys
import zlib
from pathlib import Path

import requests


def fetch(job: tuple[int, str]) -> int:
    """Every failure is a 408, as there."""
    index, url = job
    try:
        response = requests.get(url, timeout=int(sys.argv[3]), allow_redirects=True)
        if response.ok:
            Path(sys.argv[2], f"{index}_{zlib.crc32(url.encode())}.jpg").write_bytes(
                response.content
            )
        return response.status_code
    except Exception:  # noqa: BLE001 - as there
        return 408


if __name__ == "__main__":
    jobs = list(
        enumerate(
            line.split("\t")[1].strip() for line in Path(sys.argv[1]).read_text().splitlines()
        )
    )
    Path(sys.argv[2]).mkdir()
    with multiprocessing.Pool(32) as pool:
        pool.map(fetch, jobs, chunksize=8)
