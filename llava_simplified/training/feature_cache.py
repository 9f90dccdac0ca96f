"""A frozen tower is run once per picture: its features are kept, in memory or in a memory-mapped file.

Exact: what is kept is what the tower gave, in its own dtype. A feature is found by the sha256 of the picture's bytes, in a
file named after all that decides its value (weights, layers, pooling, transform, dtype): a stale one is never found.
Where features are too many, or the tower trains, the pictures themselves can be kept as it takes them, decoded and resized.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from llava_simplified.arguments import DataArguments, TrainingArguments, parse_arguments
from llava_simplified.data.dataset import CaptionDataset, open_data
from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.records import Record
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.model.build import build_vision_tower
from llava_simplified.model.vision import VisionTower
from llava_simplified.model.weights import weights_digest
from llava_simplified.training.model_config import model_config

_HASH_BYTES = 32


class FeatureCache:
    """A row for each of many pictures: features (tokens, width), or uint8 pixels (3, height, width).

    On disk, two files grow together: `<key>.features`, rows of raw numbers, and `<key>.hashes`, 32 bytes a row,
    written after the row itself. What a killed run left half-written lies beyond the last hash and is overwritten.
    Several processes may fill the same files: they append in turn, behind what the others have appended.

    Args:
        tower: frozen, unless `pixels`.
        weights: the fingerprint of its weights.
        folder: where the files are; None keeps the rows in memory.
        pixels: keep what the tower is given, not what it gives.
    """

    def __init__(
        self,
        tower: VisionTower,
        weights: str,
        folder: str | Path | None = None,
        pixels: bool = False,
    ) -> None:
        if not (tower.frozen or pixels):
            raise ValueError(
                "features of a tower that is being trained can't be cached: they change with every step"
            )
        self.tower = tower
        self.pixels = pixels
        self.dtype = torch.uint8 if pixels else tower.dtype
        self.shape = (3, *tower.transform.crop) if pixels else (tower.num_tokens, tower.width)
        self._rows: dict[bytes, int] = {}
        self._memory: list[torch.Tensor] = []
        self._map: np.ndarray | None = None
        self._base: Path | None = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._base = Path(folder) / cache_key(tower, weights, pixels)
            self._read_hashes()

    @property
    def row_bytes(self) -> int:
        """Bytes of one picture."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, row: int) -> torch.Tensor:
        """One picture, as `shape` says."""
        if self._base is None:
            return self._memory[row]
        if self._map is None:  # opened late, so that each worker process maps the file itself
            self._map = np.memmap(self._base.with_suffix(".features"), np.uint8, "r")
        raw = torch.from_numpy(
            np.array(self._map[row * self.row_bytes : (row + 1) * self.row_bytes])
        )
        return raw.view(self.dtype).view(self.shape)

    def __getstate__(self) -> dict[str, object]:
        return {
            **self.__dict__,
            "_map": None,
            "tower": None,
            "_rows": {},
        }  # none of it goes to worker processes

    def fill(
        self,
        images: Sequence[str],
        image_folder: str | Path,
        batch_size: int = 32,
        workers: int = 0,
        progress: bool = True,
    ) -> ImageFeatures:
        """Encode the pictures that are not there yet, and return all of them by name.

        One that can't be read is left out: the dataset reports it when it meets it.

        Args:
            workers: processes that read and decode.
        """
        pictures = _Pictures(images, image_folder, self.tower.transform, self._rows)
        loader = DataLoader(pictures, batch_size, num_workers=workers, collate_fn=list)
        found: list[tuple[str, bytes]] = []
        with tqdm(
            total=len(images), desc="pictures", disable=not progress, dynamic_ncols=True
        ) as bar:
            for batch in loader:
                read = [item for item in batch if item is not None]
                self._append(
                    {digest: pixels for _, digest, pixels in read if digest not in self._rows}
                )
                found += [(name, digest) for name, digest, _ in read]
                bar.update(len(batch))
        self._map = None
        return ImageFeatures(
            self, [name for name, _ in found], [self._rows[digest] for _, digest in found]
        )

    @torch.no_grad()
    def _append(self, pixels: dict[bytes, torch.Tensor]) -> None:
        if not pixels:
            return
        rows = torch.stack(list(pixels.values()))
        if not self.pixels:
            rows = (
                self.tower(rows.to(next(self.tower.parameters()).device))
                .to(self.dtype)
                .cpu()
                .contiguous()
            )
        if self._base is None:
            self._memory += list(rows)
            self._rows.update(zip(pixels, range(len(self._rows), len(self._memory))))
            return
        with self._locked():
            new = [(digest, row) for digest, row in zip(pixels, rows) if digest not in self._rows]
            with _open_at(
                self._base.with_suffix(".features"), len(self._rows) * self.row_bytes
            ) as stream:
                stream.writelines(row.view(torch.uint8).numpy().tobytes() for _, row in new)
                stream.flush()
                os.fsync(stream.fileno())
            with _open_at(
                self._base.with_suffix(".hashes"), len(self._rows) * _HASH_BYTES
            ) as stream:
                stream.writelines(digest for digest, _ in new)
            self._rows.update(
                {digest: len(self._rows) + number for number, (digest, _) in enumerate(new)}
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The files are ours alone, and what other processes have appended is known."""
        assert self._base is not None
        with self._base.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read_hashes()
            yield

    def _read_hashes(self) -> None:
        assert self._base is not None
        path = self._base.with_suffix(".hashes")
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(len(self._rows) * _HASH_BYTES)
                while len(digest := stream.read(_HASH_BYTES)) == _HASH_BYTES:
                    self._rows[digest] = len(self._rows)


def cache_key(tower: VisionTower, weights: str, pixels: bool = False) -> str:
    """A name for everything that decides a row's value."""
    parts: list[Any] = [vars(tower.transform)]
    if not pixels:
        parts += [
            weights,
            tower.select_layers,
            tower.select_feature,
            tower.token_pool,
            str(tower.dtype),
        ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _open_at(path: Path, position: int):  # type: ignore[no-untyped-def]
    path.touch()
    stream = path.open("r+b")
    stream.truncate(position)
    stream.seek(position)
    return stream


class _Pictures(Dataset[Any]):
    """(name, sha256, pixels) of each picture; None for one that can't be read, no pixels where `known` has it."""

    def __init__(
        self, names: Sequence[str], folder: str | Path, transform: ImageTransform, known: Any
    ) -> None:
        self.names, self.folder, self.transform, self.known = names, folder, transform, known

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, bytes, torch.Tensor | None] | None:
        name = self.names[index]
        try:
            data = read_image_bytes(name, self.folder)
            digest = hashlib.sha256(data).digest()
            return (
                name,
                digest,
                None if digest in self.known else self.transform(decode_image(data)),
            )
        except ImageError:
            return None


class ImageFeatures:
    """The pictures of one folder by their names: `features["a.jpg"]` is a row of the cache.

    A name takes 24 bytes (a 16-byte hash and the row), so that millions can be handed to every worker process.
    """

    def __init__(self, cache: FeatureCache, names: Sequence[str], rows: Sequence[int]) -> None:
        keys = np.array([_name_key(name) for name in names], "S16")
        order = np.argsort(keys)
        self._cache, self._keys, self._rows = cache, keys[order], np.array(rows, np.int64)[order]

    @property
    def dummy_image(self) -> torch.Tensor:
        """An image of nothing, in the form of the others."""
        return torch.zeros(self._cache.shape, dtype=self._cache.dtype)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, image: str) -> bool:
        return self._find(image) is not None

    def __getitem__(self, image: str) -> torch.Tensor:
        if (row := self._find(image)) is None:
            raise KeyError(image)
        return self._cache.row(row)

    def _find(self, image: str) -> int | None:
        place = np.searchsorted(self._keys, key := np.bytes_(_name_key(image)))
        return (
            int(self._rows[place]) if place < len(self._keys) and self._keys[place] == key else None
        )


def _name_key(name: str) -> bytes:
    # numpy takes zero bytes at the end of a string for padding, and gives them back to nobody
    return hashlib.blake2b(name.encode(), digest_size=16).digest().rstrip(b"\0")


def cache_features(
    vision: VisionTower,
    data: DataArguments,
    args: TrainingArguments,
    weights: str,
    sets: Sequence[CaptionDataset],
) -> None:
    """Run the frozen tower over all pictures now, if that pays and fits, and hand the features to the datasets.

    Args:
        sets: the training set first.
    """
    mode = data.cache_vision_features
    if mode not in ("auto", "memory", "disk", "pixels", "off"):
        raise ValueError(
            f"--cache_vision_features is auto, memory, disk, pixels or off, not {mode!r}"
        )
    budget = data.feature_cache_gb * 1e9
    kinds = ["disk", "pixels"] if vision.frozen else ["pixels"]
    row_bytes = {
        kind: FeatureCache(vision, weights, pixels=kind == "pixels").row_bytes for kind in kinds
    }
    # no picture is shown by twenty records: in 3.3 million of them, the names need not be gathered to see it
    if mode == "off" or (
        mode == "auto" and len(sets[0].records) * min(row_bytes.values()) > 20 * budget
    ):
        return
    names = [image_names(dataset.records) for dataset in sets]
    if mode == "auto":
        fits = [kind for kind in kinds if sum(map(len, names)) * row_bytes[kind] <= budget]
        seen_again = args.num_train_epochs > 1 or args.max_steps > 0 or len(sets[0]) > len(names[0])
        if not fits or not seen_again:
            return
        mode = fits[0]
    cache = _open_cache(vision, weights, mode, data, args, sum(map(len, names)))
    for dataset, images in zip(sets, names):
        dataset.features = _fill_together(cache, images, dataset.image_folder, args)


def encode_main(argv: list[str] | None = None) -> int:
    """The command line of `llava encode`: the options of a training run, which then finds the features on disk."""
    model, data, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if data.cache_vision_features not in ("auto", "disk", "pixels"):
        raise ValueError("llava encode fills the disk: --cache_vision_features disk, or pixels")
    given = [
        (data.train_data_path, data.train_image_folder, "--train_image_folder"),
        (data.eval_data_path, data.val_image_folder, "--val_image_folder"),
    ]
    opened = [open_data(path, folder, option) for path, folder, option in given if path]
    if not opened:
        raise ValueError("--train_data_path is needed: a .json, .jsonl or .parquet file of records")
    tower = build_vision_tower(model_config(model, args.frozen_dtype))
    mode = "pixels" if data.cache_vision_features == "pixels" else "disk"
    names = [image_names(records) for records, _ in opened]
    weights = weights_digest(model.vision_tower)
    cache = _open_cache(
        tower.requires_grad_(False), weights, mode, data, args, sum(map(len, names))
    )
    found = [
        len(_fill_together(cache, images, folder, args))
        for images, (_, folder) in zip(names, opened)
    ]
    print(f"{sum(found):,} pictures are there, {sum(map(len, names)) - sum(found):,} can't be read. Train with the same "
          f"options and --cache_vision_features {mode}")  # fmt: skip
    return 0


def image_names(records: Sequence[Record]) -> list[str]:
    """Every picture of the records once, in their order; the records are parsed once for it."""
    return list(dict.fromkeys(name for record in records for name in record.images))


def _open_cache(
    vision: VisionTower,
    weights: str,
    mode: str,
    data: DataArguments,
    args: TrainingArguments,
    count: int,
) -> FeatureCache:
    """The cache of a mode, when its size has been printed.

    Raises:
        ValueError: the disk has no room for it.
    """
    folder = None if mode == "memory" else Path(data.feature_cache_dir).expanduser()
    cache = FeatureCache(vision.to(args.device), weights, folder, mode == "pixels")
    size, missing = count * cache.row_bytes, max(count - len(cache), 0) * cache.row_bytes
    if args.local_process_index == 0:
        what = "pictures as the tower takes them" if cache.pixels else "vision features of pictures"
        print(f"{count:,} {what}: {size / 1e9:.2f} GB {f'in {folder}' if folder else 'in memory'}")
    if folder and missing > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"--feature_cache_dir {folder}: {missing / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"
        )
    return cache


def _fill_together(
    cache: FeatureCache, images: list[str], folder: str | Path, args: TrainingArguments
) -> ImageFeatures:
    """On disk, this machine's processes share the work; then each one looks up where everything is."""
    workers, here = args.dataloader_num_workers, args.local_process_index
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    progress = not args.disable_tqdm and here == 0
    if processes > 1 and cache._base is not None:
        cache.fill(images[here::processes], folder, workers=workers, progress=progress)
        PartialState().wait_for_everyone()
    return cache.fill(images, folder, workers=workers, progress=progress)
