"""A tiny model that answers differently for every image, as a checkpoint and in memory."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cli_process import ForkedProcess
from tiny import save_llava

from llava_simplified.model.llava import Llava


@pytest.fixture(scope="session")
def checkpoint(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(models_folder, tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Llava:
    model = Llava.from_pretrained(checkpoint)
    # The random model hardly ever generates its only end token, so give it more end tokens.
    model.prompt.stop_ids = [*model.prompt.stop_ids, *range(3, 20)]
    return model


StartedServer = tuple[ForkedProcess, str]


@pytest.fixture
def command(checkpoint: Path) -> Iterator[Callable[..., StartedServer]]:
    """Start `llava serve` with options; return the process and its URL as soon as it answers."""
    started: list[ForkedProcess] = []

    def start(*options: str) -> StartedServer:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        arguments = ["serve", str(checkpoint), "--port", str(port), *options]
        process = ForkedProcess(["llava", *arguments], environment={"LLAVA_API_KEY": ""})
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                httpx.get(f"{url}/health").raise_for_status()
                return process, url
            except httpx.HTTPError:
                assert process.poll() is None, process.stderr
                time.sleep(0.1)
        raise AssertionError("the server did not start within a minute")

    yield start
    for process in started:
        process.kill()
        process.wait()
