"""Training an adapter on a quantized language model (QLoRA). bitsandbytes has kernels for CPUs too."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from training_runs import read_log, run_training, training_options
from transformers.utils import is_bitsandbytes_available

from llava_simplified.data.collate import Collator, Example
from llava_simplified.data.images import decode_image
from llava_simplified.export.export_command import merge_main
from llava_simplified.export.stock import export_stock
from llava_simplified.model import build
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message

pytestmark = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes is not installed"
)


@pytest.fixture
def bitsandbytes() -> ModuleType:
    """The library. Importing it at the top would take seconds in every process that collects the tests."""
    return importlib.import_module("bitsandbytes")


# Largest difference of logits between the quantized model with its adapter, and the merged model.
MERGE_TOLERANCE = {4: 1e-3, 8: 0.2}


def caption_logits(model: Llava, image: Path) -> torch.Tensor:
    """Return the logits of a caption's tokens, (tokens, vocabulary)."""
    turns = [Message("user", "<image>\nDescribe it.")]
    rendered = model.prompt.render(turns, "a red car parked on the street")
    pixels = model.vision_tower.transform(decode_image(image.read_bytes()))
    example = Example(rendered.input_ids, rendered.labels, pixel_values=pixels[None])
    batch = Collator(model.vision_tower.num_tokens, model.prompt.end_id)([example])
    inputs = {name: value for name, value in batch.items() if name != "metadata"}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.medium
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_run_learns_saves_merges_and_exports(
    models_folder: Path, data_folder: Path, tmp_path: Path, bitsandbytes: ModuleType, bits: int
) -> None:
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        bits=bits,
        max_steps=12,
        learning_rate=2e-2,
    )
    folder = run_training(options)
    losses = read_log(folder)
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((folder / "llava.json").read_text())["architecture"]["bits"] == bits

    # The linear layers of the language model are quantized, and nothing else.
    model = Llava.from_pretrained(folder)
    quantized_class = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    base_layers = [m for name, m in model.named_modules() if "base_layer" in name]
    assert {type(module) for module in base_layers} == {quantized_class}
    head = model.language_model.get_output_embeddings()
    quantized_classes = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    for part in (model.vision_tower, model.projector, head):
        assert not any(isinstance(module, quantized_classes) for module in part.modules())
    image = data_folder / "images" / "0.jpg"
    assert model.caption(image, max_new_tokens=4) is not None
    logits = caption_logits(model, image)
    assert torch.equal(logits, caption_logits(Llava.from_pretrained(folder), image))

    # The adapter was trained on the quantized weights. Merging must use their values, and not the
    # original ones.
    merge_main([str(folder), "--output", str(tmp_path / "merged")])
    merged = Llava.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.modules())
    merge_error = (logits - caption_logits(merged, image)).abs().max()
    unquantized = Llava.from_pretrained(folder, bits=16)
    quantization_error = (logits - caption_logits(unquantized, image)).abs().max()
    assert merge_error < MERGE_TOLERANCE[bits]
    assert merge_error < quantization_error
    assert export_stock(folder, tmp_path / "stock").max_logit_difference < 1e-3
    with pytest.raises(ValueError, match=f"{bits}-bit"):
        export_stock(folder, tmp_path / "peft", adapter=True)


@pytest.mark.medium
def test_projector_trains_on_a_quantized_language_model(
    models_folder: Path, data_folder: Path, tmp_path: Path, bitsandbytes: ModuleType
) -> None:
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        bits=4,
        max_steps=1,
        tune_mm_mlp_adapter=True,
    )
    model = Llava.from_pretrained(run_training(options))
    linears = [m for m in model.language_model.modules() if isinstance(m, nn.Linear)]
    quantized = [m for m in linears if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == len(linears) - 1, "all layers but the output layer must be quantized"


def test_bits_that_cannot_be_used_are_refused(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    bitsandbytes: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def options(**changes: object) -> list[str]:
        return training_options(models_folder, data_folder, tmp_path / "out", bits=4, **changes)

    with pytest.raises(ValueError, match="--bits 4: .*--lora_enable True"):
        run_training(options(lora_enable=False, freeze_backbone=False))
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ValueError, match="--bits 4: .*devices"):
        run_training(options())
    monkeypatch.setattr(build, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="--bits 4 .*bitsandbytes.*pip install"):
        run_training(options())
