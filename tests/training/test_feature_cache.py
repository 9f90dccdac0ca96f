"""Cached features are those of the tower, and are found only for the same image and the same tower."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import run_training, training_options

from llava_simplified.data.images import decode_image
from llava_simplified.model.vision import VisionTower
from llava_simplified.training.build_trainer import dummy_image_batch
from llava_simplified.training.encode_command import main as encode_main
from llava_simplified.training.feature_cache import FeatureCache, ImageFeatures, cache_key


def load_tower(
    models_folder: Path, dtype: torch.dtype = torch.float32, **choices: Any
) -> VisionTower:
    tower = VisionTower.from_pretrained(str(models_folder / "clip"), dtype=dtype, **choices)
    return tower.requires_grad_(False).eval()


def tower_features(tower: VisionTower, path: Path) -> torch.Tensor:
    """Return the features of one image, computed by the tower itself."""
    pixels = tower.transform(decode_image(path.read_bytes()))
    return tower(pixels[None])[0]


def fail_forward(*_: object) -> None:
    pytest.fail("the tower ran again")


# ---- the cache ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [True, False])
def test_cache_returns_what_the_tower_returns(
    models_folder: Path, data_folder: Path, tmp_path: Path, dtype: torch.dtype, on_disk: bool
) -> None:
    tower = load_tower(models_folder, dtype)
    cache = FeatureCache(tower, "w", tmp_path if on_disk else None)
    names = [f"{number}.jpg" for number in range(5)]
    features = cache.fill(names, data_folder / "images", batch_size=1, progress=False)
    features = pickle.loads(pickle.dumps(features))  # as a worker process receives it
    for name in names:
        expected = tower_features(tower, data_folder / "images" / name)
        assert torch.equal(features[name], expected)


def test_cache_in_memory_is_sent_to_workers_as_one_tensor(
    models_folder: Path, data_folder: Path
) -> None:
    """torch sends each tensor through an open file, and a process may have only some thousand of them."""
    tower = load_tower(models_folder)
    cache = FeatureCache(tower, "w")
    names = [f"{number}.jpg" for number in range(6)]
    cache.fill(names[:4], data_folder / "images", progress=False)
    assert isinstance(cache.__getstate__()["_memory"], torch.Tensor)
    # Rows can still be added.
    features = cache.fill(names, data_folder / "images", batch_size=1, progress=False)
    for name in names:
        expected = tower_features(tower, data_folder / "images" / name)
        torch.testing.assert_close(features[name], expected)


def test_cache_computes_nothing_in_a_second_run(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    names = [f"{number}.jpg" for number in range(5)]
    images = data_folder / "images"
    first = FeatureCache(load_tower(models_folder), "w", tmp_path).fill(
        names, images, progress=False
    )
    tower = load_tower(models_folder)
    tower.forward = fail_forward  # type: ignore[method-assign, assignment]
    second = FeatureCache(tower, "w", tmp_path).fill(names[::-1], images, progress=False)
    assert all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.medium
def test_cache_never_finds_a_stale_feature(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    crop = load_tower(models_folder)
    pad = load_tower(models_folder, image_aspect_ratio="pad")
    keys = {
        cache_key(crop, "w"),
        cache_key(crop, "other weights"),
        cache_key(load_tower(models_folder, select_layer=-1), "w"),
        cache_key(load_tower(models_folder, token_pool=2), "w"),
        cache_key(pad, "w"),
        cache_key(load_tower(models_folder, torch.bfloat16), "w"),
    }
    assert len(keys) == 6
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "x.jpg"
    for source in ("0.jpg", "1.jpg"):  # another image under the same name
        image.write_bytes((data_folder / "images" / source).read_bytes())
        for tower in (crop, pad):  # with and without borders, in the same folder
            cache = FeatureCache(tower, "w", tmp_path / "cache")
            features = cache.fill(["x.jpg"], image.parent, progress=False)
            torch.testing.assert_close(features["x.jpg"], tower_features(tower, image))


def test_cache_key_is_that_of_release_0_1_0(models_folder: Path) -> None:
    """Caches that were filled with 0.1.0 are found."""
    tower = load_tower(models_folder)
    assert cache_key(tower, "w") == "eeff5fccaf87993e"
    assert cache_key(tower, "w", pixels=True) == "13847bc71f5bc376"


def test_cache_describes_its_content(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    tower = load_tower(models_folder)
    cache = FeatureCache(tower, "digest", tmp_path)
    assert not list(tmp_path.iterdir()), "opening a cache must not write to it: it may be read-only"
    cache.fill(["0.jpg"], data_folder / "images", progress=False)
    description = json.loads((tmp_path / f"{cache_key(tower, 'digest')}.json").read_text())
    assert description["content"] == "features"
    assert description["weights"] == "digest"
    assert description["select_layers"] == [-2]


@pytest.mark.parametrize("torn_bytes", [1, 700, 5000])
def test_cache_of_a_killed_run_has_no_torn_row(
    models_folder: Path, data_folder: Path, tmp_path: Path, torn_bytes: int
) -> None:
    names = [f"{number}.jpg" for number in range(6)]
    images = data_folder / "images"
    tower = load_tower(models_folder)
    FeatureCache(tower, "w", tmp_path).fill(names[:4], images, batch_size=1, progress=False)
    [hashes] = tmp_path.glob("*.hashes")
    [rows] = tmp_path.glob("*.features")
    hashes.write_bytes(hashes.read_bytes()[: 3 * 32 + 5])  # killed while it wrote the fourth hash
    rows.write_bytes(rows.read_bytes()[:-1] + bytes(torn_bytes))
    cache = FeatureCache(tower, "w", tmp_path)
    features = cache.fill(names, images, batch_size=1, progress=False)
    for name in names:
        assert torch.equal(features[name], tower_features(tower, images / name))


def test_cache_leaves_out_unreadable_images(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    cache = FeatureCache(load_tower(models_folder), "w", tmp_path)
    features = cache.fill(["gone.jpg", "1.jpg"], data_folder / "images", progress=False)
    assert len(features) == 1
    assert "1.jpg" in features
    assert "gone.jpg" not in features
    with pytest.raises(KeyError):
        features["gone.jpg"]


def test_cache_refuses_a_tower_that_is_trained(models_folder: Path) -> None:
    with pytest.raises(ValueError, match="--cache_vision_features"):
        FeatureCache(load_tower(models_folder).requires_grad_(True), "w")


def test_two_caches_can_fill_one_folder(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """As two processes do, both open the empty folder. Neither may overwrite the other's rows or store an image twice."""
    tower, images = load_tower(models_folder), data_folder / "images"
    one = FeatureCache(tower, "w", tmp_path)
    other = FeatureCache(tower, "w", tmp_path)
    names = [f"{number}.jpg" for number in range(8)]
    one.fill(names[:5], images, batch_size=2, progress=False)
    features = other.fill(names[3:], images, batch_size=2, progress=False)
    one.fill(names, images, progress=False)
    [hashes] = tmp_path.glob("*.hashes")
    assert hashes.stat().st_size == 8 * 32
    third = FeatureCache(tower, "w", tmp_path)
    for filled in (features, one.fill(names, images, progress=False), third.fill(names, images)):
        for name in names:
            if name in filled:
                expected = tower_features(tower, images / name)
                torch.testing.assert_close(filled[name], expected)


def test_image_features_find_every_name_and_no_other() -> None:
    """Among many names, some hashes end in zero bytes, which NumPy's strings drop."""
    names = [f"{number}.jpg" for number in range(3000)]
    cache: Any = SimpleNamespace(read_row=lambda row: row)
    index = ImageFeatures(cache, names, range(3000))
    assert [index[name] for name in names] == list(range(3000))
    assert "3000.jpg" not in index


@pytest.mark.parametrize("pixels", [False, True])
def test_dummy_image_has_the_form_of_the_cached_images(
    models_folder: Path, data_folder: Path, pixels: bool
) -> None:
    """With another form, one process would run the tower while the others wait for it forever."""
    tower = load_tower(models_folder, torch.bfloat16)
    model: Any = SimpleNamespace(vision_tower=tower)
    dataset: Any = SimpleNamespace(features=None)
    assert dummy_image_batch(model, dataset).keys() == {"pixel_values"}

    cache = FeatureCache(tower, "w", pixels=pixels)
    dataset.features = cache.fill(["0.jpg"], data_folder / "images", progress=False)
    ((name, dummy),) = dummy_image_batch(model, dataset).items()
    assert name == ("pixel_values" if pixels else "image_features")
    cached = dataset.features["0.jpg"]
    assert dummy.shape[1:] == cached.shape
    assert dummy.dtype == cached.dtype
    assert not dummy.any()


# ---- llava encode ----


@pytest.mark.medium
def test_training_run_finds_all_features_of_encode(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    package_log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`llava encode` accepts the options of the run. The run then finds all features, with worker processes too."""
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        max_steps=1,
        dataloader_num_workers=1,
        eval_data_path=data_folder / "val.json",
        val_image_folder=data_folder / "images",
    )
    assert encode_main(options) == 0
    assert "16 vision features of images: 0.00 GB" in package_log.text
    printed = capsys.readouterr().out
    assert "16 images" in printed
    assert "0 could not be read" in printed
    assert "--cache_vision_features disk" in printed

    monkeypatch.setattr(VisionTower, "forward", fail_forward)
    assert encode_main(options) == 0
    run_training([*options, "--cache_vision_features", "disk"])
    with pytest.raises(ValueError, match="--cache_vision_features memory: .*`llava encode`"):
        encode_main([*options, "--cache_vision_features", "memory"])


def test_encode_stores_the_pixels_of_a_trained_tower(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its features change with every step, so the run could not use them."""
    options = training_options(
        models_folder, data_folder, tmp_path / "out", tune_vision_tower="full"
    )
    assert encode_main(options) == 0
    assert "--cache_vision_features pixels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--cache_vision_features disk: --tune_vision_tower full"):
        encode_main([*options, "--cache_vision_features", "disk"])


def test_encode_checks_the_disk_space_first(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="--feature_cache_dir .*GB"):
        encode_main(training_options(models_folder, data_folder, tmp_path / "out"))
