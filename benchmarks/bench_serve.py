"""`llava serve` with requests batched, against the same server answering one at a time.

    python benchmarks/bench_serve.py [--language-model FOLDER] [--clients 1 4 16] [--requests 24]

SmolLM2-135M (fetched where no folder is given) and a random tower of CLIP ViT-B/16's shape, bfloat16 where the machine is
fast in it. A random projector makes the model ramble, so the longest that a picture's answer may be is drawn beforehand, the
same for both sides, as the lengths of Conceptual Captions are. Each client sends its next request when it has its answer.
Prints the seconds of an answer at the median and at 95 %, and the ratio of the sides, which are processes of their own.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from bench_caption import lengths
from bench_train import number_type, write_data, write_models


def write_checkpoint(root: Path, language_model: Path | None) -> Path:
    import torch

    from llava_simplified.model.build import build_model
    from llava_simplified.model.checkpoint import save_checkpoint
    from llava_simplified.model.config import LlavaConfig, TrainedParts

    text, tower = write_models(root, language_model)
    torch.manual_seed(1)
    architecture = LlavaConfig(
        str(text), str(tower), mm_projector_type="mlp2x_gelu", dtype=number_type()
    )
    save_checkpoint(build_model(architecture), root / "model", architecture, TrainedParts())
    return root / "model"


@contextmanager
def server(checkpoint: Path, batch_size: int) -> Iterator[str]:
    """`llava serve` on a free port; its URL, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "llava_simplified.cli",
        "serve",
        str(checkpoint),
        "--port",
        str(port),
        "--no-page",
    ]
    words += ["--batch-size", str(batch_size), "--timeout", "600"]
    process = subprocess.Popen(
        words, env=dict(os.environ, LLAVA_API_KEY=""), stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        else:
            sys.exit("the server did not start")
        yield url
    finally:
        process.terminate()
        process.wait()


def ask(url: str, picture: bytes, tokens: int) -> float:
    """The seconds of one answer."""
    image = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"},
    }
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": [image]}],
        "max_tokens": tokens,
    }
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    start = time.perf_counter()
    with urllib.request.urlopen(request) as response:
        json.load(response)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--requests", type=int, default=24, help="at least; two a client (%(default)s)"
    )
    args = parser.parse_args()
    found: dict[int, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = write_checkpoint(root, args.language_model)
        count = max(args.requests, 2 * max(args.clients))
        (root / "pictures").mkdir()
        write_data(root / "pictures", count, 1)
        pictures = [(root / "pictures" / f"{index}.png").read_bytes() for index in range(count)]
        for batch_size in (16, 1):
            with server(checkpoint, batch_size) as url:
                ask(url, pictures[0], 4)  # warm
                for clients in args.clients:
                    size = max(args.requests, 2 * clients)
                    start = time.perf_counter()
                    with ThreadPoolExecutor(clients) as pool:
                        seconds = list(pool.map(ask, [url] * size, pictures[:size], lengths(size)))
                    rate = size / (time.perf_counter() - start)
                    found.setdefault(clients, []).append(
                        np.array([*np.percentile(seconds, [50, 95]), 1 / rate])
                    )
    for clients, (batched, single) in found.items():
        print(
            f"{clients:3} clients   p50 {batched[0]:6.2f} s   p95 {batched[1]:6.2f} s   {1 / batched[2]:5.2f} answers/s   "
            f"one at a time takes {single[0] / batched[0]:.2f}x (p50), {single[1] / batched[1]:.2f}x (p95), "
            f"and answers {batched[2] / single[2]:.2f}x as many"
        )


if __name__ == "__main__":
    main()
