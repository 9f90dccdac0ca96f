"""The data type in which a checkpoint generates on CPUs that are fast and slow in 16 bits."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import save_llava
from torch import nn

from llava_simplified.model import cpu_dtype
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.model.cpu_dtype import (
    has_fast_products,
    seconds_relative_to_float32,
    trains_fast_in,
    use_fast_dtype,
)


@pytest.fixture(scope="module")
def checkpoint(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(models_folder, tmp_path_factory.mktemp("model") / "model", dtype="bfloat16")


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has no instructions for 16 bits."""
    monkeypatch.setattr(cpu_dtype, "has_fast_products", lambda dtype: False)


@pytest.fixture
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_dtype, "has_fast_products", lambda dtype: True)


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.fixture
def unknown_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU about which PyTorch reports nothing."""
    monkeypatch.setattr(cpu_dtype, "_has_instructions", lambda dtype: False)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure products in each call, as a new process does."""
    measure = seconds_relative_to_float32.__wrapped__
    monkeypatch.setattr(cpu_dtype, "seconds_relative_to_float32", measure)


@pytest.mark.parametrize(
    ("seconds", "generates_fast", "trains_fast"),
    [(0.4, True, True), (1.1, True, True), (1.8, True, False), (8.0, False, False)],
)
def test_products_are_slow_if_they_take_longer_than_in_float32(
    monkeypatch: pytest.MonkeyPatch,
    unknown_instructions: None,
    measured: None,
    seconds: float,
    generates_fast: bool,
    trains_fast: bool,
) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(cpu_dtype, "_seconds_of_product", times.__getitem__)
    assert has_fast_products(torch.bfloat16) == generates_fast
    assert trains_fast_in(torch.bfloat16) == trains_fast


@pytest.mark.parametrize(("seconds", "is_fast"), [(0.8, True), (20.0, False)])
def test_load_of_other_processes_does_not_change_which_products_are_slow(
    monkeypatch: pytest.MonkeyPatch,
    unknown_instructions: None,
    measured: None,
    seconds: float,
    is_fast: bool,
) -> None:
    """Most products take several times as long as on an idle machine."""
    random = Random(0)
    times = {torch.float32: 1.0, torch.bfloat16: seconds}

    def measure(dtype: torch.dtype) -> float:
        is_disturbed = random.random() < 0.8
        return times[dtype] * (random.uniform(3, 6) if is_disturbed else 1)

    monkeypatch.setattr(cpu_dtype, "_seconds_of_product", measure)
    for _ in range(100):
        assert has_fast_products(torch.bfloat16) == is_fast
        assert trains_fast_in(torch.bfloat16) == is_fast


def test_models_generate_in_16_bits_but_do_not_train_if_instructions_are_slower_than_float32(
    monkeypatch: pytest.MonkeyPatch, measured: None
) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: 2.5, torch.float16: 2.5}
    monkeypatch.setattr(cpu_dtype, "_seconds_of_product", times.__getitem__)
    capabilities = {"avx512_bf16": True, "avx512_fp16": False, "cpu_name": "x"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_fast_products(torch.bfloat16)
    assert not has_fast_products(torch.float16)
    assert not trains_fast_in(torch.bfloat16)


def test_seconds_of_product_is_a_positive_time() -> None:
    assert 0 < cpu_dtype._seconds_of_product(torch.bfloat16) < 60


def test_checkpoint_generates_in_float32_on_a_slow_cpu(
    checkpoint: Path, data_folder: Path, slow_cpu: None
) -> None:
    model = load_checkpoint(checkpoint, device="cpu")
    assert dtypes(model) == {torch.float32}
    # float32 represents every value of bfloat16, so the weights are the same.
    stored = load_checkpoint(checkpoint, device="cpu", dtype="stored").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stored[name].float()), name
    assert model.caption(data_folder / "images" / "0.jpg", max_new_tokens=8)


def test_checkpoint_keeps_its_dtype_on_a_fast_cpu(checkpoint: Path, fast_cpu: None) -> None:
    assert torch.bfloat16 in dtypes(load_checkpoint(checkpoint, device="cpu").language_model)


def test_dtype_that_is_passed_is_used_on_a_slow_cpu(checkpoint: Path, slow_cpu: None) -> None:
    for dtype, expected in [
        ("stored", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ]:
        model = load_checkpoint(checkpoint, device="cpu", dtype=dtype)
        assert expected in dtypes(model.language_model), dtype
    # A model that is trained further keeps the weights that it was trained with.
    trainable = load_checkpoint(checkpoint, device="cpu", trainable=True)
    assert torch.bfloat16 in dtypes(trainable.language_model)
    with pytest.raises(ValueError, match=r"dtype must be .*not 'bf16'"):
        load_checkpoint(checkpoint, device="cpu", dtype="bf16")


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="requires an x86 CPU"
)
def test_quantized_model_has_its_other_weights_in_float32_on_a_slow_cpu(
    checkpoint: Path, slow_cpu: None
) -> None:
    model = load_checkpoint(checkpoint, device="cpu", quantize="int8")
    assert dtypes(model) == {torch.float32}


def test_model_that_would_not_fit_into_memory_keeps_its_dtype(
    slow_cpu: None, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    def set_available(size: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))

    def warnings() -> list[str]:
        return [entry.getMessage() for entry in package_log.records if entry.levelname == "WARNING"]

    set_available(4 * 10 * 20 - 1)
    model = nn.Linear(10, 20, bias=False).bfloat16()
    use_fast_dtype(model)
    assert model.weight.dtype == torch.bfloat16
    assert len(warnings()) == 1
    assert "--quantize int8" in warnings()[0]
    set_available(4 * 10 * 20)
    use_fast_dtype(model)
    assert model.weight.dtype == torch.float32
    assert len(warnings()) == 1
