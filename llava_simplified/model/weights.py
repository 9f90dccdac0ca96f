"""Weight files: find them, identify them by a digest, and compare state dicts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import cached_file

from llava_simplified.foreign_files import error_reason, read_json_object, shorten
from llava_simplified.hub import check_model_name

_DIGEST_SAMPLES = 256
_SAMPLE_BYTES = 4096


def filter_prefix(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights whose names begin with a prefix. The prefix is removed from the names."""
    return {
        # safetensors writes contiguous tensors only, so copy those that are not.
        name.removeprefix(prefix): weight.contiguous()
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def check_state_dict(
    stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str
) -> None:
    """Raise ValueError if weights are missing, unexpected, or have the wrong shape.

    Args:
        stored: The weights that were read, by name.
        expected: The weights of the model, by name.
        where: File or folder that the weights were read from, for the message.
    """
    missing = sorted(set(expected) - set(stored))
    unexpected = sorted(set(stored) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{where}: the weights do not fit the model: missing {missing[:5] or 'none'}, unexpected "
            f"{unexpected[:5] or 'none'}"
        )
    # Now both have the same names, so compare the shapes.
    for name, weight in stored.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} has the shape {tuple(weight.shape)}, but the model expects "
                f"{tuple(expected[name].shape)}"
            )


def weight_files(name_or_path: str) -> list[Path]:
    """Return the files that Transformers reads the weights of a model from.

    Args:
        name_or_path: A folder, or the name of a hub repository, whose files are downloaded.

    Raises:
        ValueError: There is no such folder, and the name cannot be the name of a hub repository.
        OSError: A file is missing. The message names the file and its folder.
    """
    check_model_name(name_or_path)
    _find_file(name_or_path, "config.json")
    # Try the formats in the same order as Transformers. The weights are in one file, or in several files (shards),
    # which an index lists.
    for name in ("model.safetensors", "pytorch_model.bin"):
        if _has_file(name_or_path, name):
            return [_find_file(name_or_path, name)]
        index = f"{name}.index.json"
        if _has_file(name_or_path, index):
            shards = _read_shard_names(_find_file(name_or_path, index))
            return [_find_file(name_or_path, shard) for shard in sorted(shards)]
    # No weights were found. Look for the file that is probably missing: this raises an error that names it.
    is_sharded = Path(name_or_path).is_dir() and any(Path(name_or_path).glob("*-of-*"))
    probably_missing = "model.safetensors.index.json" if is_sharded else "model.safetensors"
    return [_find_file(name_or_path, probably_missing)]


def _read_shard_names(index: Path) -> set[str]:
    """Return the names of the files that an index of weights lists.

    Raises:
        ValueError: The index is malformed, or names a file outside its folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: weight_map is missing or empty; copy or download the file again"
        )
    for name in weight_map.values():
        is_name = isinstance(name, str) and name not in ("", "..") and not set(name) & set("/\\\0")
        if not is_name:
            raise ValueError(
                f"{index}: weight_map must contain names of files in the same folder, not {shorten(name)}"
            )
    return set(weight_map.values())


def weights_digest(name_or_path: str) -> str:
    """Return a digest of a model's weights, computed from the names, sizes and samples of its weight files.

    Only samples of the files are hashed, because hashing 14 GB would take longer than loading an adapter of
    100 MB. Samples are enough, since two fine-tuned versions of one model differ in nearly every sample.

    Raises:
        OSError: A weight file is missing.
    """
    # Do not change this computation: existing checkpoints would no longer load with their base models.
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
    """Raise ValueError if base weights differ from those that a checkpoint was trained on.

    Args:
        part: "language_model" or "vision_tower".
        name_or_path: Folder or hub name of the weights.
        digest: Expected digest, which was stored in training.
    """
    option = "--model-base" if part == "language_model" else "--vision-tower"
    try:
        found = weights_digest(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the weights of the {part} {name_or_path}, which this checkpoint was trained with: "
            f"{error_reason(error)}. "
            f"If the model has moved, pass its new path with {option}"
        ) from error
    if found != digest:
        raise ValueError(
            f"{part} {name_or_path}: the weights differ from those that this checkpoint was trained with, but its "
            "projector and adapters fit only the original weights. Restore the original model, or pass its path with "
            f"{option}"
        )


def _has_file(name_or_path: str, name: str) -> bool:
    return cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False) is not None


def _find_file(name_or_path: str, name: str) -> Path:
    """Return the path of a model's file; raise OSError if it is missing."""
    # For a hub repository, let Transformers raise the error, because its message gives the reason. For a local folder,
    # raise our own error below.
    is_folder = Path(name_or_path).is_dir()
    try:
        path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=not is_folder)
    except OSError as error:
        raise OSError(
            f"{name_or_path}: cannot load {name} ({error}); pass a folder that contains all files of the model"
        ) from error
    if path is None:
        raise FileNotFoundError(f"{name} is missing; copy it into {name_or_path}")
    return Path(path)
