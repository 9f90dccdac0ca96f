"""Exercise 3: add a second layer to the projector, as LLaVA-1.5 did.

Task: replace the matrix by linear, GELU, linear. The image tokens must again start at the scale of the word
embeddings. Train both projectors for the same number of steps. Then save, and load the checkpoint with the package.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import llava, new_model, parse, read_records, train
from torch import nn

# ---- solution ----


@torch.no_grad()
def add_second_layer(model, features: torch.Tensor) -> None:
    """Put a GELU and a second matrix behind the projector of a new model."""
    first = model.projector
    table = model.language_model.get_input_embeddings().weight.float()
    # GELU is nearly linear for inputs as small as embeddings. Give it inputs with the standard deviation 1.
    size = first(features.float()).std()
    first.weight /= size
    first.bias /= size
    second = nn.Linear(first.out_features, first.out_features)
    model.projector = nn.Sequential(first, nn.GELU(), second)
    scale = table.std() / model.projector(features.float()).std()
    second.weight *= scale
    second.bias *= scale
    model.settings["mm_projector_type"] = "mlp2x_gelu"  # the name that the package knows it by


def main(argv: list[str] | None = None) -> None:
    """Train one layer and two layers, and load the second checkpoint with the package."""
    args = parse(argv, __doc__)
    one_layer = new_model(args)
    two_layers = new_model(args)
    records = read_records(args)[:32]
    names = [record["image"] for record in records]
    features = llava.look_up_features(two_layers, names, args.images, {})
    add_second_layer(two_layers, features)
    # Stage 1: only the projectors are trained.
    losses = {"one layer": train(one_layer, args), "two layers": train(two_layers, args)}
    for name, values in losses.items():
        print(f"{name}: loss {values[0]:.2f} at the beginning, {values[-1]:.2f} at the end")
        assert values[-1] < values[0]

    from llava_simplified import Llava

    llava.add_lora(two_layers, rank=16, alpha=32)
    path, instruction = Path(args.images) / names[0], records[0]["instruction"]
    with tempfile.TemporaryDirectory() as folder:
        llava.save(two_layers, Path(folder) / "model")
        loaded = Llava.from_pretrained(
            Path(folder) / "model", device="cpu", attn_implementation="eager"
        )
        expected = llava.caption(two_layers, path, instruction, max_new_tokens=8)
        assert loaded.caption(path, instruction, max_new_tokens=8) == expected


if __name__ == "__main__":
    main()
