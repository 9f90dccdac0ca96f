"""What the exercises share: options, a new model, and training with `llava_in_one_file.py`."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import llava_in_one_file as llava

DEMO = Path.home() / ".cache" / "llava-simplified" / "demo-v1"  # where `make demo` keeps its models


def parse(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Parse the options. By default the models and the drawings are those of the demo."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", default=DEMO / "drawings" / "train.json")
    parser.add_argument("--images", default=DEMO / "drawings" / "images")
    parser.add_argument("--language_model", default=DEMO / "language_model")
    parser.add_argument("--vision_tower", default=DEMO / "vision_tower")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3)
    return parser.parse_args(argv)


def read_records(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the records in a random order that is always the same."""
    records = llava.read_records(args.data)
    return random.Random(0).sample(records, len(records))


def new_model(args: argparse.Namespace, model_class: Any = llava.Llava) -> Any:
    """Return a model with a new projector, and without LoRA; always the same one."""
    torch.manual_seed(0)
    records = read_records(args)
    settings = {
        "language_model": str(args.language_model),
        "vision_tower": str(args.vision_tower),
        "mm_projector_type": "linear",
        "mm_vision_select_layer": -1,
        "mm_token_pool": 0,
        "template": "bare",
        "instruction": records[0]["instruction"],
        "dtype": args.dtype,
    }
    model = model_class(settings)
    names = [record["image"] for record in records[:32]]
    features = llava.look_up_features(model, names, args.images, {})
    table = model.language_model.get_input_embeddings().weight
    model.projector = llava.new_projector(features, table)
    return model


def train(model: Any, args: argparse.Namespace) -> list[float]:
    """Train a model, always on the same batches, and return the losses."""
    random.seed(0)
    batches = llava.make_batches(read_records(args), args.batch_size)
    warmup = max(1, args.steps // 20)
    return list(llava.train(model, batches, args.images, {}, args.steps, warmup, args.rate))
