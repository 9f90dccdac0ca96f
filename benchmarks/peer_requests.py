"""The tutorial's downloader: a pool of processes, each with one request at a time. Started by bench_download.py.

python peer_requests.py URLS.tsv OUTPUT TIMEOUT
"""

import multiprocessing
import sys
import zlib
from pathlib import Path

import requests

NUM_PROCESSES = 32


def fetch(job: tuple[int, str]) -> int:
    """Download one URL, and return its status. As in the tutorial, every failure is a 408."""
    index, url = job
    try:
        response = requests.get(url, timeout=int(sys.argv[3]), allow_redirects=True)
        if response.ok:
            name = f"{index}_{zlib.crc32(url.encode())}.jpg"
            Path(sys.argv[2], name).write_bytes(response.content)
        return response.status_code
    except Exception:  # noqa: BLE001 - as in the tutorial
        return 408


def main() -> None:
    """Download every URL of a TSV file."""
    lines = Path(sys.argv[1]).read_text().splitlines()
    urls = [line.split("\t")[1].strip() for line in lines]
    Path(sys.argv[2]).mkdir()
    with multiprocessing.Pool(NUM_PROCESSES) as pool:
        pool.map(fetch, list(enumerate(urls)), chunksize=8)


if __name__ == "__main__":
    main()
