"""Fixtures for all tests: tiny models and data on disk, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The test processes share the cores, and tiny models are not faster with several threads. Commands that tests
# start inherit these variables.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The compiler is used for a few tiny layers: starting its worker processes takes longer than the compilation.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Set the environment before torch and transformers are imported. Import them in the fixtures and not at the top
# of this file: the process of pytest-xdist that distributes the tests reads this file too, and the others wait for it.
import contextlib
import functools
import gc
import importlib
import io
import json
import logging
import ssl
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

LANGUAGE_MODELS = ("mistral", "llama", "qwen2", "gemma2", "phi", "opt")
VISION_MODELS = ("clip", "siglip", "dinov2", "vit", "swin", "convnext", "efficientnet")


# Modules of libraries that the package or the tests import, and that are slow to import. A missing one is skipped.
LIBRARIES = [
    "aiohttp",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "gguf",
    "hypothesis.extra.numpy",
    "matplotlib.pyplot",
    "openai",
    "peft",
    "pyarrow.parquet",
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "transformers.models.mistral.modeling_mistral",
    "transformers.trainer",
    "uvicorn",
]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Import libraries before the process begins to measure coverage, which makes imports twice as slow."""
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker or not session.config.pluginmanager.hasplugin("_cov"):
        return
    gc.disable()
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while the tests are imported, which creates a million objects and hardly any garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no process waits for a slow test at the end.

    The coverage of slow tests is not measured: it would make them a quarter slower, and they cover little that
    other tests do not.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker("no_cover")


class GroupsOfTests:
    """Let the groups of pytest-xdist work with pytest 9.2.

    pytest-xdist 3.8 appends the name of a test's group to `_nodeid`, which pytest 9.2 no longer reads. Every test would
    be distributed separately, and each worker would start what a group shares.
    """

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            name = getattr(item, "_nodeid", item.nodeid)
            if name != item.nodeid:
                item._id = type(item.id).parse(name)  # type: ignore[attr-defined]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GroupsOfTests())


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute with one thread, however many cores the machine has."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Exclude the million imported objects from garbage collection.

    Every run of a trainer collects garbage several times, which would otherwise take a quarter of a second each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def workers_are_forked() -> Iterator[None]:
    """Fork the worker processes of commands, as commands do that have not imported torch.

    A spawned worker first imports everything, which takes a second. Forking is safe because of `one_thread`: torch
    then has no threads that a fork could lose. Spawned workers are tested in test_platforms.py.
    """
    from llava_simplified import workers

    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr(workers, "start_method", lambda: "fork")
        yield


@pytest.fixture(scope="session", autouse=True)
def cpu_is_fast_in_16_bits() -> Iterator[None]:
    """Keep the data type of each checkpoint, so that the tests do not depend on the CPU."""
    from llava_simplified.model import cpu_dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_dtype, "seconds_relative_to_float32", lambda dtype: 0.5)
        yield


@pytest.fixture(scope="session", autouse=True)
def plots_are_drawn_once() -> Iterator[None]:
    """Draw the plot of the first run, and copy it for the others: drawing takes a third of a tiny run."""
    from llava_simplified.extras import require_extra
    from llava_simplified.training import plots

    draw = plots.plot_training
    drawn: list[bytes] = []

    def plot_once(log: Path, output: Path) -> None:
        require_extra("report", "matplotlib", purpose="the plot of a run")
        if drawn:
            output.write_bytes(drawn[0])
        else:
            draw(log, output)
            drawn.append(output.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_training", plot_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def templates_are_compiled_once() -> Iterator[None]:
    """Compile a Jinja template once: PEFT's model card takes a tenth of a tiny run."""
    import jinja2

    with pytest.MonkeyPatch.context() as patch:
        compile_once = functools.lru_cache(maxsize=64)(jinja2.Environment.compile)
        patch.setattr(jinja2.Environment, "compile", compile_once)
        yield


@pytest.fixture(scope="session")
def towers_are_traced_once() -> Iterator[None]:
    """Trace a vision tower once for each config: the tests build a thousand models from a few configs."""
    from llava_simplified.model.vision import VisionTower

    trace = VisionTower._trace
    shapes: dict[tuple[Any, ...], Any] = {}

    def trace_once(tower: VisionTower) -> Any:
        config = tower.model.config.to_json_string(use_diff=False)
        options = (tower.select_layers, tower.select_feature, tower.token_pool)
        key = (config, *options, tower.transform.crop)
        if key not in shapes:
            shapes[key] = trace(tower)
        return shapes[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTower, "_trace", trace_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def certificates_are_read_once() -> Iterator[None]:
    """Share one TLS context among all HTTP clients, since the tests do not use TLS.

    Otherwise, every client and every `httpx.get` would read the machine's certificates, which takes longer
    than most requests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory, towers_are_traced_once: None) -> Path:
    """A folder with tiny random models (`mistral`, `clip`, ...), in the layout of models on the hub."""
    from tiny import save_language_model, save_vision_model

    folder = tmp_path_factory.mktemp("models")
    for kind in LANGUAGE_MODELS:
        save_language_model(kind, folder / kind)
    for kind in VISION_MODELS:
        save_vision_model(kind, folder / kind)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/*.jpg`, `train.json` (12 records) and `val.json` (4 records)."""
    from tiny import CAPTIONS

    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    rows = []
    for index in range(16):
        # Coarse colors, enlarged: the images differ clearly, and JPEG keeps them.
        colors = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(colors).resize((48, 40))
        image.save(folder / "images" / f"{index}.jpg", quality=95)
        rows.append(
            {
                "image": f"{index}.jpg",
                "instruction": "Generate a caption of this image:",
                "response": CAPTIONS[index % len(CAPTIONS)],
            }
        )
    (folder / "train.json").write_text(json.dumps(rows[:12]))
    (folder / "val.json").write_text(json.dumps(rows[12:]))
    return folder


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    """Return the files of 20 different images."""
    generator = np.random.default_rng(5)
    files: list[bytes] = []
    for _ in range(20):
        pixels = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((48, 40)).save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.fixture
def package_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """Messages that the package logs.

    The handler is attached to the package's logger, because `configure_logging`, which commands call,
    does not let messages propagate to the root logger.
    """
    logger = logging.getLogger("llava_simplified")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)
