"""A frozen tower is run once per picture: its features are kept, in memory or in a memory-mapped file.

Exact: what is kept is what the tower gave, in its own dtype. A feature is found by the sha256 of the picture's bytes,
in a file named after all that decides its value (weights, layers, pooling, transform, dtype): a stale one is never found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.model.vision import VisionTower

_HASH_BYTES = 32


class FeatureCache:
    """Features of many pictures, each a row of (tokens, width).

    On disk, two files grow together: `<key>.features`, rows of raw numbers, and `<key>.hashes`, 32 bytes a row,
    written after the row itself. What a killed run left half-written lies beyond the last hash and is overwritten.

    Args:
        tower: frozen.
        weights: the fingerprint of its weights.
        folder: where the files are; None keeps the features in memory.
    """

    def __init__(self, tower: VisionTower, weights: str, folder: str | Path | None = None) -> None:
        if not tower.frozen:
            raise ValueError("features of a tower that is being trained can't be cached: they change with every step")
        self.tower = tower
        self.dtype = tower.dtype
        self.shape = (tower.num_tokens, tower.width)
        self._rows: dict[bytes, int] = {}
        self._memory: list[torch.Tensor] = []
        self._map: np.ndarray | None = None
        self._base: Path | None = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._base = Path(folder) / cache_key(tower, weights)
            self._read_hashes()

    @property
    def row_bytes(self) -> int:
        """Bytes of one picture's features."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, row: int) -> torch.Tensor:
        """(tokens, width) of one picture."""
        if self._base is None:
            return self._memory[row]
        if self._map is None:  # opened late, so that each worker process maps the file itself
            path = self._base.with_suffix(".features")
            self._map = np.memmap(path, np.uint8, "r", shape=(len(self._rows), self.row_bytes))
        raw = torch.from_numpy(np.array(self._map[row]))
        return raw.view(self.dtype).view(self.shape)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None, "tower": None}  # neither goes to worker processes

    def fill(
        self, images: Iterable[str], image_folder: str | Path, batch_size: int = 32, progress: bool = True
    ) -> ImageFeatures:
        """Encode the pictures that are not there yet, and return all of them by name.

        One that can't be read is left out: the dataset reports it when it meets it.
        """
        pending: dict[bytes, torch.Tensor] = {}
        names: dict[str, bytes] = {}
        for image in tqdm(images, "vision features", disable=not progress, dynamic_ncols=True):
            try:
                data = read_image_bytes(image, image_folder)
                digest = hashlib.sha256(data).digest()
                if digest not in self._rows and digest not in pending:
                    pending[digest] = self.tower.transform(decode_image(data))
            except ImageError:
                continue
            names[image] = digest
            if len(pending) == batch_size:
                self._encode(pending)
                pending = {}
        self._encode(pending)
        self._map = None
        return ImageFeatures(self, {image: self._rows[digest] for image, digest in names.items()})

    @torch.no_grad()
    def _encode(self, pixels: dict[bytes, torch.Tensor]) -> None:
        if not pixels:
            return
        device = next(self.tower.parameters()).device
        features = self.tower(torch.stack(list(pixels.values())).to(device)).to(self.dtype).cpu().contiguous()
        if self._base is None:
            self._memory += list(features)
        else:
            with _open_at(self._base.with_suffix(".features"), len(self._rows) * self.row_bytes) as stream:
                stream.write(features.view(torch.uint8).numpy().tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            with _open_at(self._base.with_suffix(".hashes"), len(self._rows) * _HASH_BYTES) as stream:
                stream.write(b"".join(pixels))
        self._rows.update(zip(pixels, range(len(self._rows), len(self._rows) + len(pixels))))

    def _read_hashes(self) -> None:
        assert self._base is not None
        path = self._base.with_suffix(".hashes")
        data = path.read_bytes() if path.exists() else b""
        for row in range(len(data) // _HASH_BYTES):
            self._rows[data[row * _HASH_BYTES : (row + 1) * _HASH_BYTES]] = row


def cache_key(tower: VisionTower, weights: str) -> str:
    """A name for everything that decides a feature's value."""
    parts = [
        weights,
        tower.select_layers,
        tower.select_feature,
        tower.token_pool,
        tower.transform.to_dict(),
        str(tower.dtype),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _open_at(path: Path, position: int):  # type: ignore[no-untyped-def]
    path.touch()
    stream = path.open("r+b")
    stream.truncate(position)
    stream.seek(position)
    return stream


class ImageFeatures(Mapping[str, torch.Tensor]):
    """The pictures of one folder by their names: `features["a.jpg"]` -> (tokens, width)."""

    def __init__(self, cache: FeatureCache, rows: dict[str, int]) -> None:
        self._cache, self._rows = cache, rows

    def __getitem__(self, image: str) -> torch.Tensor:
        return self._cache.row(self._rows[image])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
