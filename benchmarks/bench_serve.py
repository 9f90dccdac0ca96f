"""`llava serve` with batched requests, against itself with one request at a time, or against llama.cpp.

    python benchmarks/bench_serve.py [--language-model FOLDER] [--clients 1 4 16] [--requests 24]
    python benchmarks/bench_serve.py --peer llama.cpp [--size 1.7b]

The model consists of SmolLM2-135M (downloaded if no folder is given), or of random weights in the shape of
SmolLM2-1.7B, and of a random tower in the shape of CLIP ViT-B/16. It computes in bfloat16 if that is fast on this
machine. The maximum length of each answer is drawn beforehand, and is the same for all sides. Each client sends its
next request when it has received its answer. Every server is a separate process.

In the comparison with llama.cpp, our server is also measured with `--quantize int8`.

llama.cpp's server loads our exported GGUF, as float16 and quantized. Its prompt cache is off. The number of requests
that it answers concurrently is a setting of the server: several numbers are tried (`--sequences`), and for each
number of clients, the one with the most answers per second is reported.

Prints the median and the 95th percentile of the latency, the answers per second, the time to the first token for a
single client, peak memory, and the ratios of the sides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peer_llama_cpp
from serving import make_body, measure_first_token, request_captions, running_server
from workload import (
    INSTRUCTION,
    draw_caption_lengths,
    write_checkpoint,
    write_data,
    write_models,
    write_random_language_model,
)

FIRST_TOKEN_IMAGES = 5  # images for which the time to the first token is measured
BATCH_SIZE = 16  # --batch-size of our server
ITSELF, LLAMA_CPP = "itself", "llama.cpp"
OURS = "llava serve"
Bodies = Sequence[dict[str, Any]]


class Latency(NamedTuple):
    """The latency and the throughput that the clients have measured.

    Attributes:
        median: Median of the seconds per answer.
        p95: 95th percentile of the seconds per answer.
        rate: Answers per second of all clients together.
    """

    median: float
    p95: float
    rate: float


class Side(NamedTuple):
    """The measurements of one server.

    Attributes:
        latencies: Latency by the number of clients.
        first_token: Seconds to the first token for a single client.
        memory: Peak resident memory in bytes.
    """

    latencies: dict[int, Latency]
    first_token: float
    memory: int


def measure_clients(url: str, bodies: Bodies, clients: int) -> Latency:
    """Send the requests with several concurrent clients, and return the latency."""
    urls = [url] * len(bodies)
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(request_captions, urls, bodies))
    rate = len(bodies) / (time.perf_counter() - start)
    median, p95 = np.percentile([answer.seconds for answer in answers], [50, 95])
    return Latency(float(median), float(p95), rate)


def measure_server(command: Sequence[str], bodies: Bodies, args: argparse.Namespace) -> Side:
    """Run a server, and measure it with each number of clients."""
    latencies = {}
    with running_server(command) as server:
        request_captions(server.url, bodies[0] | {"max_tokens": 4})  # warm up
        for clients in args.clients:
            # With fewer than two requests per client, nobody would send a request while others are being answered.
            count = max(args.requests, 2 * clients)
            latencies[clients] = measure_clients(server.url, bodies[:count], clients)
        # Now that the server is idle, measure the time to the first token for a single client.
        seconds = []
        for body in bodies[:FIRST_TOKEN_IMAGES]:
            seconds.append(measure_first_token(server.url, body))
    return Side(latencies, statistics.median(seconds), server.memory[0])


def our_command(checkpoint: Path, batch_size: int, *options: str) -> list[str]:
    """Return the command of our server, without a port."""
    command = [sys.executable, "-m", "llava_simplified.cli", "serve", str(checkpoint)]
    # The timeout is longer than any answer takes: slow answers must be measured, and not fail.
    return [*command, "--no-page", "--batch-size", str(batch_size), "--timeout", "600", *options]


def measure_llama_cpp(
    checkpoint: Path, folder: Path, bodies: Bodies, args: argparse.Namespace
) -> dict[str, Side]:
    """Measure llama.cpp in every format, with the fastest number of concurrent requests for each number of clients."""
    programs = peer_llama_cpp.build_llama_cpp(args.llama_cpp)
    print(f"llama.cpp {peer_llama_cpp.server_version(programs)}")
    bodies = [body | peer_llama_cpp.REQUEST_FIELDS for body in bodies]
    sides = {}
    for name, gguf in peer_llama_cpp.convert_checkpoint(programs, checkpoint, folder).items():
        # The number of sequences is fixed when the server starts, so start it once for each number.
        runs = []
        for sequences in args.sequences:
            command = peer_llama_cpp.server_command(programs, gguf, sequences)
            runs.append(measure_server(command, bodies, args))
        latencies = {}
        for clients in args.clients:
            latencies[clients] = max(
                (run.latencies[clients] for run in runs), key=lambda latency: latency.rate
            )
        # Report the memory of the last server, which answers the most requests concurrently. Our server is measured
        # with its largest number of concurrent requests, too.
        first_token = min(run.first_token for run in runs)
        sides[f"{LLAMA_CPP} {name}"] = Side(latencies, first_token, runs[-1].memory)
    return sides


def print_table(sides: dict[str, Side], clients: Sequence[int]) -> None:
    """Print the measurements of all sides, and the ratios to ours."""
    ours = sides[OURS]
    for name, side in sides.items():
        print(f"{name}: first token {side.first_token:.3f} s, memory {side.memory / 1e9:.2f} GB")
    for count in clients:
        own = ours.latencies[count]
        for name, side in sides.items():
            latency = side.latencies[count]
            print(
                f"{count:3} clients   {name:22} p50 {latency.median:6.2f} s "
                f"({latency.median / own.median:.2f}x)   p95 {latency.p95:6.2f} s "
                f"({latency.p95 / own.p95:.2f}x)   {latency.rate:5.2f} answers/s "
                f"({latency.rate / own.rate:.2f}x)"
            )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, help="Folder of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--size",
        choices=["135m", "1.7b"],
        default="135m",
        help="Parameters of the language model; 1.7b has random weights (default: %(default)s)",
    )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        help="Numbers of concurrent clients to measure (default: %(default)s)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=24,
        help="Minimum number of requests; each client sends at least two (default: %(default)s)",
    )
    parser.add_argument(
        "--peer",
        choices=[ITSELF, LLAMA_CPP],
        default=ITSELF,
        help="What to compare with (default: %(default)s, with one request at a time)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="Numbers of concurrent requests to llama.cpp to try, in ascending order; the fastest is reported "
        "(default: %(default)s)",
    )
    peer_llama_cpp.add_folder_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        language_model = args.language_model
        if args.size == "1.7b":
            language_model = write_random_language_model(root, language_model)
        checkpoint = write_checkpoint(root, write_models(root, language_model))
        num_images = max(args.requests, 2 * max(args.clients))
        folder = root / "images"
        folder.mkdir()
        write_data(folder, num_images, 1)
        bodies = []
        for index, length in enumerate(draw_caption_lengths(num_images)):
            image = (folder / f"{index}.png").read_bytes()
            bodies.append(make_body(image, INSTRUCTION, length))
        sides = {OURS: measure_server(our_command(checkpoint, BATCH_SIZE), bodies, args)}
        if args.peer == ITSELF:
            command = our_command(checkpoint, 1)
            sides["one at a time"] = measure_server(command, bodies, args)
        else:
            command = our_command(checkpoint, BATCH_SIZE, "--quantize", "int8")
            sides[f"{OURS}, int8"] = measure_server(command, bodies, args)
            sides |= measure_llama_cpp(checkpoint, root / "gguf", bodies, args)
    print_table(sides, args.clients)


if __name__ == "__main__":
    main()
