"""`llava serve` with batched requests, against the same server answering one request at a time.

    python benchmarks/bench_serve.py [--language-model FOLDER] [--clients 1 4 16] [--requests 24]

SmolLM2-135M (downloaded if no folder is given) and a random tower in the shape of CLIP ViT-B/16, in bfloat16
where this machine is fast in it. The maximum length of each answer is drawn beforehand and the same for both
sides. Each client sends its next request when it has its answer. The sides are processes of their own.

Prints the latency at the median and at 95 %, and the ratios of the sides.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from workload import compute_dtype, draw_caption_lengths, write_data, write_models


class Latency(NamedTuple):
    """Seconds per answer at the median and at 95 %, and answers per second of all clients."""

    median: float
    p95: float
    rate: float


def write_checkpoint(root: Path, language_model: Path | None) -> Path:
    """Write a checkpoint with a random projector, and return its folder."""
    import torch

    from llava_simplified.model.build import build_model
    from llava_simplified.model.checkpoint import save_checkpoint
    from llava_simplified.model.config import LlavaConfig, TrainedParts

    text, tower = write_models(root, language_model)
    torch.manual_seed(1)
    config = LlavaConfig(
        str(text), str(tower), mm_projector_type="mlp2x_gelu", dtype=compute_dtype()
    )
    save_checkpoint(build_model(config), root / "model", config, TrainedParts())
    return root / "model"


@contextmanager
def running_server(checkpoint: Path, batch_size: int) -> Iterator[str]:
    """Run `llava serve` on a free port; yield its URL when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llava_simplified.cli", "serve", str(checkpoint)]
    command += ["--port", str(port), "--no-page"]
    command += ["--batch-size", str(batch_size), "--timeout", "600"]
    environment = dict(os.environ, LLAVA_API_KEY="")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url)
        yield url
    finally:
        process.terminate()
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server answers; exit if it has ended."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    sys.exit("The server did not start.")


def request_caption(url: str, image: bytes, max_tokens: int) -> float:
    """Request one caption, and return the seconds until the answer is complete."""
    data_uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data_uri}}]
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
    }
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    start = time.perf_counter()
    with urllib.request.urlopen(request) as response:
        json.load(response)
    return time.perf_counter() - start


def measure(url: str, images: Sequence[bytes], num_clients: int) -> Latency:
    """Caption images with several clients at once."""
    urls = [url] * len(images)
    lengths = draw_caption_lengths(len(images))
    start = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        seconds = list(pool.map(request_caption, urls, images, lengths))
    rate = len(images) / (time.perf_counter() - start)
    median, p95 = np.percentile(seconds, [50, 95])
    return Latency(float(median), float(p95), rate)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="Folder of SmolLM2-135M-Instruct")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--requests",
        type=int,
        default=24,
        help="Minimum number of requests; at least two per client (default: %(default)s)",
    )
    args = parser.parse_args()
    results: dict[int, dict[int, Latency]] = {clients: {} for clients in args.clients}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = write_checkpoint(root, args.language_model)
        num_images = max(args.requests, 2 * max(args.clients))
        folder = root / "images"
        folder.mkdir()
        write_data(folder, num_images, 1)
        images = [(folder / f"{index}.png").read_bytes() for index in range(num_images)]
        for batch_size in (16, 1):
            with running_server(checkpoint, batch_size) as url:
                request_caption(url, images[0], 4)  # warm up
                for clients in args.clients:
                    count = max(args.requests, 2 * clients)
                    results[clients][batch_size] = measure(url, images[:count], clients)
    for clients, by_batch_size in results.items():
        batched, single = by_batch_size[16], by_batch_size[1]
        print(
            f"{clients:3} clients   p50 {batched.median:6.2f} s   p95 {batched.p95:6.2f} s   "
            f"{batched.rate:5.2f} answers/s   one at a time: "
            f"{single.median / batched.median:.2f}x the latency (p50), "
            f"{single.p95 / batched.p95:.2f}x (p95), {single.rate / batched.rate:.2f}x the answers"
        )


if __name__ == "__main__":
    main()
