"""Fixtures that all attacks share: one checkpoint, one server, and a healthy client."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

# The helpers that run a server are in tests/serve.
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from hostile import HealthyClient, expected_text
from live_server import Limits, LiveServer, live_server
from tiny import build_llava

from llava_simplified.model.checkpoint import save_checkpoint
from llava_simplified.model.config import LlavaConfig, TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora
from llava_simplified.serve.connections import TimedH11Protocol


@pytest.fixture(scope="session")
def checkpoint(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an adapter."""
    config = LlavaConfig(str(models_folder / "mistral"), str(models_folder / "clip"))
    model = build_llava(models_folder).requires_grad_(False)
    add_lora(model, rank=2, alpha=4)
    folder = tmp_path_factory.mktemp("attacked") / "tiny"
    save_checkpoint(model, folder, config, TrainedParts("adapter"))
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Llava:
    return Llava.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def server(model: Llava, photos: Sequence[bytes]) -> Iterator[LiveServer]:
    """One server with the page for all attacks. It waits only 1.5 s for the head of a request."""
    head_seconds = TimedH11Protocol.HEAD_SECONDS
    TimedH11Protocol.HEAD_SECONDS = 1.5
    limits = Limits(max_body=3_000_000, max_tokens=32)
    with live_server(model, limits=limits, examples=photos[:1], max_queue=100) as server:
        yield server
    TimedH11Protocol.HEAD_SECONDS = head_seconds


@pytest.fixture(scope="session")
def expected_answer(model: Llava, photos: Sequence[bytes]) -> str:
    """What the model generates for the request of the healthy client."""
    return expected_text(model, photos[0])


@pytest.fixture
def healthy(
    server: LiveServer,
    expected_answer: str,
    photos: Sequence[bytes],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[HealthyClient]:
    """A client that sends the same request all the time, during an attack.

    After the attack, all of its answers must be equal, and the server must not have logged a traceback or status 500.
    """
    with caplog.at_level(logging.INFO):
        with HealthyClient(server, expected_answer, photos[0]) as client:
            yield client
        assert client.answers, "no request was answered during the attack"
        assert client.answers == [client.expected] * len(client.answers)
    for record in caplog.records:
        assert record.exc_info is None, record
        assert not record.getMessage().startswith("500 "), record
