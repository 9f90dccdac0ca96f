"""`--data`: any source is converted once, and without a model the run starts from the demo's small models."""

from __future__ import annotations

import importlib.machinery
import io
import json
import logging
import shutil
import sys
import types
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_process import run_forked
from forms import save_to_disk

import llava_simplified.small_models
from llava_simplified import extras
from llava_simplified.arguments import parse_arguments
from llava_simplified.data.images import read_image_bytes
from llava_simplified.prepare.data_cache import find_image_folder, prepare_data
from llava_simplified.training import train_command
from llava_simplified.training.preflight import preflight


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of six images with sidecars, and a caption without an image; the cache is temporary."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_folder"
    folder.mkdir()
    for row in json.loads((data_folder / "train.json").read_text())[:6]:
        shutil.copy(data_folder / "images" / row["image"], folder)
        (folder / row["image"]).with_suffix(".txt").write_text(row["response"])
    (folder / "lost.txt").write_text("a caption")
    return folder


@pytest.fixture
def demo_models(tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the models of the demo by tiny ones."""
    root = tmp_path / "demo" / llava_simplified.small_models.LAYOUT
    shutil.copytree(models_folder / "mistral", root / "language_model")
    shutil.copytree(models_folder / "efficientnet", root / "vision_tower")
    monkeypatch.setattr(llava_simplified.small_models, "DEFAULT_CACHE", tmp_path / "demo")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prepare_data_converts_once_and_again_if_the_source_changes(
    folder: Path, package_log: pytest.LogCaptureFixture
) -> None:
    package_log.set_level(logging.INFO)
    first = prepare_data("my_folder")
    assert first.num_records == 6
    assert first.image_folder.samefile(folder)
    assert str(first.records) in package_log.text
    assert "lost.txt" in package_log.text
    written = first.records.stat().st_mtime_ns
    package_log.clear()
    assert prepare_data(str(folder)) == first._replace(image_folder=folder)
    assert first.records.stat().st_mtime_ns == written
    assert "lost.txt" in package_log.text, "every run must name what it skips"

    (folder / "0.txt").write_text("another caption")
    second = prepare_data("my_folder")
    assert second.records != first.records
    captions = {row["image"]: row["response"] for row in read_lines(second.records)}
    assert captions["0.jpg"] == "another caption"
    assert len(read_lines(first.records)) == 6, (
        "the old records must stay: a run that reads them may still be going on"
    )
    (folder / "0.jpg").rename(folder / "lost.jpg")
    assert prepare_data("my_folder").num_records == 6
    assert [row["image"] for row in read_lines(prepare_data("my_folder").records)][-1] == "lost.jpg"


def test_prepare_data_reads_the_sidecars_that_are_chosen(folder: Path) -> None:
    (folder / "captions.csv").write_text("image,caption\n0.jpg,a cat\n")
    (folder / "0.txt").write_text("one\ntwo")
    with pytest.raises(ValueError, match="several forms.*--sidecar txt"):
        prepare_data("my_folder")
    for choice, expected in (
        ("txt", {"response": "one\ntwo"}),
        ("lines", {"responses": ["one", "two"]}),
    ):
        data = prepare_data("my_folder", sidecar=choice)
        assert data.image_folder == Path("my_folder")
        assert expected.items() <= read_lines(data.records)[0].items()
    options = ["--data", "my_folder", "--sidecar", "lines", "--model_name_or_path", "some/model"]
    assert parse_arguments(options)[1].train_data_path == str(data.records)


def test_prepare_data_that_fails_leaves_no_records(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("url,words\nhttp://a.example/1.jpg,x\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="no caption column"):
            prepare_data("x.csv")
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_prepare_data_uses_records_as_they_are(data_folder: Path) -> None:
    data = prepare_data(str(data_folder / "train.json"))
    assert data.records == data_folder / "train.json"
    assert data.num_records == 12
    assert data.image_folder == data_folder / "images", (
        "expected the subfolder that contains the images"
    )


def parquet_bytes(caption: str) -> bytes:
    images = [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "text": [caption, "a dog"]}), buffer)
    return buffer.getvalue()


def test_prepare_data_copies_remote_files_with_their_images() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/hub/train-0.parquet", parquet_bytes("a cat"))
    files.pipe("/hub/train-1.parquet", parquet_bytes("a bird"))
    source = "memory://hub/train-*.parquet"
    try:
        data = prepare_data(source)
        assert [row["response"] for row in read_lines(data.records)] == [
            *("a cat", "a dog"),
            *("a bird", "a dog"),
        ]
        for row, content in zip(read_lines(data.records), [b"x", b"y"] * 2):
            assert read_image_bytes(row["image"], data.image_folder) == content
        assert prepare_data(source) == data
        files.pipe("/hub/train-0.parquet", parquet_bytes("another cat"))
        changed = prepare_data(source)
        assert read_lines(changed.records)[0]["response"] == "another cat"
        with pytest.raises(ValueError, match=r"folder.*hub/\*\.parquet"):
            prepare_data("memory://hub")
        with pytest.raises(ValueError, match="no file matches"):
            prepare_data("memory://hub/test-*.parquet")
    finally:
        files.rm("/hub", recursive=True)


class FakeDataset:
    """A result of `datasets.load_dataset`, with the attributes that the package uses."""

    def __init__(self, caption: str) -> None:
        self.caption = caption
        self._fingerprint = caption

    def save_to_disk(self, folder: Path) -> None:
        save_to_disk(folder, [pa.table({"image": [{"bytes": b"x"}], "text": [self.caption]})])


def test_prepare_data_loads_a_dataset_of_the_hub_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = {"train": FakeDataset("a cat"), "test": FakeDataset("a dog")}
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = lambda name, split: splits[split] if split else splits  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    for source, caption in (("owner/pets", "a cat"), ("owner/pets/test", "a dog")):
        data = prepare_data(source)
        (row,) = read_lines(data.records)
        assert row["response"] == caption
        assert read_image_bytes(row["image"], data.image_folder) == b"x"
    splits["train"] = FakeDataset("changed")
    assert read_lines(prepare_data("owner/pets").records)[0]["response"] == "changed"
    del splits["train"]
    splits["val"] = FakeDataset("x")
    with pytest.raises(ValueError, match=r"owner/pets/test, owner/pets/val"):
        prepare_data("owner/pets")


def test_prepare_data_without_the_library_names_the_missing_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"my/photos: no such file or folder.*datasets"):
        prepare_data("my/photos")
    with pytest.raises(ValueError, match=r"my/photos.csv: no such file"):
        prepare_data("my/photos.csv")


def test_prepare_data_of_urls_says_how_to_fetch_them(tmp_path: Path) -> None:
    (tmp_path / "urls.tsv").write_text("a cat\thttp://a.example/1.jpg\n")
    with pytest.raises(ValueError, match=r"llava download urls\.tsv"):
        prepare_data("urls.tsv")


def test_find_image_folder_does_not_choose_between_two(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\n1.jpg,a cat\n")
    for name in ("val", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="train.* and in .*val.*--train_image_folder"):
        find_image_folder("captions.csv")
    (tmp_path / "1.jpg").write_bytes(b"x")
    assert find_image_folder("captions.csv") == Path()


@pytest.mark.usefixtures("demo_models")
def test_data_without_a_model_starts_from_the_small_models(
    tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    package_log.set_level(logging.INFO)
    model, data, args = parse_arguments(["--data", "my_folder"])
    assert Path(model.model_name_or_path) == tmp_path / "demo" / "demo-v1" / "language_model"
    assert model.template == "bare"
    assert args.output_dir == "output/my_folder"
    assert args.num_train_epochs == 30
    assert data.train_image_folder == "my_folder"
    assert "small_folder" in package_log.text
    given = ["--data", "my_folder", "--lora_r", "2", "--output_dir", "output/mine"]
    model, _, args = parse_arguments([*given, "--num_train_epochs", "1"])
    assert (model.lora_r, args.output_dir, args.num_train_epochs) == (2, "output/mine", 1)


def test_data_with_a_model_keeps_the_other_defaults(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model_name_or_path: some/model\nlora_r: 5\n")
    for options in (["--config", "my.yaml"], ["--model_name_or_path", "some/model"]):
        model, data, args = parse_arguments(["--data", "my_folder", *options])
        assert model.template == "auto"
        assert args.num_train_epochs == 3
        assert args.output_dir == "output/model-clip-vit-base-patch16"
        assert str(data.train_data_path).endswith("records.jsonl")
    (tmp_path / "all.yaml").write_text("data: my_folder\nmodel_name_or_path: some/model\n")
    assert parse_arguments(["--config", "all.yaml"])[1].train_data_path == data.train_data_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "my_folder"], "llava demo.*--model_name_or_path"),
        (["--data", "nowhere", "--model_name_or_path", "x/y"], "nowhere: no such file"),
        (["--data", "my_folder", "--train_data_path", "x.json"], "--data and --train_data_path"),
    ],
)
def test_data_rejects_a_missing_source_or_model_and_a_second_source(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_simplified.small_models, "DEFAULT_CACHE", tmp_path / "empty")
    with pytest.raises(ValueError, match=message):
        parse_arguments(options)


@pytest.mark.medium
@pytest.mark.usefixtures("demo_models")
def test_train_on_a_folder_writes_a_checkpoint(tmp_path: Path) -> None:
    argv = ["--data", "my_folder", "--max_steps", "2", "--mm_vision_select_layer", "-1", "1"]
    argv += ["--feature_cache_dir", "features"]
    assert train_command.main(argv) == 0
    config = json.loads((tmp_path / "output" / "my_folder" / "llava.json").read_text())
    assert config["architecture"]["template"] == "bare"


@pytest.mark.slow
@pytest.mark.usefixtures("demo_models")
def test_preflight_does_its_dry_run_with_a_folder_and_the_small_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dry run is another process, which gets only the command line."""
    monkeypatch.setattr("llava_simplified.training.preflight.subprocess.run", run_forked)
    root = llava_simplified.small_models.small_models()
    argv = ["--data", "my_folder", "--preflight", "true", "--template", "bare", "--max_steps", "2"]
    argv += ["--model_name_or_path", str(root.language_model)]
    argv += ["--vision_tower", str(root.vision_tower), "--mm_vision_select_layer", "-1"]
    preflight(argv, *parse_arguments(argv))
