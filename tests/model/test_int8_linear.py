"""Layers with 8-bit weights, compared with the original weights and with a plain loop over integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_llava
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconMambaConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llava_simplified.model import int8_linear
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.model.int8_linear import (
    Int8Linear,
    activation_levels,
    check_int8_support,
    quantize_linear_layers,
    zero_point,
)

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="requires an x86 CPU"
)


@pytest.fixture(autouse=True)
def engine() -> None:
    torch.backends.quantized.engine = "fbgemm"


def multiply_integers(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Compute a layer with 8-bit weights in float64, one row after the other."""
    weight = linear.weight.detach().double()
    outputs = []
    for row in x.double():
        row_scale = row.abs().max() / activation_levels()
        row_integers = (row / row_scale).round()
        values = []
        for channel in weight:
            scale = channel.abs().max() / 127
            integers = (channel / scale).round()
            values.append((row_integers * integers).sum() * row_scale * scale)
        outputs.append(torch.stack(values))
    bias = 0 if linear.bias is None else linear.bias.detach().double()
    return torch.stack(outputs) + bias


@pytest.mark.parametrize("bias", [False, True])
def test_int8_linear_equals_a_loop_over_integers(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 24, bias=bias)
    x = torch.randn(5, 64)
    x[0] *= 100  # a row with large activations must not reduce the precision of the other rows
    output = Int8Linear(linear)(x)
    # A value in the middle of two integers may be rounded either way.
    torch.testing.assert_close(output.double(), multiply_integers(x, linear), rtol=2e-3, atol=2e-3)
    exact = linear(x)
    errors = (output - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() < 0.03


def test_int8_linear_computes_each_row_alone_and_keeps_shape_and_dtype() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(32, 16))
    x = torch.randn(2, 3, 32).bfloat16()
    together = layer(x)
    assert together.shape == (2, 3, 16)
    assert together.dtype == torch.bfloat16
    for i in range(2):
        for j in range(3):
            assert torch.equal(layer(x[i, j]), together[i, j])
    assert torch.equal(layer(torch.zeros(1, 32)), layer(torch.zeros(1, 32)))
    assert layer(torch.full((1, 32), float("nan"))).isnan().all()


@pytest.mark.medium
def test_quantized_checkpoint_generates_the_same_captions_alone_and_in_a_batch(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    save_llava(models_folder, tmp_path / "model")
    model = load_checkpoint(tmp_path / "model", quantize="int8", device="cpu")
    layers = [type(module) for module in model.language_model.modules()]
    assert layers.count(Int8Linear) == 14  # two layers of seven
    assert layers.count(nn.Linear) == 1  # the lm_head
    images = [data_folder / "images" / f"{number}.jpg" for number in range(3)]
    together = model.caption(images, max_new_tokens=8)
    assert together == [model.caption(image, max_new_tokens=8) for image in images]
    # Quantization releases the memory pages of the file. This must not change its weights.
    exact = load_checkpoint(tmp_path / "model", device="cpu")
    ids = torch.arange(12)[None]
    expected = exact.language_model(input_ids=ids).logits
    logits = model.language_model(input_ids=ids).logits
    error = (logits - expected).norm() / expected.norm()
    # The error is mostly that of the rounded activations.
    assert 0 < error < 0.05 * 127 / activation_levels()
    with pytest.raises(ValueError, match="cannot be trained"):
        load_checkpoint(tmp_path / "model", quantize="int8", device="cpu", trainable=True)
    with pytest.raises(ValueError, match="--bits 16"):
        load_checkpoint(tmp_path / "model", quantize="int8", device="cpu", bits=4)
    with pytest.raises(ValueError, match="int8"):
        load_checkpoint(tmp_path / "model", quantize="int3", device="cpu")


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}


def test_quantize_includes_the_linear_layers_of_falcon() -> None:
    """They are a subclass of `nn.Linear`."""
    model = make_model(FalconConfig(**SIZE, num_attention_heads=4))
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    assert quantize_linear_layers(model) == 8  # two layers of four
    logits = model(ids).logits
    assert 0 < (logits - expected).norm() / expected.norm() < 0.1


def test_quantize_refuses_a_model_without_linear_layers() -> None:
    model = make_model(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match=r"gpt2 has no linear layers.*Leave out --quantize"):
        quantize_linear_layers(model)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**SIZE),
        FalconMambaConfig(**SIZE),
        JambaConfig(**SIZE, **HEADS, attn_layer_offset=1, attn_layer_period=2, num_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_quantize_refuses_a_model_that_reads_the_weights_of_a_layer(
    config: PreTrainedConfig,
) -> None:
    with pytest.raises(ValueError, match=rf"does not support {config.model_type}, .*weight"):
        quantize_linear_layers(make_model(config))


def test_quantize_warns_about_weights_outside_of_linear_layers(
    package_log: pytest.LogCaptureFixture,
) -> None:
    quantize_linear_layers(make_model(LlamaConfig(**SIZE, **HEADS)))
    assert not package_log.messages
    quantize_linear_layers(make_model(MixtralConfig(**SIZE, **HEADS, num_local_experts=4)))
    (message,) = package_log.messages
    assert "leaves 8" in message and "of the weights of mixtral as they are" in message


def test_quantize_refuses_other_devices_and_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--quantize int8.*--bits 8"):
        check_int8_support(torch.device("cuda"))
    monkeypatch.setattr(int8_linear, "supported_engines", lambda: ["qnnpack"])
    with pytest.raises(ValueError, match="FBGEMM"):
        check_int8_support(torch.device("cpu"))


def test_activations_lose_a_bit_where_products_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    activation_levels.cache_clear()
    multiply = int8_linear._multiply
    monkeypatch.setattr(
        int8_linear, "_multiply", lambda *args: multiply(*args).clamp_max(32)
    )  # the exact product is 64
    try:
        assert activation_levels() == 63
    finally:
        activation_levels.cache_clear()


def test_sums_of_two_products_fit_into_16_bits_with_63_levels() -> None:
    """CPUs that do not support VNNI limit such a sum to 32,767, and the output would be wrong without a warning."""
    largest_activation = zero_point(63) + 63
    largest_weight = 127
    assert 2 * largest_activation * largest_weight <= 2**15 - 1
