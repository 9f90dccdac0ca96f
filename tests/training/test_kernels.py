"""Compiled layers."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from llava_simplified.training.kernels import choose_attention, compile_layers


@pytest.mark.medium
def test_layers_are_compiled_once_for_all_batch_sizes_and_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only trace the layers: generating code would take most of the time.
    traced = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    choose_attention(model, None, "cpu")
    compile_layers(model)
    before = counters["stats"]["unique_graphs"]
    # The first sequence is as long as a head is wide (16), and other sizes are equal to those of the model too.
    for batch_size, length in [(3, 16), (3, 15), (2, 32), (16, 3), (5, 5)]:
        embeds = torch.randn(batch_size, length, 32, requires_grad=True)
        mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool).tril()
        model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state.sum().backward()
    assert counters["stats"]["unique_graphs"] - before == 1
