"""Cleaning: every verdict true, every record accounted for, nothing done twice."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.prepare import clean as module
from llava_simplified.prepare.clean import Rules, clean, find_duplicates, main, perceptual_hash


def photo(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def bad_pictures(folder: Path) -> dict[str, str]:
    """Writes one picture of each kind that must be set aside; {file name: reason}."""
    data = jpeg(photo(1, 400, 300), quality=90)
    middle = len(data) // 2
    (folder / "cut.jpg").write_bytes(data[:middle])
    (folder / "mid.jpg").write_bytes(
        data[:middle] + b"\xff\xd9\x00\xff\xc4" * 3 + data[middle + 15 :]
    )
    (folder / "page.jpg").write_text("<html>gone</html>")
    (folder / "empty.jpg").write_bytes(b"")
    photo(2, 20, 20).save(folder / "small.png")
    photo(3, 1200, 60).save(folder / "wide.png")
    frames = [photo(i, 64, 64) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    png = io.BytesIO()
    photo(4).save(png, "PNG")
    (folder / "cut.png").write_bytes(png.getvalue()[: len(png.getvalue()) // 2])
    return {"cut.jpg": "truncated", "mid.jpg": "corrupt", "page.jpg": "html", "empty.jpg": "not_image",
            "small.png": "too_small", "wide.png": "aspect", "moving.gif": "animated", "cut.png": "truncated",
            "gone.jpg": "missing", "../secret.jpg": "unsafe", "a caption " * 40: "missing"}  # fmt: skip


def row(image: str, *captions: str) -> dict[str, Any]:
    said = {"response": captions[0]} if len(captions) == 1 else {"responses": list(captions)}
    return {"image": image, "instruction": "Generate a caption of this image:", **said}


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, list[dict[str, Any]], dict[str, str]]:
    """A folder with good and bad pictures in turn, their rows in records.json, and the reasons by file name."""
    (tmp_path / "images").mkdir()
    reasons = bad_pictures(tmp_path / "images")
    (tmp_path / "secret.jpg").write_bytes(jpeg(photo(9)))
    rows = []
    for index, name in enumerate(reasons):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(jpeg(photo(100 + index)))
        rows += [row(f"{index}.jpg", f"good {index}"), row(name, "bad")]
    (tmp_path / "records.json").write_text(json.dumps(rows, indent=1))
    return tmp_path, rows, reasons


def quarantine(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out_quarantine.jsonl").read_text().splitlines()]


def test_each_reason_is_true_and_order_is_kept(mixed: tuple) -> None:
    folder, rows, reasons = mixed
    counts = clean(
        folder / "records.json", folder / "out.json", image_folder=folder / "images", workers=2
    )
    assert json.loads((folder / "out.json").read_text()) == rows[::2]
    aside = quarantine(folder)
    assert [entry["record"] for entry in aside] == rows[1::2]
    assert {entry["record"]["image"]: entry["reason"] for entry in aside} == reasons
    assert all(entry["detail"] for entry in aside)
    assert sum(counts.values()) == len(rows)
    page = (folder / "out_report.html").read_text()
    assert page.count("data:image/webp;base64") == 3, "small, wide and moving can be shown"
    assert "Premature end" in page
    assert not list(folder.glob("*.work"))


def test_verdicts_equal_the_tutorials_plus_the_corrupt_ones_it_misses(mixed: tuple) -> None:
    """The tutorial opens with Pillow and runs the CLIP processor; what passes there and not here must be corrupt in
    mid-scan, or against a rule that the tutorial does not have."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, rows, reasons = mixed
    processor = CLIPImageProcessorPil()
    passes = set()
    for entry in rows:
        try:
            processor(
                Image.open(folder / "images" / entry["image"]).convert("RGB"), return_tensors="pt"
            )
            passes.add(entry["image"])
        except (OSError, SyntaxError):
            continue
    clean(folder / "records.json", folder / "out.json", image_folder=folder / "images", workers=1)
    kept = {entry["image"] for entry in json.loads((folder / "out.json").read_text())}
    assert kept < passes
    assert {reasons[name] for name in passes - kept} == {
        "corrupt",
        "too_small",
        "aspect",
        "animated",
        "unsafe",
    }
    assert passes - kept >= {"mid.jpg"}


def test_captions_are_judged_and_good_ones_of_a_record_stay(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg(photo(1)))
    rows = [
        row("1.jpg", "a cat"),
        row("1.jpg", " "),
        row("1.jpg", "x" * 99),
        row("1.jpg", "good", "", "fine", "y" * 99),
    ]
    rows.append({"image": "1.jpg", "text": "no record"})
    rows.append({"instruction": "Say hi", "response": "hi"})
    (tmp_path / "records.json").write_text(json.dumps(rows))
    clean(tmp_path / "records.json", tmp_path / "out.json", rules=Rules(max_caption=50), workers=1)
    assert json.loads((tmp_path / "out.json").read_text()) == [
        rows[0],
        row("1.jpg", "good", "fine"),
        rows[5],
    ]
    reasons = [
        (entry["reason"], entry["record"].get("responses")) for entry in quarantine(tmp_path)
    ]
    assert reasons == [("empty_caption", None), ("long_caption", None),
                       ("empty_caption, long_caption", ["", "y" * 99]), ("not_a_record", None)]  # fmt: skip


@pytest.mark.parametrize("dedupe", ["exact", "perceptual"])
def test_duplicates_of_an_earlier_picture_are_set_aside(tmp_path: Path, dedupe: str) -> None:
    originals = [photo(i, 300, 200) for i in range(12)]
    files = {}
    for i, image in enumerate(originals):
        files[f"{i}.jpg"] = jpeg(image, quality=92)
    files["same.jpg"] = files["3.jpg"]
    files["smaller.jpg"] = jpeg(originals[5].resize((150, 100)), quality=70)
    files["mirrored.jpg"] = jpeg(originals[6].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(row(name, "x")) for name in files))
    clean(
        tmp_path / "records.jsonl",
        tmp_path / "out.json",
        dedupe=dedupe,
        rules=Rules(perceptual=dedupe == "perceptual"),
    )
    aside = {entry["record"]["image"]: entry["detail"] for entry in quarantine(tmp_path)}
    expected = {"same.jpg": "of records.jsonl row 3"}
    if dedupe == "perceptual":
        expected["smaller.jpg"] = "of records.jsonl row 5"
    assert aside == expected


def test_a_folder_that_is_not_there_is_no_reason_to_set_everything_aside(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(
        '[{"image": "1.jpg", "instruction": "What?", "response": "a cat"}]'
    )
    with pytest.raises(ValueError, match="--image-folder .*nowhere: no such folder"):
        clean(tmp_path / "x.json", tmp_path / "good.json", image_folder=tmp_path / "nowhere")
    assert not (tmp_path / "good.json").exists()


def test_looks_are_compared_as_brute_force_does() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (300, 19), dtype=np.uint8)
    looks = np.concatenate([base, base[:100]])
    for i in range(300, 400):  # flip up to seven bits
        for bit in rng.choice(128, i % 8, replace=False):
            looks[i, bit // 8] ^= 1 << (bit % 8)
    found = find_duplicates(np.arange(400), looks, perceptual=True)
    bits = np.unpackbits(looks[:, :16], axis=1)
    expected = {}
    for i in range(300, 400):
        near = np.flatnonzero((bits[:i] != bits[i]).sum(1) <= 5)
        if len(near):
            expected[i] = int(near[0])
    assert found == expected


def test_the_look_survives_size_and_compression() -> None:
    image = photo(1, 640, 480)
    one, other = (
        perceptual_hash(np.asarray(image)),
        perceptual_hash(decode_image(jpeg(image.resize((200, 150)), quality=60))),
    )
    assert (
        np.unpackbits(np.frombuffer(one[:16], np.uint8))
        != np.unpackbits(np.frombuffer(other[:16], np.uint8))
    ).sum() <= 5


@pytest.mark.parametrize("size", ["64", "exact"])
def test_compacted_survivors_are_read_by_the_trainer(
    mixed: tuple, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows, _ = mixed
    status = main([str(folder / "records.json"), "--output", str(folder / "out.json"), "--workers", "1",
                   "--image-folder", str(folder / "images"), "--compact", str(folder / "shards"),
                   "--compact-size", size])  # fmt: skip
    assert status == 0
    assert "11 ok" in capsys.readouterr().out
    records = open_records(folder / "out.json")
    assert [record.responses[0] for record in records] == [entry["response"] for entry in rows[::2]]
    for index, record in enumerate(records):
        data = read_image_bytes(record.images[0], folder / "shards")
        original = (folder / "images" / f"{index}.jpg").read_bytes()
        if size == "exact":
            assert data == original
        else:
            assert decode_image(data).shape == (64, 85, 3)


def test_a_killed_run_goes_on_where_it_was(mixed: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = mixed
    monkeypatch.setattr(module, "CHUNK", 4)
    chunks: list[module.Chunk] = []

    def some(function: Any, specs: list[module.Chunk], *_: object) -> None:
        for spec in specs[:3]:
            function(spec)
        chunks.extend(specs)
        raise KeyboardInterrupt

    everything = module._run
    monkeypatch.setattr(module, "_run", some)
    with pytest.raises(KeyboardInterrupt):
        clean(folder / "records.json", folder / "out.json", image_folder=folder / "images")
    assert not (folder / "out.json").exists()
    (folder / "images" / "0.jpg").unlink()  # judged already: its verdict is not asked for again
    monkeypatch.setattr(module, "_run", everything)
    counts = clean(
        folder / "records.json", folder / "out.json", image_folder=folder / "images", workers=2
    )
    assert counts["ok"] == 11
    assert len(chunks) == 6


def test_other_rules_do_not_meet_the_verdicts_of_these(mixed: tuple) -> None:
    folder, _, _ = mixed
    options: dict[str, Any] = {"image_folder": folder / "images", "workers": 1}
    first = clean(
        folder / "records.json", folder / "out.json", shards="0/1", **options
    )  # verdicts stay
    assert first["too_small"] == 1
    counts = clean(
        folder / "records.json", folder / "out.json", rules=Rules(min_side=10), **options
    )
    assert "too_small" not in counts


def test_slices_are_put_together_by_a_last_call(
    mixed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows, _ = mixed
    monkeypatch.setattr(module, "CHUNK", 4)
    options: dict[str, Any] = {"image_folder": folder / "images", "workers": 1}
    first = clean(folder / "records.json", folder / "out.json", shards="0/2", **options)
    second = clean(folder / "records.json", folder / "out.json", shards="1/2", **options)
    assert sum(first.values()) + sum(second.values()) == len(rows)
    monkeypatch.setattr(module, "validate_chunk", None)
    monkeypatch.setattr(module, "_run", lambda *_: None)
    assert clean(folder / "records.json", folder / "out.json", **options)["ok"] == 11


def test_what_the_towers_transform_cannot_take_is_set_aside(
    tmp_path: Path, models_folder: Path
) -> None:
    """A strip of a few kB, whose shorter side of a pixel would be blown up: the trainer says the same of it."""
    strip = np.zeros((1, 60_000, 3), np.uint8)
    Image.fromarray(strip).save(tmp_path / "strip.png")
    (tmp_path / "1.jpg").write_bytes(jpeg(photo(1)))
    (tmp_path / "records.json").write_text(json.dumps([row("strip.png", "x"), row("1.jpg", "y")]))
    rules, tower = Rules(min_side=1, max_aspect=1e6), str(models_folder / "clip")
    counts = clean(
        tmp_path / "records.json", tmp_path / "out.json", rules=rules, vision_tower=tower, workers=1
    )
    assert counts == {"too_large": 1, "ok": 1}
    with pytest.raises(ImageError, match="60000x1 pixels would be resized"):
        ImageTransform.from_pretrained(tower)(strip)
    assert clean(tmp_path / "records.json", tmp_path / "out.json", rules=rules, workers=1) == {
        "ok": 2
    }


def test_compacted_shards_of_other_records_are_never_taken_for_these(tmp_path: Path) -> None:
    """Else the captions of one run would be given the pictures of another."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(photo(ord(name))))
        (tmp_path / f"{name}.json").write_text(json.dumps([row(f"{name}.jpg", name)]))
    options: dict[str, Any] = {"compact": tmp_path / "shards", "workers": 1}
    clean(tmp_path / "a.json", tmp_path / "out.json", **options)
    clean(tmp_path / "a.json", tmp_path / "out.json", **options)  # the same again is no fault
    for records, size in (("b.json", 224), ("a.json", 64)):
        with pytest.raises(ValueError, match="made of other records"):
            clean(tmp_path / records, tmp_path / "out.json", compact_size=size, **options)


@pytest.mark.parametrize("dedupe", ["exact", "perceptual"])
def test_other_words_about_a_picture_and_other_pictures_beside_it_are_no_duplicates(
    tmp_path: Path, dedupe: str
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(photo(i)))
    (tmp_path / "copy.jpg").write_bytes(jpeg(photo(0)))
    rows = [row("0.jpg", "a"), row("0.jpg", "b"), row("0.jpg", "a"), row("copy.jpg", "c")]
    rows += [{**row("", "d"), "image": names} for names in (["0.jpg", "2.jpg"], ["1.jpg", "2.jpg"])]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    rules = Rules(perceptual=dedupe == "perceptual")
    clean(tmp_path / "records.json", tmp_path / "out.json", dedupe=dedupe, rules=rules, workers=1)
    assert json.loads((tmp_path / "out.json").read_text()) == [rows[0], rows[1], rows[4], rows[5]]


def test_more_pixels_than_training_opens_are_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text(json.dumps([row("1.jpg", "x")]))
    with pytest.raises(ValueError, match="training opens no picture of more than"):
        clean(tmp_path / "records.json", tmp_path / "out.json", rules=Rules(max_pixels=100_000_000))
