"""A checkpoint of LLaVA Simplified 0.1.0 loads, and computes what 0.1.0 computed.

tests/fixtures/checkpoint_0_1_0 contains the JSON and tokenizer files of a tiny checkpoint that 0.1.0 wrote
(LoRA adapter and projector), and those of its two base models. Weights are not in the repository:
tensors.json lists the names and shapes in each safetensors file, and the test fills them with random
numbers that depend only on the name. logits.json contains the logits that 0.1.0 computed with these weights.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.model.config import read_checkpoint_config
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_INDEX

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_0_1_0"


def fill_tensor(name: str, shape: list[int]) -> np.ndarray:
    """Return float32 random numbers that depend on the name and the shape only."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return (0.3 * generator.standard_normal(shape)).astype(np.float32)


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a safetensors file without the library, because the digests of weight files depend on every byte.

    A later version of the library may order or align the same tensors in another way.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in shapes.items():
        tensor = fill_tensor(name, shape).tobytes()
        offsets = [len(data), len(data) + len(tensor)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += tensor
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_fixture(folder: Path) -> None:
    """Copy the fixture, and write the weights that it lacks."""
    shutil.copytree(FIXTURE, folder, dirs_exist_ok=True)
    for name, shapes in json.loads((folder / "tensors.json").read_text()).items():
        write_safetensors(folder / name, shapes)


def compute_logits(model: Llava) -> torch.Tensor:
    """Return the logits (length, vocabulary) of one image and a few tokens."""
    input_ids = torch.tensor([[0, *[IMAGE_INDEX] * model.vision_tower.num_tokens, 7, 8, 9]])
    pixel_values = torch.arange(3 * 32 * 32).remainder(255).view(1, 3, 32, 32).to(torch.uint8)
    with torch.no_grad():
        embeds = model.splice(input_ids, model.vision_tower(pixel_values))
        return model.language_model(inputs_embeds=embeds).logits[0]


def load(folder: Path) -> Llava:
    return load_checkpoint(
        folder / "checkpoint",
        model_base=str(folder / "language_model"),
        vision_tower=str(folder / "vision_tower"),
        device="cpu",
    )


def test_checkpoint_of_0_1_0_has_the_same_logits(tmp_path: Path) -> None:
    write_fixture(tmp_path)
    logits = compute_logits(load(tmp_path))
    expected = torch.tensor(json.loads((FIXTURE / "logits.json").read_text()))
    torch.testing.assert_close(logits[-4:, ::40], expected, rtol=1e-5, atol=1e-5)


def test_checkpoint_config_of_0_1_0_is_read_under_new_names(tmp_path: Path) -> None:
    stored = json.loads((FIXTURE / "checkpoint" / "llava.json").read_text())
    config = read_checkpoint_config(FIXTURE / "checkpoint")
    assert stored["format_version"] == 1
    assert config["architecture"]["weights_digests"] == stored["architecture"]["fingerprints"]
    assert len(config["architecture"]["weights_digests"]) == 2
    assert "fingerprints" not in config["architecture"]


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_checkpoint_of_0_1_0_refuses_other_base_weights(tmp_path: Path, part: str) -> None:
    write_fixture(tmp_path)
    path = tmp_path / part / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + np.float32(1).tobytes())
    with pytest.raises(ValueError, match=f"{part} .*: .*weights differ"):
        load(tmp_path)
