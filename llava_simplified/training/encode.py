"""Cache the vision features of a run, as `--cache_vision_features` specifies."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.data.dataset import CaptionDataset, drop_bad_records
from llava_simplified.data.open_data import open_data
from llava_simplified.data.records import Record
from llava_simplified.model.build import build_vision_tower
from llava_simplified.model.vision import VisionTower
from llava_simplified.model.weights import weights_digest
from llava_simplified.training.feature_cache import FeatureCache, ImageFeatures
from llava_simplified.training.model_config import model_config, trained_parts
from llava_simplified.training.preference_pairs import record_problem

logger = logging.getLogger(__name__)

MODES = ("auto", "memory", "disk", "pixels", "off")
# `auto` assumes that no image occurs in more records than this. The number of records divided by it is
# therefore a lower bound of the number of images. If even that many images do not fit into the cache,
# millions of records need not be parsed to count the images.
_MAX_RECORDS_PER_IMAGE = 20


def check_cache_mode(mode: str, tune_vision_tower: str = "off") -> None:
    """Raise ValueError if `--cache_vision_features` has an unknown value, or one that is wrong for a trained tower."""
    if mode not in MODES:
        raise ValueError(
            f"--cache_vision_features {mode}: expected auto, memory, disk, pixels or off."
        )
    if tune_vision_tower != "off" and mode in ("memory", "disk"):
        raise ValueError(
            f"--cache_vision_features {mode}: --tune_vision_tower {tune_vision_tower} changes the features with every step. "
            "Pass --cache_vision_features pixels, auto or off."
        )


def cache_features(
    vision: VisionTower,
    data: DataArguments,
    args: TrainingArguments,
    tower_digest: str,
    datasets: Sequence[CaptionDataset],
) -> None:
    """Cache the features of all images as `--cache_vision_features` specifies, and set `dataset.features`.

    Args:
        vision: The vision tower.
        data: Data options.
        args: Training options.
        tower_digest: Digest of the tower's weights.
        datasets: The training set, and the validation set if there is one.

    Raises:
        ValueError: The mode is unknown, or the disk space is insufficient.
    """
    mode = data.cache_vision_features
    check_cache_mode(mode)
    if mode == "off":
        return
    budget = data.feature_cache_gb * 1e9
    row_bytes = _row_bytes_by_mode(vision, tower_digest)
    if mode == "auto":
        fewest_images = len(datasets[0].records) / _MAX_RECORDS_PER_IMAGE
        if fewest_images * min(row_bytes.values()) > budget:
            return

    # Parse all records only after the check above, because millions of them take minutes.
    names = [unique_image_names(dataset.records) for dataset in datasets]
    count = sum(len(images) for images in names)
    if mode == "auto":
        has_several_epochs = args.num_train_epochs > 1 or args.max_steps > 0
        # Even in a single epoch, an image is used more than once if it occurs in several examples.
        repeats_images = has_several_epochs or len(datasets[0]) > len(names[0])
        fitting = [name for name, size in row_bytes.items() if count * size <= budget]
        if not fitting or not repeats_images:
            return
        mode = fitting[0]  # the preferred mode is the first one

    cache = _open_cache(vision, tower_digest, mode, data, args, count)
    for dataset, images in zip(datasets, names):
        dataset.features = _fill_together(cache, images, dataset.image_folder, args)


def _row_bytes_by_mode(vision: VisionTower, tower_digest: str) -> dict[str, int]:
    """Return the bytes per image of the modes that `auto` selects from, the preferred mode first."""
    sizes = {}
    # Features of a trained tower change with every step, so only pixels can be cached.
    if vision.frozen:
        sizes["disk"] = FeatureCache(vision, tower_digest).row_bytes
    sizes["pixels"] = FeatureCache(vision, tower_digest, pixels=True).row_bytes
    return sizes


def encode_data(
    model_args: ModelArguments, data: DataArguments, args: TrainingArguments
) -> tuple[int, int, str]:
    """Fill the cache on disk with the images of a training run (`llava encode`).

    The job can be killed and restarted at any time. Images in the cache are not encoded again.

    Returns:
        Number of images in the cache, number of images that cannot be read, and the mode ("disk" or
        "pixels").

    Raises:
        ValueError: No data is specified, the mode does not use the disk or is wrong for a trained tower, or the disk space is
            insufficient.
    """
    if data.cache_vision_features not in ("auto", "disk", "pixels"):
        raise ValueError(
            f"--cache_vision_features {data.cache_vision_features}: `llava encode` writes to the disk. Pass "
            "--cache_vision_features disk, or pixels."
        )
    check_cache_mode(data.cache_vision_features, model_args.tune_vision_tower)
    # `auto` stores what the run can use: the features of a tower that is trained change with every step.
    is_tuned = trained_parts(model_args).vision_tower != "none"
    mode = "pixels" if is_tuned or data.cache_vision_features == "pixels" else "disk"
    opened = []
    for path, folder, option, objective in (
        (data.train_data_path, data.train_image_folder, "--train_image_folder", args.objective),
        (data.eval_data_path, data.val_image_folder, "--val_image_folder", "sft"),
    ):
        if path:
            share = data.max_bad_records
            records, folder = open_data(
                path,
                folder,
                option,
                # Pairs that cannot be used, such as those with an empty answer, are left out below.
                require_responses=objective != "dpo",
                max_bad_records=share,
            )
            usable = drop_bad_records(records, share, problem_of=record_problem(objective))
            opened.append((usable, folder))
    if not opened:
        raise ValueError(
            "--train_data_path is required: a .json, .jsonl or .parquet file of records."
        )
    tower = build_vision_tower(model_config(model_args, args.frozen_dtype))
    tower.requires_grad_(False)
    names = [unique_image_names(records) for records, _ in opened]
    count = sum(len(images) for images in names)
    digest = weights_digest(model_args.vision_tower)
    cache = _open_cache(tower, digest, mode, data, args, count)
    encoded = 0
    for images, (_, folder) in zip(names, opened):
        encoded += len(_fill_together(cache, images, folder, args))
    return encoded, count - encoded, mode


def unique_image_names(records: Sequence[Record]) -> list[str]:
    """Parse all records, and return their image names without repetitions, in order."""
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(record.images))
    return list(names)


def _open_cache(
    vision: VisionTower,
    tower_digest: str,
    mode: str,
    data: DataArguments,
    args: TrainingArguments,
    count: int,
) -> FeatureCache:
    """Open the cache of a mode, log its size, and check the disk space.

    Args:
        vision: The vision tower; it is moved to the device of the run.
        tower_digest: Digest of the tower's weights.
        mode: "memory", "disk" or "pixels".
        data: Data options.
        args: Training options.
        count: Number of images.

    Raises:
        ValueError: The disk space is insufficient.
    """
    folder = None if mode == "memory" else Path(data.feature_cache_dir).expanduser()
    cache = FeatureCache(vision.to(args.device), tower_digest, folder, pixels=mode == "pixels")
    if args.local_process_index == 0:
        content = "resized images" if cache.pixels else "vision features of images"
        place = f"in {folder}" if folder else "in memory"
        gigabytes = count * cache.row_bytes / 1e9
        logger.info("Caching %s %s: %.2f GB %s", f"{count:,}", content, gigabytes, place)
    if folder is None:
        return cache
    required = max(count - len(cache), 0) * cache.row_bytes
    free = shutil.disk_usage(folder).free
    if required > free:
        raise ValueError(
            f"--feature_cache_dir {folder}: {required / 1e9:.1f} GB are required, but only {free / 1e9:.1f} GB are free. Pass "
            "another --feature_cache_dir, or train without a cache (`llava train --cache_vision_features off`)."
        )
    return cache


def _fill_together(
    cache: FeatureCache, images: Sequence[str], folder: str | Path, args: TrainingArguments
) -> ImageFeatures:
    """Fill the cache with all images, and return the features by image name.

    If the cache is on disk, the processes of this machine divide the images among them.
    """
    workers = args.dataloader_num_workers
    rank = args.local_process_index
    # torchrun and DeepSpeed set the first variable, MPI launchers the second.
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    progress = not args.disable_tqdm and rank == 0
    # First call of `fill`: encode this process's part of the images. A cache in memory cannot be
    # shared, so there each process encodes all images below.
    if local_world_size > 1 and cache.on_disk:
        cache.fill(images[rank::local_world_size], folder, workers=workers, progress=progress)
        PartialState().wait_for_everyone()
    # Second call: with a shared cache nothing is left to encode. It reads the hashes that the other
    # processes have written, and returns the rows of all images.
    return cache.fill(images, folder, workers=workers, progress=progress)
