"""Section "serving" of `bench_gpu.py`: the engine of `llava serve` with several clients at the same time.

Each client sends its next request as soon as it has the answer to the last one. The clients call the engine directly,
without HTTP.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from gpu_models import build, make_images
from gpu_report import Report, Values
from gpu_workload import Workload
from workload import draw_caption_lengths

from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.serve.engine import Engine

BATCH_SIZE = 64


@dataclass
class Answers:
    """The answers that all clients have received.

    Attributes:
        count: Number of answers.
        tokens: Number of tokens of all answers.
        first_token_seconds: Time to the first token of each answer.
    """

    count: int = 0
    tokens: int = 0
    first_token_seconds: list[float] = field(default_factory=list)


def run(workload: Workload, report: Report) -> None:
    """Run the section."""
    model = build(workload, workload.large).requires_grad_(False)
    seconds = workload.pick(30.0, 0.3)
    client_numbers = workload.pick((1, 16, 64), (1, 3))
    # Warm up with the largest number of clients first, whose batch allocates the memory that smaller batches use too.
    # In the opposite order, each larger batch would allocate new memory, which invalidates the CUDA graphs that were
    # recorded before.
    for clients in reversed(client_numbers):
        asyncio.run(serve(workload, model, clients, workload.pick(2.0, 0.1)))
    for clients in client_numbers:
        report.attempt(
            f"{clients} clients",
            partial(asyncio.run, serve(workload, model, clients, seconds)),
            seconds,
        )


async def serve(workload: Workload, model: Llava, clients: int, seconds: float) -> Values:
    """Run clients for a number of seconds, and return the throughput and the time to the first token."""
    pixels = [image.permute(1, 2, 0).numpy() for image in make_images(workload).values()]
    answers = Answers()
    async with Engine(model, batch_size=BATCH_SIZE, max_queue=BATCH_SIZE) as engine:
        start = time.perf_counter()
        end = start + seconds
        tasks = [client(engine, number, pixels, end, answers) for number in range(clients)]
        await asyncio.gather(*tasks)
        elapsed = time.perf_counter() - start
    times = sorted(answers.first_token_seconds)
    return {
        "tokens/s": answers.tokens / elapsed,
        "answers/s": answers.count / elapsed,
        "first token, median s": statistics.median(times),
        "first token, 95 % s": times[int(0.95 * (len(times) - 1))],
    }


async def client(
    engine: Engine, number: int, pixels: list[np.ndarray], end: float, answers: Answers
) -> None:
    """Send requests one after the other until `end`, at least one."""
    # Clients draw different images and lengths, which are the same in every run.
    draw = random.Random(number)
    lengths = draw_caption_lengths(100)
    while True:
        length = draw.choice(lengths)
        # With random weights, the model generates no end token, so set the exact length of the answer.
        options = GenerationOptions(max_new_tokens=length, min_new_tokens=length)
        await ask(engine, draw.choice(pixels), options, answers)
        if time.perf_counter() >= end:
            return


async def ask(engine: Engine, image: Any, options: GenerationOptions, answers: Answers) -> None:
    """Send one request, and wait for its answer."""
    start = time.perf_counter()
    is_first = True
    with engine.open_request() as request:
        await request.submit("Say:", [image], options)
        async for delta in request:
            if is_first:
                answers.first_token_seconds.append(time.perf_counter() - start)
                is_first = False
            last = delta.num_tokens
    answers.count += 1
    answers.tokens += last
