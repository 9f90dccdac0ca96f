"""Requests that share the model must not feel each other, and whoever leaves takes nothing along."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import torch

from llava_simplified.data.images import ImageError
from llava_simplified.model.generation import DecodingBatch
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message
from llava_simplified.serve.engine import Busy, Piece, Place, Worker

T = TypeVar("T")


def serve(model: Llava, use: Callable[[Worker], Awaitable[T]], **limits: float) -> T:
    async def run() -> T:
        async with Worker(model, **limits) as worker:  # type: ignore[arg-type]
            result = await use(worker)
            for _ in range(100):
                if not worker.rows:
                    break
                await asyncio.sleep(0.01)
            assert worker.alive
            assert not worker.places and not worker.rows, "nobody is left"
            assert worker._decoding is None or not (
                worker._decoding.generated_ids or worker._decoding.active
            )
            return result

    return asyncio.run(run())


async def answers(worker: Worker, turns: str | list[Message], images: list[bytes], stop: tuple[str, ...] = (), **options) -> list[str]:  # fmt: skip
    with worker.place() as place:
        await place.ask(turns, images, GenerationOptions(**options), stop)
        said = [""] * options.get("num_return_sequences", 1)
        ends = [""] * len(said)
        async for piece in place:
            assert not ends[piece.sample], "nothing comes after the end"
            said[piece.sample] += piece.text
            ends[piece.sample] = piece.finish
        assert all(end in ("stop", "length") for end in ends)
        return said


def test_everybody_gets_the_answer_that_the_model_gives_alone(
    model: Llava, photos: list[bytes]
) -> None:
    """Pictures, text alone, two pictures, a conversation; greedy and sampled; joining whenever they come."""
    talk = [
        Message("user", "<image>\nWhat?"),
        Message("assistant", "a cat"),
        Message("user", "Where?"),
    ]
    wanted: list[tuple[object, ...]] = []
    for number, photo in enumerate(photos[:10]):
        greedy = {"max_new_tokens": 4 + number}
        wanted += [("What is this?", [photo], greedy), (talk, [photo], greedy)]
        wanted.append(("<image> or <image>?", [photo, photos[0]], greedy))
        wanted.append(("Say something.", [], {**greedy, "temperature": 1.0, "seed": number}))
    alone = [model.chat(turns, images, **options) for turns, images, options in wanted]
    assert len(set(alone)) > 0.8 * len(alone), "different questions, different answers"

    async def use(worker: Worker) -> list[str]:
        async def one(turns: str, images: list[bytes], options: dict) -> str:
            await asyncio.sleep(random.random() / 5)
            return (await answers(worker, turns, images, **options))[0]

        return await asyncio.gather(*(one(*request) for request in wanted))

    assert serve(model, use, batch_size=7, queue=100) == alone


def test_samples_of_one_request(model: Llava, photos: list[bytes]) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    alone = model.caption(photos[0], "What?", num_return_sequences=3, **options)
    said = serve(
        model,
        lambda worker: answers(worker, "What?", photos[:1], num_return_sequences=3, **options),
    )
    assert said == alone
    assert len(set(said)) == 3


def test_an_answer_ends_before_a_stop_text_even_one_in_pieces(
    model: Llava, photos: list[bytes]
) -> None:
    whole = model.chat("What?", photos[1:2], max_new_tokens=30)
    assert len(whole) > 12
    stop = whole[7:12]  # some letters of several tokens

    async def use(worker: Worker) -> list[str]:
        never = await answers(
            worker, "What?", photos[1:2], max_new_tokens=30, stop=("never said", whole[-3:] + "x")
        )
        assert never == [whole], (
            "what was kept back for a stop that did not come is said in the end"
        )
        return await answers(
            worker, "What?", photos[1:2], max_new_tokens=30, stop=("never said", stop)
        )

    assert serve(model, use) == [whole[: whole.index(stop)].rstrip()]


def test_who_leaves_early_frees_the_rows_and_the_others_go_on(
    model: Llava, photos: list[bytes]
) -> None:
    stop_ids, model.prompt.stop_ids = model.prompt.stop_ids, [10**6]  # nobody ends by himself

    async def use(worker: Worker) -> None:
        async def leave(photo: bytes) -> None:
            with worker.place() as place:
                await place.ask("What?", [photo], GenerationOptions(max_new_tokens=4000))
                async for _ in place:
                    return

        stays = asyncio.create_task(answers(worker, "What?", photos[-1:], max_new_tokens=40))
        endless = [
            asyncio.create_task(answers(worker, "What?", [photo], max_new_tokens=4000))
            for photo in photos[:8]
        ]
        while len(worker.rows) < 4:
            await asyncio.sleep(0.01)
        for task in endless:  # some speak, some wait
            task.cancel()
        ends = await asyncio.gather(*endless, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        await asyncio.gather(*(leave(photo) for photo in photos[:8]))
        assert await stays == alone

    try:
        alone = [model.chat("What?", photos[-1:], max_new_tokens=40)]
        serve(model, use, batch_size=4)
    finally:
        model.prompt.stop_ids = stop_ids


@pytest.mark.parametrize("ticks", range(5))
def test_who_leaves_as_a_piece_comes_has_left(model: Llava, ticks: int) -> None:
    async def use(worker: Worker) -> None:
        async def read() -> None:
            with worker.place() as place:
                places.append(place)
                async for _ in place:
                    pass

        places: list[Place] = []
        reader = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        places[0].put(Piece(0, "a", 1, ""))
        for _ in range(ticks):
            await asyncio.sleep(0)
        reader.cancel()
        done, _ = await asyncio.wait([reader], timeout=5)
        if not done:
            reader.cancel()
        assert done, "the cancellation was lost"

    serve(model, use)


def test_limits(model: Llava, photos: list[bytes]) -> None:
    async def use(worker: Worker) -> None:
        with worker.place(), worker.place(), worker.place() as third:
            with pytest.raises(Busy) as busy, worker.place():
                pass
            assert busy.value.retry_after >= 1
            await third.ask("What?", photos[:1], GenerationOptions(max_new_tokens=2))
        with worker.place() as place:
            with pytest.raises(ImageError, match="not an image"):
                await place.ask("What?", [b"nothing"])
            with pytest.raises(ValueError, match=r"tokens are asked.*together they may be 100"):
                await place.ask("What?", photos[:1], GenerationOptions(max_new_tokens=90))
            with pytest.raises(ValueError, match="7 pictures do not fit"):
                await place.ask("What?", [b"not even read"] * 7)
            with pytest.raises(ValueError, match="2 answers at most"):
                await place.ask(
                    "What?", photos[:1], GenerationOptions(temperature=1, num_return_sequences=3)
                )

    serve(model, use, batch_size=2, queue=1, context=100)


def test_time_is_up_whether_one_waits_or_speaks(model: Llava, photos: list[bytes]) -> None:
    stop_ids, model.prompt.stop_ids = model.prompt.stop_ids, [10**6]

    async def use(worker: Worker) -> None:
        asked = [answers(worker, "What?", photos[:1], max_new_tokens=4000) for _ in range(2)]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(end, asyncio.TimeoutError) for end in ends), ends

    try:
        serve(model, use, batch_size=1, timeout=0.5)
    finally:
        model.prompt.stop_ids = stop_ids


def test_a_fault_of_the_model_is_told_to_those_under_way_and_the_next_are_served(
    model: Llava, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = DecodingBatch.step, [0]

    def fails(decoding: DecodingBatch) -> list[tuple[int, int]]:
        steps[0] += 1
        if steps[0] == 3:
            raise torch.OutOfMemoryError("no memory")
        return step(decoding)

    monkeypatch.setattr(DecodingBatch, "step", fails)

    async def use(worker: Worker) -> list[str]:
        with pytest.raises(RuntimeError, match="the model failed"):
            await answers(worker, "What?", photos[1:2], max_new_tokens=20)
        return await answers(worker, "What?", photos[1:2], max_new_tokens=20)

    assert serve(model, use) == [model.chat("What?", photos[1:2], max_new_tokens=20)]


def test_other_work_on_the_model_comes_between_two_steps(model: Llava, photos: list[bytes]) -> None:
    async def use(worker: Worker) -> tuple[list[str], str]:
        talking = asyncio.create_task(answers(worker, "What?", photos[1:2], max_new_tokens=20))
        other = await worker.call(lambda model: model.chat("Where?", photos[1:2], max_new_tokens=5))
        return await talking, other

    first, second = serve(model, use)
    assert first == [model.chat("What?", photos[1:2], max_new_tokens=20)]
    assert second == model.chat("Where?", photos[1:2], max_new_tokens=5)
