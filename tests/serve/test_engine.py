"""Continuous batching: requests do not affect each other, and leave nothing behind."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from live_server import assert_idle, paused_after, without_end_tokens
from PIL import Image
from tiny import nan_features_for

from llava_simplified.data import images
from llava_simplified.data.images import ImageError
from llava_simplified.model import generation
from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message
from llava_simplified.serve.engine import (
    Delta,
    Engine,
    QueueFullError,
    RequestError,
    RequestHandle,
)

T = TypeVar("T")


def run_engine(model: Llava, use: Callable[[Engine], Awaitable[T]], **options: Any) -> T:
    """Start an engine, use it, and assert that it keeps no data of its requests."""

    async def run() -> T:
        async with Engine(model, **options) as engine:
            result = await use(engine)
            for _ in range(500):
                if not engine.sequences_running:
                    break
                await asyncio.sleep(0.01)
            assert engine.is_running
            assert_idle(engine)
            return result

    return asyncio.run(run())


async def generate_answers(
    engine: Engine,
    messages: str | list[Message],
    images: list[bytes],
    stop: tuple[str, ...] = (),
    **options: Any,
) -> list[str]:
    """Return the answers to one request, joined from their deltas."""
    with engine.open_request() as request:
        await request.submit(messages, images, GenerationOptions(**options), stop)
        count = options.get("num_return_sequences", 1)
        texts = [""] * count
        finish_reasons: list[str | None] = [None] * count
        async for delta in request:
            assert finish_reasons[delta.index] is None, "a delta after the end of its sequence"
            texts[delta.index] += delta.text
            finish_reasons[delta.index] = delta.finish_reason
        assert set(finish_reasons) <= {"stop", "length"}
        return texts


# ---- answers ----


@pytest.mark.medium
def test_engine_gives_the_answers_that_the_model_gives_alone(
    model: Llava, photos: list[bytes]
) -> None:
    """The requests have no, one or two images, are greedy or sampled, and join the batch at any time."""
    conversation = [
        Message("user", "<image>\nWhat?"),
        Message("assistant", "a cat"),
        Message("user", "Where?"),
    ]
    requests: list[tuple[Any, list[bytes], dict[str, Any]]] = []
    for number, photo in enumerate(photos[:10]):
        greedy = {"max_new_tokens": 4 + number}
        sampled = {**greedy, "temperature": 1.0, "seed": number}
        requests.append(("What is this?", [photo], greedy))
        requests.append((conversation, [photo], greedy))
        requests.append(("<image> or <image>?", [photo, photos[0]], greedy))
        requests.append(("Say something.", [], sampled))
    alone = [model.chat(messages, images, **options) for messages, images, options in requests]
    assert len(set(alone)) > 0.8 * len(alone), (
        "the answers must differ for the test to mean anything"
    )

    async def use(engine: Engine) -> list[str]:
        async def answer(messages: Any, images: list[bytes], options: dict[str, Any]) -> str:
            await asyncio.sleep(random.random() / 5)
            return (await generate_answers(engine, messages, images, **options))[0]

        return await asyncio.gather(*(answer(*request) for request in requests))

    assert run_engine(model, use, batch_size=7, max_queue=100) == alone


def test_engine_gives_all_sequences_of_a_request(model: Llava, photos: list[bytes]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    alone = model.caption(photos[0], "What?", num_return_sequences=3, **options)

    def use(engine: Engine) -> Awaitable[list[str]]:
        return generate_answers(engine, "What?", photos[:1], num_return_sequences=3, **options)

    answers = run_engine(model, use)
    assert answers == alone
    assert len(set(answers)) == 3


def test_stop_text_of_several_tokens_ends_answer(model: Llava, photos: list[bytes]) -> None:
    whole = model.chat("What?", photos[1:2], max_new_tokens=30)
    assert len(whole) > 12
    stop = whole[7:12]
    almost = whole[-3:] + "x"  # the answer ends with the beginning of this text

    async def use(engine: Engine) -> tuple[list[str], list[str]]:
        arguments = (engine, "What?", photos[1:2])
        unaffected = await generate_answers(*arguments, ("absent", almost), max_new_tokens=30)
        stopped = await generate_answers(*arguments, ("absent", stop), max_new_tokens=30)
        return unaffected, stopped

    unaffected, stopped = run_engine(model, use)
    assert unaffected == [whole], "held-back text must be sent when the answer ends"
    assert stopped == [whole[: whole.index(stop)].rstrip()]


def test_run_on_model_runs_between_steps(model: Llava, photos: list[bytes]) -> None:
    async def use(engine: Engine) -> tuple[list[str], str]:
        answering = asyncio.create_task(
            generate_answers(engine, "What?", photos[1:2], max_new_tokens=20)
        )
        other = await engine.run_on_model(
            lambda model: model.chat("Where?", photos[1:2], max_new_tokens=5)
        )
        return await answering, other

    answers, other = run_engine(model, use)
    assert answers == [model.chat("What?", photos[1:2], max_new_tokens=20)]
    assert other == model.chat("Where?", photos[1:2], max_new_tokens=5)


# ---- leaving early ----


def test_cancelled_requests_free_their_sequences(model: Llava, photos: list[bytes]) -> None:
    async def use(engine: Engine) -> list[str]:
        async def read_one_delta(photo: bytes) -> None:
            with engine.open_request() as request:
                await request.submit("What?", [photo], GenerationOptions(max_new_tokens=4000))
                async for _ in request:
                    return

        staying = asyncio.create_task(
            generate_answers(engine, "What?", photos[-1:], max_new_tokens=40)
        )
        endless = [
            asyncio.create_task(generate_answers(engine, "What?", [photo], max_new_tokens=4000))
            for photo in photos[:8]
        ]
        while len(engine.sequences_running) < 4:
            await asyncio.sleep(0.01)
        # Some of the requests are running, others are waiting.
        for task in endless:
            task.cancel()
        results = await asyncio.gather(*endless, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await asyncio.gather(*(read_one_delta(photo) for photo in photos[:8]))
        return await staying

    with without_end_tokens(model):
        alone = [model.chat("What?", photos[-1:], max_new_tokens=40)]
        assert run_engine(model, use, batch_size=4) == alone


@pytest.mark.parametrize("ticks", range(5))
def test_cancellation_together_with_delta_is_not_lost(model: Llava, ticks: int) -> None:
    """Cancel a reader some ticks of the event loop after a delta has arrived."""

    async def use(engine: Engine) -> None:
        requests: list[RequestHandle] = []

        async def read() -> None:
            with engine.open_request() as request:
                requests.append(request)
                async for _ in request:
                    pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        requests[0].put(Delta(0, "a", 1, None))
        for _ in range(ticks):
            await asyncio.sleep(0)
        reader.cancel()
        done, _ = await asyncio.wait([reader], timeout=5)
        if not done:
            reader.cancel()
        assert done, "the cancellation was lost"

    run_engine(model, use)


def test_closed_requests_leave_the_queue_at_once(model: Llava, photos: list[bytes]) -> None:
    """Clients that give up while the first request of the queue waits for free sequences."""

    async def use(engine: Engine) -> None:
        running = asyncio.create_task(
            generate_answers(engine, "What?", photos[:1], max_new_tokens=4000)
        )
        while not engine.sequences_running:
            await asyncio.sleep(0.01)
        first = asyncio.create_task(
            generate_answers(engine, "What?", photos[:1], temperature=1, num_return_sequences=2)
        )
        while not engine._waiting:
            await asyncio.sleep(0.01)
        for _ in range(3):
            with engine.open_request() as request:
                await request.submit("What?", photos[:1])
                assert len(engine._waiting) == 2
            assert len(engine._waiting) == 1
            assert request.pixel_values is None
        for task in (running, first):
            task.cancel()
        await asyncio.gather(running, first, return_exceptions=True)
        assert not engine._waiting

    with without_end_tokens(model):
        run_engine(model, use, batch_size=2)


# ---- limits ----


def test_full_queue_refuses_requests(model: Llava, photos: list[bytes]) -> None:
    async def use(engine: Engine) -> None:
        with engine.open_request(), engine.open_request(), engine.open_request() as third:
            with pytest.raises(QueueFullError) as refused, engine.open_request():
                pass
            assert refused.value.retry_after >= 1
            await third.submit("What?", photos[:1], GenerationOptions(max_new_tokens=2))

    run_engine(model, use, batch_size=2, max_queue=1)


def test_submit_refuses_invalid_requests(model: Llava, photos: list[bytes]) -> None:
    async def use(engine: Engine) -> None:
        with engine.open_request() as request:
            with pytest.raises(ImageError) as unreadable:
                await request.submit("What?", [b"no image"])
            assert unreadable.value.kind == "not_image"
            with pytest.raises(RequestError) as too_long:
                await request.submit("What? " * 50, photos[:1])
            assert too_long.value.code == "context_length_exceeded"
            with pytest.raises(RequestError) as no_room:
                await request.prepare("What?", photos[:1], answer_tokens=90)
            assert no_room.value.code == "context_length_exceeded"
            with pytest.raises(RequestError) as too_many_images:
                await request.submit("What?", [b"not even decoded"] * 7)
            assert too_many_images.value.code == "context_length_exceeded"
            with pytest.raises(RequestError) as too_many_answers:
                options = GenerationOptions(temperature=1, num_return_sequences=3)
                await request.submit("What?", photos[:1], options)
            assert too_many_answers.value.param == "n"
            with pytest.raises(RequestError) as beams:
                await request.submit("What?", photos[:1], GenerationOptions(num_beams=2))
            assert beams.value.param == "num_beams"

    run_engine(model, use, batch_size=2, max_context=100)


def test_requests_time_out_while_running_and_while_waiting(
    model: Llava, photos: list[bytes]
) -> None:
    """The batch has room for one request, and the model never finishes its third step in time."""

    async def use(engine: Engine) -> list[Any]:
        running_and_waiting = [
            generate_answers(engine, "What?", photos[:1], max_new_tokens=4000) for _ in range(2)
        ]
        results = await asyncio.gather(*running_and_waiting, return_exceptions=True)
        resume.set()
        return results

    with without_end_tokens(model), paused_after(model, steps=2) as resume:
        results = run_engine(model, use, batch_size=1, timeout=0.5)
    assert [type(result) for result in results] == [asyncio.TimeoutError] * 2


# ---- failures ----


def test_failed_step_ends_requests_and_next_ones_are_served(
    model: Llava, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DecodingBatch.step
    steps = 0

    def fail_third_step(batch: DecodingBatch) -> list[tuple[int, int]]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise torch.OutOfMemoryError("no memory")
        return step(batch)

    monkeypatch.setattr(DecodingBatch, "step", fail_third_step)

    async def use(engine: Engine) -> list[str]:
        with pytest.raises(RuntimeError) as failed:
            await generate_answers(engine, "What?", photos[1:2], max_new_tokens=20)
        assert isinstance(failed.value.__cause__, torch.OutOfMemoryError)
        return await generate_answers(engine, "What?", photos[1:2], max_new_tokens=20)

    assert run_engine(model, use) == [model.chat("What?", photos[1:2], max_new_tokens=20)]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_image_with_nan_logits_fails_alone(
    model: Llava, photos: list[bytes], temperature: float
) -> None:
    """All requests have the same options and length, so they are sampled as one group."""
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "seed": 4}
    alone = [model.chat("What?", [photo], **options) for photo in photos[1:6]]

    async def use(engine: Engine) -> tuple[list[Any], list[str]]:
        answers = [generate_answers(engine, "What?", [photo], **options) for photo in photos[:6]]
        together = await asyncio.gather(*answers, return_exceptions=True)
        with pytest.raises(RuntimeError):
            await generate_answers(engine, "What?", photos[:1], **options)
        return together, await generate_answers(engine, "What?", photos[1:2], **options)

    with nan_features_for(model, photos[0]):
        (failed, *others), afterwards = run_engine(model, use)
    assert isinstance(failed, RuntimeError)
    assert isinstance(failed.__cause__, FloatingPointError)
    assert others == [[answer] for answer in alone]
    assert afterwards == [alone[0]]


@pytest.mark.parametrize(("size", "at_once"), [((7000, 5000), 1), ((1000, 1000), 2)])
def test_images_are_decoded_within_a_budget_of_pixels(
    model: Llava, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], at_once: int
) -> None:
    """Images of 35 megapixels are decoded one after the other, small images at the same time."""
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    lock = threading.Lock()
    second_began = threading.Event()
    now = most = 0

    def decode(data: bytes) -> np.ndarray:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if most == 2:
                second_began.set()
        second_began.wait(0.3)
        with lock:
            now -= 1
        return np.zeros((8, 8, 3), np.uint8)

    async def use(engine: Engine) -> list[list[str]]:
        answers = [
            generate_answers(engine, "What?", [file.getvalue()], max_new_tokens=2) for _ in range(2)
        ]
        return await asyncio.gather(*answers)

    monkeypatch.setattr(images, "decode_image", decode)
    assert len(run_engine(model, use)) == 2
    assert most == at_once


def test_model_refuses_nan_logits(model: Llava, photos: list[bytes]) -> None:
    """Without a server, the model raises the error instead of returning a meaningless caption."""
    with nan_features_for(model, photos[0]):
        with pytest.raises(FloatingPointError):
            model.caption(photos[0], max_new_tokens=3)
        with pytest.raises(FloatingPointError):
            model.chat("What?", photos[:1], temperature=1.0, max_new_tokens=3)


def test_exception_while_sampling_fails_one_request(
    model: Llava, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a group of sequences has failed, each is sampled again separately, which must not change its samples."""
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    alone = [model.chat("What?", [photo], **options) for photo in photos[:5]]
    process_logits = generation.process_logits
    first_tokens: list[int] = []

    def fail_for_first(scores: torch.Tensor, tokens: Any, options: GenerationOptions) -> Any:
        for generated in tokens:
            if len(generated) == 3 and not first_tokens:
                first_tokens.extend(generated)
            if first_tokens and generated[:3] == first_tokens:
                raise ValueError("this sequence cannot be processed")
        return process_logits(scores, tokens, options)

    monkeypatch.setattr(generation, "process_logits", fail_for_first)

    async def use(engine: Engine) -> list[Any]:
        answers = [generate_answers(engine, "What?", [photo], **options) for photo in photos[:5]]
        return await asyncio.gather(*answers, return_exceptions=True)

    results = run_engine(model, use)
    failed = [isinstance(result, RuntimeError) for result in results]
    assert sum(failed) == 1
    for result, answer, has_failed in zip(results, alone, failed):
        assert has_failed or result == [answer]


def test_failing_sequence_ends_all_sequences_of_its_request(
    model: Llava, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    next_delta = RequestHandle.next_delta

    def fail_for_second(self: RequestHandle, index: int, *arguments: Any) -> Delta:
        if index == 1:
            raise UnicodeError("this text cannot be decoded")
        return next_delta(self, index, *arguments)

    monkeypatch.setattr(RequestHandle, "next_delta", fail_for_second)

    async def use(engine: Engine) -> tuple[Any, list[str]]:
        three = {"num_return_sequences": 3, "temperature": 1.0, "max_new_tokens": 12}
        return await asyncio.gather(
            generate_answers(engine, "What?", photos[:1], **three),
            generate_answers(engine, "What?", photos[1:2], max_new_tokens=12),
            return_exceptions=True,
        )

    failed, other = run_engine(model, use)
    assert isinstance(failed, RuntimeError)
    assert other == [model.chat("What?", photos[1:2], max_new_tokens=12)]


def test_reader_threads_have_no_openmp_threads(model: Llava) -> None:
    async def count_threads(engine: Engine) -> int:
        return await asyncio.wrap_future(engine.reader_threads.submit(torch.get_num_threads))

    torch.set_num_threads(3)
    try:
        assert run_engine(model, count_threads) == 1
    finally:
        torch.set_num_threads(1)
