"""Features kept are the features the tower gives, found only for the same picture through the same tower."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_run import options, run

from llava_simplified.data.images import decode_image
from llava_simplified.model.vision import VisionTower
from llava_simplified.training.build_trainer import dummy_image_batch
from llava_simplified.training.encode_command import main as encode_main
from llava_simplified.training.feature_cache import (
    FeatureCache,
    ImageFeatures,
    cache_key,
)


def tower(models_folder: Path, dtype: torch.dtype = torch.float32, **choices) -> VisionTower:
    vision = VisionTower.from_pretrained(str(models_folder / "clip"), dtype=dtype, **choices)
    return vision.requires_grad_(False).eval()


def direct(vision: VisionTower, path: Path) -> torch.Tensor:
    return vision(vision.transform(decode_image(path.read_bytes()))[None])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_kept_is_what_the_tower_gives(
    models_folder: Path, data_folder: Path, tmp_path: Path, dtype: torch.dtype, on_disk: bool
) -> None:
    vision = tower(models_folder, dtype)
    cache = FeatureCache(vision, "w", tmp_path if on_disk else None)
    names = [f"{i}.jpg" for i in range(5)]
    features = cache.fill(names, data_folder / "images", batch_size=1, progress=False)
    features = pickle.loads(pickle.dumps(features))  # as a worker process gets it
    for name in names:
        assert torch.equal(features[name], direct(vision, data_folder / "images" / name))


def test_a_second_run_computes_nothing(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    names = [f"{i}.jpg" for i in range(5)]
    first = FeatureCache(tower(models_folder), "w", tmp_path).fill(
        names, data_folder / "images", progress=False
    )
    blind = tower(models_folder)
    blind.forward = lambda pixels: pytest.fail("the tower ran again")  # type: ignore[method-assign]
    again = FeatureCache(blind, "w", tmp_path).fill(
        names[::-1], data_folder / "images", progress=False
    )
    assert all(torch.equal(first[name], again[name]) for name in names)


def test_a_stale_feature_is_never_found(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    vision = tower(models_folder)
    keys = {
        cache_key(vision, "w"),
        cache_key(vision, "other weights"),
        cache_key(tower(models_folder, select_layer=-1), "w"),
        cache_key(tower(models_folder, token_pool=2), "w"),
        cache_key(tower(models_folder, torch.bfloat16), "w"),
    }
    assert len(keys) == 5
    (tmp_path / "images").mkdir()
    picture = tmp_path / "images" / "x.jpg"
    for source in ("0.jpg", "1.jpg"):  # the same name, another picture
        picture.write_bytes((data_folder / "images" / source).read_bytes())
        features = FeatureCache(vision, "w", tmp_path / "cache").fill(
            ["x.jpg"], picture.parent, progress=False
        )
        torch.testing.assert_close(features["x.jpg"], direct(vision, picture))


@pytest.mark.parametrize("lost", [1, 700, 5000])
def test_a_killed_run_leaves_no_half_row(
    models_folder: Path, data_folder: Path, tmp_path: Path, lost: int
) -> None:
    names = [f"{i}.jpg" for i in range(6)]
    vision = tower(models_folder)
    FeatureCache(vision, "w", tmp_path).fill(
        names[:4], data_folder / "images", batch_size=1, progress=False
    )
    [hashes] = tmp_path.glob("*.hashes")
    [rows] = tmp_path.glob("*.features")
    hashes.write_bytes(hashes.read_bytes()[: 3 * 32 + 5])  # the fourth hash was being written
    rows.write_bytes(rows.read_bytes()[:-1] + bytes(lost))
    features = FeatureCache(vision, "w", tmp_path).fill(
        names, data_folder / "images", batch_size=1, progress=False
    )
    for name in names:
        assert torch.equal(features[name], direct(vision, data_folder / "images" / name))


def test_a_picture_that_cannot_be_read_is_left_to_the_dataset(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    cache = FeatureCache(tower(models_folder), "w", tmp_path)
    features = cache.fill(["gone.jpg", "1.jpg"], data_folder / "images", progress=False)
    assert len(features) == 1 and "1.jpg" in features and "gone.jpg" not in features
    with pytest.raises(KeyError):
        features["gone.jpg"]


def test_a_tower_in_training_is_refused(models_folder: Path) -> None:
    with pytest.raises(ValueError, match="being trained"):
        FeatureCache(tower(models_folder).requires_grad_(True), "w")


def test_several_processes_fill_one_cache(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Each opened it empty; neither may write over the other's rows, nor keep a picture twice."""
    vision, images = tower(models_folder), data_folder / "images"
    one, other = (FeatureCache(vision, "w", tmp_path) for _ in range(2))
    names = [f"{i}.jpg" for i in range(8)]
    one.fill(names[:5], images, batch_size=2, progress=False)
    features = other.fill(names[3:], images, batch_size=2, progress=False)
    one.fill(names, images, progress=False)
    [hashes] = tmp_path.glob("*.hashes")
    assert hashes.stat().st_size == 8 * 32
    for found in (
        features,
        one.fill(names, images, progress=False),
        FeatureCache(vision, "w", tmp_path).fill(names, images),
    ):
        for name in (name for name in names if name in found):
            torch.testing.assert_close(found[name], direct(vision, images / name))


def test_a_run_after_encoding_ahead_does_not_run_the_tower(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
) -> None:
    """With the options of the run that follows, which then runs the tower over nothing; in worker processes too."""
    more = {"eval_data_path": data_folder / "val.json", "val_image_folder": data_folder / "images"}
    words = options(
        models_folder, data_folder, tmp_path / "out", max_steps=1, dataloader_num_workers=1, **more
    )
    assert encode_main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "16 vision features of pictures: 0.00 GB" in printed
        and "16 pictures are there, 0 can't be read" in printed
    )
    monkeypatch.setattr(VisionTower, "forward", lambda *_: pytest.fail("the tower ran again"))
    assert encode_main(words) == 0
    run([*words, "--cache_vision_features", "disk"])
    with pytest.raises(ValueError, match="llava encode fills the disk"):
        encode_main([*words, "--cache_vision_features", "memory"])


def test_a_full_disk_is_seen_before(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="GB are needed"):
        encode_main(options(models_folder, data_folder, tmp_path / "out"))


def test_every_name_is_found_and_no_other() -> None:
    """Many names: some of their hashes end in zero bytes, which numpy's strings lose."""
    names = [f"{number}.jpg" for number in range(3000)]
    index = ImageFeatures(SimpleNamespace(read_row=lambda row: row), names, range(3000))  # type: ignore[arg-type]
    assert [index[name] for name in names] == list(range(3000))
    assert "3000.jpg" not in index


@pytest.mark.parametrize("pixels", [False, True])
def test_a_blank_image_has_the_form_of_what_is_kept(
    models_folder: Path, data_folder: Path, tmp_path: Path, pixels: bool
) -> None:
    """Else, of processes that share a model's weights, one runs the tower for a text and waits for the others for ever."""
    vision = tower(models_folder, torch.bfloat16)
    data = SimpleNamespace(features=None)
    assert dummy_image_batch(SimpleNamespace(vision_tower=vision), data).keys() == {"pixel_values"}  # type: ignore[arg-type]
    data.features = FeatureCache(vision, "w", pixels=pixels).fill(
        ["0.jpg"], data_folder / "images", progress=False
    )
    ((name, blank),) = dummy_image_batch(SimpleNamespace(vision_tower=vision), data).items()  # type: ignore[arg-type]
    assert name == ("pixel_values" if pixels else "image_features")
    assert (blank.shape[1:], blank.dtype) == (
        data.features["0.jpg"].shape,
        data.features["0.jpg"].dtype,
    )
    assert not blank.any()
