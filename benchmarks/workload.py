"""What several benchmarks compute on: models, images, captions, and the data type of this machine."""

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
# Pieces of captions; the captions need not make sense, only have the right length.
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
    """Return the data type in which all sides compute: bfloat16, or float32 where that is faster.

    The result is stored in an environment variable, so that all processes of a benchmark agree.
    """
    from llava_simplified.doctor_command import has_fast_bfloat16

    if "BENCH_DTYPE" not in os.environ:
        os.environ["BENCH_DTYPE"] = "bfloat16" if has_fast_bfloat16() else "float32"
    return os.environ["BENCH_DTYPE"]


def write_models(folder: Path, language_model: Path | None) -> tuple[Path, Path]:
    """Return the folders of a language model and of a vision tower.

    Args:
        folder: Where to write the tower: random weights in the shape of CLIP ViT-B/16.
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

    Random weights take the time and memory of trained ones. With 1.7 billion parameters, decoding is bound by
    reading the weights.

    Args:
        folder: Where to write it.
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
    """Return the number of tokens of the captions of each image.

    A random projector makes the model generate without an end, so the lengths are drawn beforehand:
    from 6 to 37 tokens, 12 on average, like those of Conceptual Captions.
    """
    draw = random.Random(0)
    lengths = []
    for _ in range(count):
        length = round(draw.lognormvariate(2.44, 0.36))
        lengths.append(min(max(length, 6), MAX_CAPTION_LENGTH))
    return lengths


def peak_memory(pid: int) -> int:
    """Return the peak of resident bytes of a running process, mapped files included.

    `getrusage` does not tell it: a process starts with the peak of the one that has started it.
    """
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # not Linux: what it uses now
        return int(psutil.Process(pid).memory_info().rss)
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # it has just ended


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


def stock_projector_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of our projector of two layers under the names of stock LLaVA."""
    stock_layers = {"0": "linear_1", "2": "linear_2"}
    renamed = {}
    for name, weight in weights.items():
        layer, parameter = name.split(".")
        renamed[f"{stock_layers[layer]}.{parameter}"] = weight
    return renamed


def run_child(script: str, *words: object, name: str) -> str:
    """Run a script in a separate process, and return what it prints.

    Args:
        script: Path of the script.
        words: Its arguments.
        name: What runs, for the error message.
    """
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return done.stdout
