"""Models, images, captions and helper functions that several benchmarks share."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

INSTRUCTION = "Generate a caption of this image:"
MAX_CAPTION_LENGTH = 37  # tokens
# Captions are composed of these phrases. They need not make sense, but must have a realistic length.
PHRASES = (
    "red dog",
    "a car",
    "the man",
    "of two",
    "woman with",
    "old street",
    "on a field",
    "in the park",
    "near water",
)


def compute_dtype() -> str:
    """Return the data type in which all sides compute: bfloat16, or float32 where bfloat16 is emulated."""
    import torch

    from llava_simplified.model.cpu_dtype import has_fast_products

    # Whether bfloat16 is fast is measured, and could differ between two measurements. Child processes inherit the
    # variable, so all processes of a benchmark use the same data type.
    if "BENCH_DTYPE" not in os.environ:
        os.environ["BENCH_DTYPE"] = "bfloat16" if has_fast_products(torch.bfloat16) else "float32"
    return os.environ["BENCH_DTYPE"]


def write_models(folder: Path, language_model: Path | None) -> tuple[Path, Path]:
    """Return the folders of a language model and of a vision tower.

    Args:
        folder: Where to write the tower, which has random weights and the shape of CLIP ViT-B/16.
        language_model: Folder of SmolLM2-135M-Instruct; downloaded if None.
    """
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from llava_simplified.demo.assets import fetch

    torch.manual_seed(0)
    tower = folder / "clip"
    CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16)).save_pretrained(tower)
    CLIPImageProcessorPil().save_pretrained(tower)
    return language_model or fetch().language_model, tower


def write_random_language_model(folder: Path, tokenizer: Path | None) -> Path:
    """Write a language model with random weights in the shape of SmolLM2-1.7B, and return its folder.

    The values of the weights do not affect time and memory. With 1.7 billion parameters, decoding is limited by
    the memory bandwidth for reading the weights.

    Args:
        folder: Where to write the model.
        tokenizer: Folder of SmolLM2-135M-Instruct, which has the same tokenizer; downloaded if None.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llava_simplified.demo.assets import fetch

    source = tokenizer or fetch().language_model
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 130000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    # Create the weights in the final data type: in float32, they would need 7 GB.
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, compute_dtype()))
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    target = folder / "language_model_1.7b"
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def write_checkpoint(root: Path, models: tuple[Path, Path]) -> Path:
    """Write a checkpoint with a random projector, and return its folder.

    Args:
        root: An existing folder.
        models: Folders of the language model and of the vision tower.
    """
    import torch

    from llava_simplified.model.build import build_model
    from llava_simplified.model.checkpoint import save_checkpoint
    from llava_simplified.model.config import LlavaConfig, TrainedParts

    text, tower = models
    torch.manual_seed(1)
    config = LlavaConfig(
        str(text), str(tower), mm_projector_type="mlp2x_gelu", dtype=compute_dtype()
    )
    save_checkpoint(build_model(config), root / "model", config, TrainedParts())
    return root / "model"


def write_data(folder: Path, images: int, captions: int) -> None:
    """Write `train.json`, and images that need no resizing (which is measured by bench_clean.py).

    Args:
        folder: An existing folder.
        images: Number of images.
        captions: Number of captions per image, of 8 to 16 words each.
    """
    import numpy as np
    from PIL import Image

    draw = random.Random(0)
    records = []
    for index in range(images):
        generator = np.random.default_rng(index)
        coarse = generator.integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((224, 224)).save(folder / f"{index}.png")
        texts = []
        for _ in range(captions):
            texts.append(" ".join(draw.choices(PHRASES, k=draw.randint(4, 8))))
        record = {"image": f"{index}.png", "instruction": INSTRUCTION, "responses": texts}
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))


def draw_caption_lengths(count: int) -> list[int]:
    """Return a caption length in tokens for each image.

    With a random projector, the model generates no end token, so the lengths are drawn beforehand. They are like
    those of Conceptual Captions: 6 to 37 tokens, 12 on average.
    """
    draw = random.Random(0)
    lengths = []
    for _ in range(count):
        length = round(draw.lognormvariate(2.44, 0.36))
        lengths.append(min(max(length, 6), MAX_CAPTION_LENGTH))
    return lengths


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a running process in bytes, mapped files included.

    `getrusage` cannot be used: the peak that it returns for a new process begins with the peak of its parent.
    """
    status = Path(f"/proc/{pid}/status")
    # Only Linux has this file. On other systems, the current memory is the best available value.
    if not status.exists():
        return int(psutil.Process(pid).memory_info().rss)
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # the process has just ended, and its status has no memory


def option_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options as the arguments of a command line."""
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def stock_projector_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of our two-layer projector under the names that they have in stock LLaVA."""
    # Layer 1 is the activation function, which has no weights.
    stock_layers = {"0": "linear_1", "2": "linear_2"}
    renamed = {}
    for name, weight in weights.items():
        layer, parameter = name.split(".")
        renamed[f"{stock_layers[layer]}.{parameter}"] = weight
    return renamed


def run_child(script: str, *arguments: object, name: str) -> str:
    """Run a Python script in a separate process, and return its standard output.

    Args:
        script: Path of the script.
        arguments: Command-line arguments of the script.
        name: Name of the run in the error message.
    """
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return done.stdout
