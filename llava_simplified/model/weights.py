"""Weight files: find them, identify them by a digest, and compare state dicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import cached_file

from llava_simplified.hub import check_model_name

_DIGEST_SAMPLES = 256
_SAMPLE_BYTES = 4096


def filter_prefix(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights whose names begin with a prefix, without it, and contiguous in memory."""
    return {
        # safetensors refuses to write tensors that are views with strides.
        name.removeprefix(prefix): weight.contiguous()
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def check_state_dict(
    stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str
) -> None:
    """Raise ValueError if weights are missing, unexpected, or have another shape.

    Args:
        stored: The weights that were read.
        expected: The weights of the model.
        where: What was read, for the message.
    """
    missing = sorted(set(expected) - set(stored))
    unexpected = sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{where}: missing {missing[:5] or 'none'}, unexpected {unexpected[:5] or 'none'}"
        )
    # The names are the same from here on.
    for name, weight in stored.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(weight.shape)}, the model needs "
                f"{tuple(expected[name].shape)}"
            )


def weight_files(name_or_path: str) -> list[Path]:
    """Return the files that a model's weights are read from, in the order of preference of Transformers.

    Args:
        name_or_path: A folder, or the name of a hub repository, whose files are downloaded.

    Raises:
        ValueError: There is no such folder, and the name cannot be one of the hub.
        OSError: A file is missing. The message says which one, and where it belongs.
    """
    check_model_name(name_or_path)
    _find_file(name_or_path, "config.json")
    # One file, or an index that names its shards.
    for name in ("model.safetensors", "pytorch_model.bin"):
        if _has_file(name_or_path, name):
            return [_find_file(name_or_path, name)]
        index = f"{name}.index.json"
        if _has_file(name_or_path, index):
            text = _find_file(name_or_path, index).read_text(encoding="utf-8")
            shards = set(json.loads(text)["weight_map"].values())
            return [_find_file(name_or_path, shard) for shard in sorted(shards)]
    # There are none: raise an error that names the file that is most likely wanted.
    is_sharded = Path(name_or_path).is_dir() and any(Path(name_or_path).glob("*-of-*"))
    wanted = "model.safetensors.index.json" if is_sharded else "model.safetensors"
    return [_find_file(name_or_path, wanted)]


def weights_digest(name_or_path: str) -> str:
    """Return a digest of a model's weights: of names, sizes and samples of its weight files.

    Samples, because hashing 14 GB to load an adapter of 100 MB would take longer than loading it. Two
    fine-tuned versions of one model differ in nearly every sample.

    Raises:
        OSError: A file is missing.
    """
    # Changing anything here would make all checkpoints refuse their base models.
    digest = hashlib.sha256()
    for path in weight_files(name_or_path):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for sample in range(_DIGEST_SAMPLES):
                stream.seek(size * sample // _DIGEST_SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_weights_digest(part: str, name_or_path: str, digest: str) -> None:
    """Raise ValueError if base weights are not those that a checkpoint was trained on.

    Args:
        part: "language_model" or "vision_tower".
        name_or_path: The weights as they are now.
        digest: Their digest at training.
    """
    try:
        found = weights_digest(name_or_path)
    except (OSError, ValueError) as error:
        option = "--model-base" if part == "language_model" else "--vision-tower"
        raise ValueError(
            f"the checkpoint's {part} {name_or_path}: {error}. If it has moved, pass {option}"
        ) from error
    if found != digest:
        raise ValueError(
            f"{part} {name_or_path}: other weights than those that this checkpoint was trained with; "
            "what it trained fits only those"
        )


def _has_file(name_or_path: str, name: str) -> bool:
    return cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False) is not None


def _find_file(name_or_path: str, name: str) -> Path:
    # The hub's message on a missing file tells more than ours could; for a folder it is the reverse.
    is_folder = Path(name_or_path).is_dir()
    try:
        path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=not is_folder)
    except OSError as error:
        raise OSError(f"no {name}; pass a folder with all its files: {error}") from error
    if path is None:
        raise FileNotFoundError(f"{name} is missing: put it into {name_or_path}")
    return Path(path)
