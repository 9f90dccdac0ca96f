"""A cache of vision features, so that a frozen tower runs once per image instead of once per epoch.

The cache is exact: it stores the output of the tower in the tower's dtype. If the features of all
images are too large, or if the tower is trained, it can store the *pixels* of the tower's input
instead: decoded, resized and cropped images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_simplified.data.image_folder import NameMatches
from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.jobs import Progress, atomic_file, exclusive_lock
from llava_simplified.model.vision import VisionTower
from llava_simplified.training.interruption import ignore_interrupts

logger = logging.getLogger(__name__)

_HASH_BYTES = 32  # sha256
# Seconds to wait for the lock. Appending a batch takes milliseconds on a local disk, but much longer if
# several processes write to a network disk.
_LOCK_TIMEOUT = 300.0


# A stale row is never returned, because a row is identified by everything that determines its value:
#
#     file name    hash of the transform, and of weights, layers, pooling and dtype of the tower
#     row          sha256 of the bytes of the image file
#
# A cache on disk consists of these files in `--feature_cache_dir`:
#
#     <key>.features    row 0 | row 1 | row 2 | ...      raw numbers, rows of equal size
#     <key>.hashes      sha256 | sha256 | sha256 | ...   32 bytes per row, in the same order
#     <key>.json        the values that the key was computed from, for information only
#     <key>.lock        held while rows are appended
#
# `.hashes` is the journal. A hash is appended after its row has been written and synced, so a row is
# valid if its complete hash exists. Incomplete data of a killed process, after the last complete hash,
# is overwritten by the next process:
#
#     .features    | row 0 | row 1 | row 2 | ro      <- incomplete row
#     .hashes      | sha 0 | sha 1 | sh              <- incomplete hash: row 2 is not valid either
#
# Several processes can fill one cache. Each process holds the lock while it appends, and first reads
# the hashes that the others have appended.


class FeatureCache:
    """A store of rows by image hash: features (tokens, hidden size), or uint8 pixels (3, height, width).

    Args:
        tower: The vision tower; it must be frozen unless `pixels` is True.
        tower_digest: Digest of the tower's weights.
        folder: Folder of the files; None keeps the rows in memory.
        pixels: Store the input of the tower instead of its output.

    Attributes:
        shape: Shape of a row.
        dtype: Dtype of a row.

    Raises:
        ValueError: The tower is trained, so its features change with every step.
    """

    def __init__(
        self,
        tower: VisionTower,
        tower_digest: str,
        folder: str | Path | None = None,
        pixels: bool = False,
    ) -> None:
        if not (tower.frozen or pixels):
            raise ValueError(
                "The features of a trained vision tower cannot be cached, because they change with every step. Pass "
                "--cache_vision_features pixels, or off."
            )
        self.tower: VisionTower | None = tower
        self.pixels = pixels
        if pixels:
            self.dtype = torch.uint8
            self.shape: tuple[int, ...] = (3, *tower.transform.crop)
        else:
            self.dtype = tower.dtype
            self.shape = (tower.num_tokens, tower.width)
        self._row_by_hash: dict[bytes, int] = {}
        # Rows by number: a list while rows are added, one tensor after `__getstate__`.
        self._memory: list[torch.Tensor] | torch.Tensor = []
        self._map: np.ndarray | None = None
        self._base: Path | None = None
        self._description = _describe(tower, tower_digest, pixels)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._base = Path(folder) / cache_key(tower, tower_digest, pixels)
            self._read_new_hashes()

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def on_disk(self) -> bool:
        """True if the rows are in files, which other processes can read."""
        return self._base is not None

    def __len__(self) -> int:
        return len(self._row_by_hash)

    def read_row(self, row: int) -> torch.Tensor:
        """Return one row, a tensor of `shape` and `dtype`."""
        if self._base is None:
            return self._memory[row]
        if self._map is None:  # opened late, so that each worker process maps the file itself
            self._map = np.memmap(self._base.with_suffix(".features"), np.uint8, "r")
        start = row * self.row_bytes
        # Copy the row, because torch warns about tensors of read-only memory.
        copied = np.array(self._map[start : start + self.row_bytes])
        return torch.from_numpy(copied).view(self.dtype).view(self.shape)

    def __getstate__(self) -> dict[str, object]:
        # torch sends each tensor through a file of its own, and a process may often have only a thousand open files. So
        # send one tensor with all rows, and keep it, so that all workers share its memory.
        if isinstance(self._memory, list) and self._memory:
            self._memory = torch.stack(self._memory)
        # Send neither the tower nor the hashes to data-loader workers, which only read rows, and map the
        # file themselves.
        return {**self.__dict__, "_map": None, "tower": None, "_row_by_hash": {}}

    def fill(
        self,
        images: Sequence[str],
        image_folder: str | Path,
        batch_size: int = 32,
        workers: int = 0,
        progress: bool = True,
    ) -> ImageFeatures:
        """Compute the missing rows, and return the rows of all images by name.

        Images that cannot be read are skipped; the dataset reports them in training.

        Args:
            images: Names of the images.
            image_folder: Folder of the images.
            batch_size: Images per forward pass of the tower.
            workers: Number of processes that read and decode images.
            progress: Show a progress line on standard error.
        """
        assert self.tower is not None, "a cache that was sent to a worker process is read-only"
        reader = _ImageReader(images, image_folder, self.tower.transform, self._row_by_hash)
        # Read and decode images in the workers, and run the tower in this process.
        # Ctrl-C ends this process, which ends its workers.
        loader = DataLoader(
            reader,
            batch_size,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=ignore_interrupts,
        )
        names: list[str] = []
        digests: list[bytes] = []
        matches = NameMatches()
        with Progress(len(images), "images", enabled=progress) as bar:
            for batch in loader:
                missing: dict[bytes, torch.Tensor] = {}
                for item in batch:
                    if item is None:
                        continue
                    names.append(item.name)
                    # Each reader process counts the rules in a `NameMatches` of its own, so count them here again.
                    matches.rules[item.rule] += 1
                    digests.append(item.digest)
                    if item.digest not in self._row_by_hash:
                        missing[item.digest] = item.pixels
                if missing:
                    self._append(missing)
                bar.advance(len(batch))
        self._map = None  # map the file again at the next read, since it has grown
        if matches.describe():
            logger.warning("%s: %s", image_folder, matches.describe())
        return ImageFeatures(self, names, [self._row_by_hash[digest] for digest in digests])

    @torch.no_grad()
    def _append(self, pixels: Mapping[bytes, torch.Tensor]) -> None:
        """Compute and store the rows of images, given their pixels by hash."""
        rows = torch.stack(list(pixels.values()))
        if not self.pixels:
            assert self.tower is not None
            device = next(self.tower.parameters()).device
            features = self.tower(rows.to(device))
            rows = features.to(self.dtype).cpu().contiguous()
        if self._base is None:
            if isinstance(self._memory, torch.Tensor):
                self._memory = list(self._memory)
            for digest, row in zip(pixels, rows):
                self._row_by_hash[digest] = len(self._memory)
                self._memory.append(row)
            return
        self._map = None  # Windows cannot change the size of a file while it is mapped
        with self._locked():
            # Skip rows that another process has appended in the meantime.
            new = [
                (digest, row)
                for digest, row in zip(pixels, rows)
                if digest not in self._row_by_hash
            ]
            self._write_description()
            count = len(self._row_by_hash)
            # Write and sync the rows before the hashes, because a hash makes its row valid.
            with _open_at(self._base.with_suffix(".features"), count * self.row_bytes) as stream:
                for _, row in new:
                    stream.write(row.view(torch.uint8).numpy().tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            with _open_at(self._base.with_suffix(".hashes"), count * _HASH_BYTES) as stream:
                for digest, _ in new:
                    stream.write(digest)
            for digest, _ in new:
                self._row_by_hash[digest] = len(self._row_by_hash)

    def _write_description(self) -> None:
        """Write `<key>.json` unless it exists: a complete cache may be read-only."""
        assert self._base is not None
        path = self._base.with_suffix(".json")
        if path.exists():
            return
        with atomic_file(path) as part:
            part.write_text(json.dumps(self._description, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the cache, and read the hashes that other processes have appended."""
        assert self._base is not None
        lock = self._base.with_suffix(".lock")
        name = f"the feature cache {self._base}"
        with exclusive_lock(lock, name, timeout=_LOCK_TIMEOUT):
            self._read_new_hashes()
            yield

    def _read_new_hashes(self) -> None:
        """Read the hashes after those that are known already; ignore an incomplete last one."""
        assert self._base is not None
        path = self._base.with_suffix(".hashes")
        if not path.exists():
            return
        with path.open("rb") as stream:
            stream.seek(len(self._row_by_hash) * _HASH_BYTES)
            while True:
                digest = stream.read(_HASH_BYTES)
                if len(digest) < _HASH_BYTES:
                    return
                self._row_by_hash[digest] = len(self._row_by_hash)


def _key_parts(tower: VisionTower, tower_digest: str, pixels: bool) -> list[Any]:
    """Return everything that determines the value of a row, as JSON values in a fixed order."""
    # Leave out the steps that this transform does not have (None). When a later version adds an optional step, the
    # existing caches then remain valid.
    transform = {name: value for name, value in vars(tower.transform).items() if value is not None}
    parts: list[Any] = [transform]
    if not pixels:
        parts.append(tower_digest)
        parts.append(tower.select_layers)
        parts.append(tower.select_feature)
        parts.append(tower.token_pool)
        parts.append(str(tower.dtype))
    return parts


def cache_key(tower: VisionTower, tower_digest: str, pixels: bool = False) -> str:
    """Return a file name that identifies everything that determines the value of a row."""
    parts = json.dumps(_key_parts(tower, tower_digest, pixels))
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _describe(tower: VisionTower, tower_digest: str, pixels: bool) -> dict[str, Any]:
    """Return the values that `cache_key` is computed from, by name."""
    names = ["transform", "weights", "select_layers", "select_feature", "token_pool", "dtype"]
    description = dict(zip(names, _key_parts(tower, tower_digest, pixels)))
    description["content"] = "pixels" if pixels else "features"
    return description


def _open_at(path: Path, position: int) -> BinaryIO:
    """Open a file for writing, and truncate it at `position`."""
    path.touch()
    stream = path.open("r+b")
    stream.truncate(position)
    stream.seek(position)
    return stream


class _ReadImage(NamedTuple):
    """An image of the folder.

    Attributes:
        name: Its name in the records.
        digest: sha256 of its file.
        pixels: uint8 (3, height, width), or None if its features are cached.
        rule: Rule by which the file was found, see `image_folder`.
    """

    name: str
    digest: bytes
    pixels: torch.Tensor | None
    rule: str


class _ImageReader(Dataset["_ReadImage | None"]):
    """Read and decode images in data-loader workers. The item of an unreadable image is None.

    Args:
        names: Names of the images.
        folder: Folder of the images.
        transform: Padding, resize and crop of the tower.
        known: Hashes of images in the cache, which need not be decoded.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str | Path,
        transform: ImageTransform,
        known: Collection[bytes],
    ) -> None:
        self.names = names
        self.folder = folder
        self.transform = transform
        self.known = known

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> _ReadImage | None:
        name = self.names[index]
        try:
            matches = NameMatches()
            data = read_image_bytes(name, self.folder, matches)
            (rule,) = matches.rules  # an image is found by exactly one rule
            digest = hashlib.sha256(data).digest()
            if digest in self.known:
                return _ReadImage(name, digest, None, rule)
            return _ReadImage(name, digest, self.transform(decode_image(data)), rule)
        except ImageError:
            return None


class ImageFeatures:
    """The rows of one image folder by image name: `features["a.jpg"]` is a row of the cache.

    An image takes 24 bytes (a 16-byte hash of its name, and an 8-byte row number), so the index of
    millions of images can be sent to every data-loader worker.
    """

    def __init__(self, cache: FeatureCache, names: Sequence[str], rows: Sequence[int]) -> None:
        # Use sorted arrays and binary search: a dict of millions of strings would take gigabytes, and
        # every forked worker would copy it page by page, because reading changes reference counts.
        keys = np.array([_name_key(name) for name in names], "S16")
        order = np.argsort(keys)
        self._cache = cache
        self._keys = keys[order]
        self._rows = np.array(rows, np.int64)[order]

    @property
    def dummy_image(self) -> torch.Tensor:
        """A row of zeros."""
        return torch.zeros(self._cache.shape, dtype=self._cache.dtype)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, image: str) -> bool:
        return self._find(image) is not None

    def __getitem__(self, image: str) -> torch.Tensor:
        row = self._find(image)
        if row is None:
            raise KeyError(image)
        return self._cache.read_row(row)

    def _find(self, image: str) -> int | None:
        """Return the row of an image in the cache, or None if it has none."""
        key = np.bytes_(_name_key(image))
        position = np.searchsorted(self._keys, key)
        if position == len(self._keys) or self._keys[position] != key:
            return None
        return int(self._rows[position])


def _name_key(name: str) -> bytes:
    # Strip zero bytes at the end of the hash, because NumPy strips them too.
    return hashlib.blake2b(name.encode(), digest_size=16).digest().rstrip(b"\0")
