"""Measure `llava serve` with many healthy clients, first alone, and then together with hostile ones.

    python benchmarks/bench_hostile.py [--clients 200] [--seconds 300] [--hostile 0.1]

The server runs a tiny random model. Healthy clients repeatedly request greedy captions of eight images, and compare each answer
with the answer of the idle server. They are measured alone, and then together with hostile clients, which send damaged and huge
requests, image bombs and extreme options, leave connections half-open, and do not read answers.

Prints the number of lost and changed answers, the latency, its ratio at the 95th percentile, and the peak of the server's memory.
The exit status is 1 if an answer was lost or changed, or if hostile clients more than double the latency at the 95th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from serving import wait_until_healthy
from tiny import save_language_model, save_vision_model

CHAT = "/v1/chat/completions"
MAX_TOKENS = 16
NUM_IMAGES = 8
MAX_RATIO = (
    2.0  # maximum ratio of the latencies at the 95th percentile, with and without hostile clients
)
HEADERS = {"content-type": "application/json"}


@dataclass
class Outcomes:
    """What happened to the requests of one phase.

    Attributes:
        seconds: Duration of each healthy request that was answered.
        lost: Number of healthy requests without an answer, by the reason.
        changed: Number of healthy answers that differ from the expected ones.
        hostile: Number of hostile requests by their status; "left" if the client closed the connection, "closed" if
            the server did.
        peak: Largest resident memory of the server in bytes.
    """

    seconds: list[float] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    hostile: Counter[str] = field(default_factory=Counter)
    peak: int = 0

    @property
    def p95(self) -> float:
        """The 95th percentile of the seconds per answer."""
        return float(np.percentile(self.seconds, 95)) if self.seconds else float("inf")

    def describe(self, title: str) -> str:
        """Return the outcomes as one line of text."""
        median = float(np.percentile(self.seconds, 50)) if self.seconds else float("inf")
        lost = f"{sum(self.lost.values())} lost"
        if self.lost:
            lost += f" {dict(self.lost)}"
        return (
            f"{title:14} {len(self.seconds):6,} answers   {lost}   {self.changed} changed   "
            f"p50 {median:.2f} s   p95 {self.p95:.2f} s   peak {self.peak / 1e6:,.0f} MB"
        )


# ---- the server ----


def write_checkpoint(root: Path) -> Path:
    """Write a checkpoint of tiny random models, and return its folder."""
    from llava_simplified.model.build import build_model
    from llava_simplified.model.checkpoint import save_checkpoint
    from llava_simplified.model.config import LlavaConfig, TrainedParts

    text = save_language_model("llama", root / "language_model")
    tower = save_vision_model("clip", root / "vision_tower")
    config = LlavaConfig(text, tower)
    save_checkpoint(build_model(config), root / "model", config, TrainedParts())
    return root / "model"


@contextmanager
def running_server(checkpoint: Path, queue: int) -> Iterator[tuple[psutil.Process, str]]:
    """Run `llava serve`; yield its process and its URL when it answers."""
    # With port 0, the operating system selects a free port.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    command = [sys.executable, "-m", "llava_simplified", "serve", str(checkpoint)]
    command += ["--port", str(port), "--queue", str(queue), "--quiet"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        if not wait_until_healthy(process, url):
            raise SystemExit("llava serve did not start; its messages above give the reason.")
        yield psutil.Process(process.pid), url
    finally:
        process.terminate()
        process.wait()


# ---- healthy clients ----


def draw_images() -> list[bytes]:
    """Return PNG files with a few smooth patches of random colors."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(NUM_IMAGES):
        colors = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(colors).resize((320, 240)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def make_body(image: bytes, **options: Any) -> dict[str, Any]:
    """Return a request for a caption."""
    data_uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data_uri}}]
    options = {"max_tokens": MAX_TOKENS, "temperature": 0, **options}
    return {"messages": [{"role": "user", "content": content}], **options}


async def ask(session: aiohttp.ClientSession, body: Any) -> tuple[int, str]:
    """Return the status, and the answer or the text of the error."""
    async with session.post(CHAT, data=json.dumps(body), headers=HEADERS) as response:
        if response.status != 200:
            return response.status, await response.text()
        answer = await response.json()
        return 200, answer["choices"][0]["message"]["content"]


async def run_healthy_client(
    session: aiohttp.ClientSession,
    images: Sequence[bytes],
    expected: Sequence[str],
    outcomes: Outcomes,
    number: int,
    end: float,
) -> None:
    """Request captions as a well-behaved client, until the time `end`."""
    while time.monotonic() < end:
        index = number % len(images)
        number += 1
        start = time.perf_counter()
        try:
            status, text = await ask(session, make_body(images[index]))
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            outcomes.lost[type(error).__name__] += 1
            continue
        if status != 200:
            outcomes.lost[str(status)] += 1
            continue
        outcomes.seconds.append(time.perf_counter() - start)
        outcomes.changed += text != expected[index]


# ---- hostile clients ----


def make_bomb() -> bytes:
    """Return a small file of 49 megapixels."""
    file = io.BytesIO()
    Image.new("1", (7000, 7000)).save(file, "PNG")
    return file.getvalue()


def hostile_bodies(image: bytes) -> list[bytes]:
    """Return request bodies that are invalid, huge, or request too much."""
    text = [{"role": "user", "content": "x"}]
    bodies: list[Any] = [
        make_body(make_bomb()),
        make_body(image[:200]),
        make_body(b"GIF89a" + bytes(500)),
        make_body(image, temperature=1e-38),
        make_body(image, temperature=1e308),
        make_body(image, repetition_penalty=1e-300, temperature=1.0),
        make_body(image, top_p=-1),
        make_body(image, n=10**9),
        make_body(image, max_tokens=-5),
        make_body(image, stop=["x" * 10_000]),
        {"messages": [{"role": "user", "content": "x" * 2_000_000}]},
        {"messages": text * 10_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 50_000}]},
        {"messages": [{"role": "user", "content": "<image>" * 10_000}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}],
                }
            ]
        },
        {"messages": None},
    ]
    raw = [b"{", b"[" * 1_000_000, b"\xff" * 1000, b'{"max_tokens": ' + b"9" * 1_000_000 + b"}"]
    return [json.dumps(body).encode() for body in bodies] + raw


async def send_raw(port: int, data: bytes, seconds: float) -> None:
    """Send bytes, wait, and close the connection without reading."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await asyncio.sleep(seconds)
    writer.close()


async def run_hostile_client(
    session: aiohttp.ClientSession,
    port: int,
    bodies: Sequence[bytes],
    image: bytes,
    outcomes: Outcomes,
    number: int,
    end: float,
) -> None:
    """Send hostile requests, and open hostile connections, until the time `end`."""
    generator = random.Random(number)  # each client has its own sequence, the same in every run
    valid = json.dumps(make_body(image)).encode()
    head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    complete_head = head % CHAT.encode() + b"Content-Length: %d\r\n\r\n" % len(valid)
    connections = [
        b"POST",  # an incomplete head
        complete_head + valid[:100],  # an incomplete body
        complete_head + valid,  # a valid request whose answer is not read
        # Two contradictory lengths, as for request smuggling.
        head % CHAT.encode() + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        bytes(1000),  # not HTTP
        b"GET /" + b"a" * 100_000,  # a huge path
    ]
    while time.monotonic() < end:
        try:
            if generator.random() < 0.3:
                await send_raw(port, generator.choice(connections), generator.random())
                outcomes.hostile["left"] += 1
                continue
            body = generator.choice(bodies)
            async with session.post(CHAT, data=body, headers=HEADERS) as response:
                await response.read()
                outcomes.hostile[str(response.status)] += 1
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            outcomes.hostile["closed"] += 1


# ---- phases ----


async def watch_memory(process: psutil.Process, outcomes: Outcomes) -> None:
    """Record the largest resident memory of a process, until the task is cancelled."""
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            outcomes.peak = max(outcomes.peak, process.memory_info().rss)
        await asyncio.sleep(0.1)


async def run_phase(
    process: psutil.Process, url: str, healthy: int, hostile: int, seconds: float
) -> Outcomes:
    """Let healthy and hostile clients use the server for a number of seconds."""
    images = draw_images()
    outcomes = Outcomes()
    port = int(url.rpartition(":")[2])
    connector = aiohttp.TCPConnector(limit=0)  # no limit: every client needs its own connection
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        # Get the answers of the idle server. Requests of other clients must not change them.
        expected = []
        for image in images:
            _, answer = await ask(session, make_body(image))
            expected.append(answer)
        watching = asyncio.create_task(watch_memory(process, outcomes))
        end = time.monotonic() + seconds
        clients = [
            run_healthy_client(session, images, expected, outcomes, number, end)
            for number in range(healthy)
        ]
        bodies = hostile_bodies(images[0])
        clients += [
            run_hostile_client(session, port, bodies, images[0], outcomes, number, end)
            for number in range(hostile)
        ]
        await asyncio.gather(*clients)
        watching.cancel()
    return outcomes


def main() -> int:
    """Run both phases, and print their outcomes; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clients",
        type=int,
        default=200,
        help="Number of clients, hostile ones included (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=300,
        help="Duration of each phase in seconds (default: %(default)s)",
    )
    parser.add_argument(
        "--hostile", type=float, default=0.1, help="Share of hostile clients (default: %(default)s)"
    )
    args = parser.parse_args()
    hostile = round(args.clients * args.hostile)
    healthy = args.clients - hostile
    with tempfile.TemporaryDirectory() as root:
        checkpoint = write_checkpoint(Path(root))
        phases = []
        for number in (0, hostile):
            # Start a new server for each phase, so that its memory does not include the memory of the previous phase.
            # The queue has room for two requests per client, so it is never full, and a rejected healthy request is a
            # fault.
            with running_server(checkpoint, queue=2 * args.clients) as (process, url):
                phases.append(asyncio.run(run_phase(process, url, healthy, number, args.seconds)))
    alone, attacked = phases
    ratio = attacked.p95 / alone.p95
    print(alone.describe("healthy only"))
    print(attacked.describe(f"{args.hostile:.0%} hostile"))
    print(f"hostile requests: {dict(attacked.hostile)}")
    print(f"p95 with hostile clients: {ratio:.2f}x; memory: {attacked.peak / alone.peak:.2f}x")
    lost = sum(attacked.lost.values()) + sum(alone.lost.values())
    if lost or attacked.changed or alone.changed or ratio > MAX_RATIO:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
