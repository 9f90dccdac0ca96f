"""Weight files: find them, identify them by a digest, compare state dicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import cached_file


def filter_prefix(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        k.removeprefix(prefix): v.contiguous() for k, v in weights.items() if k.startswith(prefix)
    }


def check_state_dict(
    stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str
) -> None:
    """Raise ValueError, naming them, where weights are missing, have no place, or have another shape."""
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{where}: missing {missing[:5] or 'none'}, unexpected {unexpected[:5] or 'none'}"
        )
    for name, weight in stored.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(weight.shape)}, the model needs {tuple(expected[name].shape)}"
            )


def weight_files(name_or_path: str) -> list[Path]:
    """The files that a model's weights are read from, in the order in which transformers looks for them; a hub's are fetched.

    Raises:
        OSError: one is missing (the message says which, and where it belongs).
    """
    here = Path(name_or_path).is_dir()

    def has(name: str) -> bool:
        return (
            cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False) is not None
        )

    def find(name: str) -> Path:
        try:
            path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=not here)
        except OSError as error:
            raise OSError(f"no {name}; name a folder with all its files: {error}") from error
        if path is None:
            raise FileNotFoundError(f"{name} is missing: put it into {name_or_path}")
        return Path(path)

    find("config.json")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if has(name):
            return [find(name)]
        if has(index := f"{name}.index.json"):
            shards = json.loads(find(index).read_text(encoding="utf-8"))["weight_map"].values()
            return [find(shard) for shard in sorted(set(shards))]
    in_shards = here and any(Path(name_or_path).glob("*-of-*"))
    return [find("model.safetensors.index.json" if in_shards else "model.safetensors")]


def weights_digest(name_or_path: str) -> str:
    """A digest that tells base weights apart: names, sizes, and samples of every weight file.

    Samples, since reading 14 GB to load an adapter of 100 MB would take longer than the loading.

    Raises:
        OSError: a file is missing.
    """
    digest = hashlib.sha256()
    for path in weight_files(name_or_path):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for sample in range(256):
                stream.seek(size * sample // 256)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def check_weights_digest(part: str, name_or_path: str, digest: str) -> None:
    """Raise ValueError where the base weights are not those that the checkpoint was trained with."""
    try:
        found = weights_digest(name_or_path)
    except OSError as error:
        option = "--model-base" if part == "language_model" else "--vision-tower"
        raise ValueError(
            f"the checkpoint's {part} {name_or_path}: {error}. Where it is now: {option}"
        ) from error
    if found != digest:
        raise ValueError(
            f"{part} {name_or_path}: other weights than those that this checkpoint was trained with; "
            "what it trained fits only them"
        )
