"""`llava caption --endpoint` with `llava serve`: the captions equal those of the model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server

from llava_simplified.captioning.endpoint_options import EndpointOptions
from llava_simplified.captioning.runner import CaptionJob, caption_file
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava

OPTIONS = [
    GenerationOptions(max_new_tokens=8, seed=0),
    GenerationOptions(
        8,
        0,
        temperature=1.0,
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.2,
        num_return_sequences=2,
        seed=3,
    ),
]


@pytest.fixture(scope="module")
def server(model: Llava) -> Iterator[LiveServer]:
    # The queue is small, so most requests are refused with status 429 at first.
    with live_server(model, batch_size=4, max_queue=4) as server:
        yield server


@pytest.fixture
def folder(photos: list[bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, photo in enumerate(photos):
        (folder / f"{number:02}.png").write_bytes(photo)
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def read_rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


@pytest.mark.medium
@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "sampled"])
def test_captions_of_our_server_equal_those_of_the_model(
    model: Llava, server: LiveServer, folder: Path, tmp_path: Path, options: GenerationOptions
) -> None:
    local = CaptionJob("", str(folder), str(tmp_path / "local.jsonl"), options)
    endpoint = EndpointOptions(f"{server.url}/v1", "tiny", concurrency=12, retries=0)
    remote = replace(local, output=str(tmp_path / "remote.jsonl"), endpoint=endpoint)
    assert caption_file(remote) == caption_file(local, model) == (20, 1)
    rows = read_rows(remote.output)
    reasons = {row.pop("finish_reason", None) for row in rows}
    assert rows == read_rows(local.output)
    assert reasons == {None, "length"}
    assert len({row["pred_output"] for row in rows}) > 10, "the captions must depend on the images"
    assert read_rows(f"{remote.output}.bad.jsonl") == read_rows(f"{local.output}.bad.jsonl")


def test_records_with_conversations_are_answered_alike(
    model: Llava, server: LiveServer, folder: Path, tmp_path: Path
) -> None:
    turns = [
        ("system", "Be brief."),
        ("human", "<image>\nWhat?"),
        ("gpt", "It."),
        ("human", "Why?"),
    ]
    conversation = [{"from": role, "value": text} for role, text in turns]
    data = tmp_path / "data.json"
    rows = [
        {"image": "00.png", "conversations": conversation},
        {"image": "01.png", "instruction": "What is it?", "response": "a cat"},
        {"instruction": "Say it."},
    ]
    data.write_text(json.dumps(rows))
    local = CaptionJob(
        "", str(data), str(tmp_path / "local.jsonl"), OPTIONS[0], image_folder=str(folder)
    )
    endpoint = EndpointOptions(f"{server.url}/v1", "tiny")
    remote = replace(local, output=str(tmp_path / "remote.jsonl"), endpoint=endpoint)
    assert caption_file(remote) == caption_file(local, model) == (3, 0)
    received = read_rows(remote.output)
    for row in received:
        row.pop("finish_reason", None)
    assert received == read_rows(local.output)
