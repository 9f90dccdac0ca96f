"""QLoRA for real: bitsandbytes has kernels for the CPU too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_run import losses, options, run
from torch import nn

from llava_simplified.export.export_command import merge_main
from llava_simplified.export.stock import export_stock
from llava_simplified.model import build
from llava_simplified.model.llava import Llava

bitsandbytes = pytest.importorskip("bitsandbytes")


def logits(model: Llava) -> torch.Tensor:
    from llava_simplified.export.stock_check import choose_images, compute_reference

    images, _ = choose_images({}, ())
    return compute_reference(model, images[0]).logits


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_on_quantised_weights(
    models_folder: Path, data_folder: Path, tmp_path: Path, bits: int
) -> None:
    folder = run(
        options(
            models_folder,
            data_folder,
            tmp_path / "out",
            bits=bits,
            max_steps=12,
            learning_rate=2e-2,
        )
    )
    assert losses(folder)[-1] < 0.8 * losses(folder)[0]
    assert json.loads((folder / "llava.json").read_text())["architecture"]["bits"] == bits
    model = Llava.from_pretrained(folder)
    kinds = {type(m) for n, m in model.named_modules() if "base_layer" in n}
    assert kinds == {bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt}
    for part in (model.vision_tower, model.projector, model.language_model.get_output_embeddings()):
        assert not any(
            isinstance(m, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
            for m in part.modules()
        )
    assert model.caption(data_folder / "images" / "0.jpg", max_new_tokens=4) is not None
    assert torch.equal(logits(model), logits(Llava.from_pretrained(folder)))

    # merged, the weights are what the adapter was trained on, not what they were before they were quantised
    merge_main([str(folder), "--output", str(tmp_path / "merged")])
    merged = Llava.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.modules())
    rounding = (logits(model) - logits(merged)).abs().max()
    other = (logits(model) - logits(Llava.from_pretrained(folder, bits=16))).abs().max()
    assert rounding < {4: 1e-3, 8: 0.2}[bits] and rounding < other
    assert export_stock(folder, tmp_path / "stock").max_logit_difference < 1e-3
    with pytest.raises(ValueError, match=f"{bits} bits"):
        export_stock(folder, tmp_path / "peft", adapter=True)


def test_the_projector_alone_on_quantised_weights(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    folder = run(
        options(
            models_folder,
            data_folder,
            tmp_path / "out",
            bits=4,
            max_steps=1,
            tune_mm_mlp_adapter=True,
        )
    )
    linears = [
        m
        for m in Llava.from_pretrained(folder).language_model.modules()
        if isinstance(m, nn.Linear)
    ]
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in linears) == len(linears) - 1, (
        "all but the head"
    )


def test_what_can_not_be_quantised_is_refused(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"lora_enable": False, "freeze_backbone": False}
    with pytest.raises(ValueError, match="quantised weights can't train"):
        run(options(models_folder, data_folder, tmp_path / "out", bits=4, **whole))
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ValueError, match="does not know this machine's devices"):
        run(options(models_folder, data_folder, tmp_path / "out", bits=4))
    monkeypatch.setattr(build, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install"):
        run(options(models_folder, data_folder, tmp_path / "out", bits=4))
