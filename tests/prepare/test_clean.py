"""Cleaning: every decision is correct, every record is accounted for, and no work is done twice."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cli_process import ForkedProcess
from PIL import Image

from llava_simplified import jobs
from llava_simplified.data.image_folder import check_distinct
from llava_simplified.data.images import MAX_PIXELS, ImageError, decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.data.rows import open_rows
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.jobs import exclusive_lock
from llava_simplified.prepare import clean as module
from llava_simplified.prepare.clean import clean
from llava_simplified.prepare.clean_command import main
from llava_simplified.prepare.clean_rules import Rules
from llava_simplified.prepare.duplicates import find_duplicates, perceptual_hash


def make_photo(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """Return an image with smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write_bad_images(folder: Path) -> dict[str, str]:
    """Write images that must be set aside; return the reasons by file name, also for names without a file."""
    data = encode_jpeg(make_photo(1, 400, 300), quality=90)
    middle = len(data) // 2
    damaged = data[:middle] + b"\xff\xd9\x00\xff\xc4" * 3 + data[middle + 15 :]
    (folder / "cut.jpg").write_bytes(data[:middle])
    (folder / "mid.jpg").write_bytes(damaged)
    (folder / "page.jpg").write_text("<html>gone</html>")
    (folder / "empty.jpg").write_bytes(b"")
    make_photo(2, 20, 20).save(folder / "small.png")
    make_photo(3, 1200, 60).save(folder / "wide.png")
    frames = [make_photo(number, 64, 64) for number in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    png = io.BytesIO()
    make_photo(4).save(png, "PNG")
    (folder / "cut.png").write_bytes(png.getvalue()[: len(png.getvalue()) // 2])
    return {
        "cut.jpg": "truncated",
        "mid.jpg": "corrupt",
        "page.jpg": "html",
        "empty.jpg": "not_image",
        "small.png": "too_small",
        "wide.png": "aspect",
        "moving.gif": "animated",
        "cut.png": "truncated",
        "gone.jpg": "missing",
        "../secret.jpg": "unsafe",
        "a caption " * 40: "missing",
    }


def make_row(image: str, *captions: str) -> dict[str, Any]:
    """Return a record as JSON."""
    row: dict[str, Any] = {"image": image, "instruction": "Generate a caption of this image:"}
    if len(captions) == 1:
        return {**row, "response": captions[0]}
    return {**row, "responses": list(captions)}


class Mixed(NamedTuple):
    """11 good and 11 bad records, alternating.

    Attributes:
        folder: Contains records.json and images/.
        rows: The records.
        reasons: Why the bad images are bad, by file name.
    """

    folder: Path
    rows: list[dict[str, Any]]
    reasons: dict[str, str]

    @property
    def records(self) -> Path:
        return self.folder / "records.json"

    @property
    def output(self) -> Path:
        return self.folder / "out.json"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def clean(self, **options: Any) -> dict[str, int]:
        return clean(self.records, self.output, image_folder=self.images, **options)


@pytest.fixture
def mixed(tmp_path: Path) -> Mixed:
    (tmp_path / "images").mkdir()
    reasons = write_bad_images(tmp_path / "images")
    (tmp_path / "secret.jpg").write_bytes(encode_jpeg(make_photo(9)))
    rows = []
    for index, name in enumerate(reasons):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(encode_jpeg(make_photo(100 + index)))
        rows += [make_row(f"{index}.jpg", f"good {index}"), make_row(name, "bad")]
    (tmp_path / "records.json").write_text(json.dumps(rows, indent=1))
    return Mixed(tmp_path, rows, reasons)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_quarantine(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out_quarantine.jsonl").read_text().splitlines()]


# ---- decisions ----


@pytest.mark.medium
def test_clean_names_every_reason_and_keeps_the_order(mixed: Mixed) -> None:
    counts = mixed.clean(workers=2)
    assert read_json(mixed.output) == mixed.rows[::2]
    quarantine = read_quarantine(mixed.folder)
    assert [entry["record"] for entry in quarantine] == mixed.rows[1::2]
    assert {entry["record"]["image"]: entry["reason"] for entry in quarantine} == mixed.reasons
    assert all(entry["detail"] for entry in quarantine)
    assert sum(counts.values()) == len(mixed.rows)
    page = (mixed.folder / "out_report.html").read_text()
    assert page.count("data:image/webp;base64") == 3, "small, wide and moving can be shown"
    assert "Premature end" in page
    assert not list(mixed.folder.glob("*.work"))
    assert not list(mixed.folder.glob(".*")), "no lock and no temporary file"


@pytest.mark.medium
def test_clean_agrees_with_the_tutorial_except_for_corrupt_images_and_own_rules(
    mixed: Mixed,
) -> None:
    """The tutorial opens images with Pillow and runs the CLIP processor.

    Images that pass there but not here are damaged in mid-scan, or break a rule that the tutorial does not have.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    passes = set()
    for row in mixed.rows:
        try:
            image = Image.open(mixed.images / row["image"]).convert("RGB")
            processor(image, return_tensors="pt")
            passes.add(row["image"])
        except (OSError, SyntaxError):
            continue
    mixed.clean(workers=1)
    kept = {row["image"] for row in read_json(mixed.output)}
    assert kept < passes
    assert {mixed.reasons[name] for name in passes - kept} == {
        "corrupt",
        "too_small",
        "aspect",
        "animated",
        "unsafe",
    }
    assert passes - kept >= {"mid.jpg"}


@pytest.mark.medium
def test_clean_removes_only_the_bad_captions_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(make_photo(1)))
    rows = [
        make_row("1.jpg", "a cat"),
        make_row("1.jpg", " "),
        make_row("1.jpg", "x" * 99),
        make_row("1.jpg", "good", "", "fine", "y" * 99),
        {"image": "1.jpg", "text": "no record"},
        {"instruction": "Say hi", "response": "hi"},
    ]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    clean(tmp_path / "records.json", tmp_path / "out.json", rules=Rules(max_caption=50), workers=1)
    kept = [rows[0], make_row("1.jpg", "good", "fine"), rows[5]]
    assert read_json(tmp_path / "out.json") == kept
    reasons = [
        (entry["reason"], entry["record"].get("responses")) for entry in read_quarantine(tmp_path)
    ]
    assert reasons == [
        ("empty_caption", None),
        ("long_caption", None),
        ("empty_caption, long_caption", ["", "y" * 99]),
        ("not_a_record", None),
    ]


@pytest.mark.medium
@pytest.mark.parametrize(
    "captions",
    [
        {"gt_caption": ["good", "", "x" * 99, "fine"], "pred_output": "generated"},
        {"response": "", "responses": ["good", "", "x" * 99, "fine"]},
        {"response": "good", "responses": ["good", "", "x" * 99, "fine"]},
    ],
)
def test_clean_removes_only_the_bad_captions_of_every_form_of_record(
    tmp_path: Path, captions: dict[str, Any]
) -> None:
    """The kept record and the quarantined one have their captions under the key `responses` only."""
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(make_photo(1)))
    record = {"image": "1.jpg", "instruction": "Describe it.", "id": 7}
    (tmp_path / "records.json").write_text(json.dumps([{**record, **captions}]))
    clean(tmp_path / "records.json", tmp_path / "out.json", rules=Rules(max_caption=50), workers=1)
    assert read_json(tmp_path / "out.json") == [{**record, "responses": ["good", "fine"]}]
    (quarantined,) = read_quarantine(tmp_path)
    assert quarantined["record"] == {**record, "responses": ["", "x" * 99]}
    assert open_records(tmp_path / "out.json")[0].responses == ("good", "fine")


@pytest.mark.medium
def test_clean_sets_unusable_pairs_aside(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(make_photo(1)))
    rows = []
    for chosen, rejected in (("a cat", "a dog"), ("a cat", "a cat "), ("a cat", "x" * 99)):
        pair = {"image": "1.jpg", "instruction": "What?", "chosen": chosen, "rejected": rejected}
        rows.append(pair)
    (tmp_path / "records.json").write_text(json.dumps(rows))
    clean(tmp_path / "records.json", tmp_path / "out.json", rules=Rules(max_caption=50), workers=1)
    assert read_json(tmp_path / "out.json") == rows[:1]
    reasons = [entry["reason"] for entry in read_quarantine(tmp_path)]
    assert reasons == ["unusable_pair", "long_caption"]


@pytest.mark.medium
def test_clean_sets_aside_what_the_transform_of_the_tower_refuses(
    tmp_path: Path, models_folder: Path
) -> None:
    """The shorter side of the image is one pixel, so the transform would enlarge it enormously."""
    strip = np.zeros((1, 60_000, 3), np.uint8)
    Image.fromarray(strip).save(tmp_path / "strip.png")
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(make_photo(1)))
    rows = [make_row("strip.png", "x"), make_row("1.jpg", "y")]
    records, output = tmp_path / "records.json", tmp_path / "out.json"
    records.write_text(json.dumps(rows))
    rules = Rules(min_side=1, max_aspect=1e6)
    tower = str(models_folder / "clip")
    counts = clean(records, output, rules=rules, vision_tower=tower, workers=1)
    assert counts == {"too_large": 1, "ok": 1}
    with pytest.raises(ImageError, match="60000x1") as error:
        ImageTransform.from_pretrained(tower)(strip)
    assert error.value.kind == "too_large"
    assert clean(records, output, rules=rules, workers=1) == {"ok": 2}
    # With borders (`pad`), training can read it, because the complete square around it is never in memory.
    options = {"vision_tower": tower, "image_aspect_ratio": "pad"}
    assert clean(records, output, rules=rules, workers=1, **options) == {"ok": 2}


# ---- arguments ----


def test_clean_refuses_an_image_folder_that_does_not_exist(tmp_path: Path) -> None:
    """Otherwise every record would be set aside."""
    (tmp_path / "x.json").write_text(json.dumps([make_row("1.jpg", "a cat")]))
    with pytest.raises(ValueError, match="--image-folder .*nowhere"):
        clean(tmp_path / "x.json", tmp_path / "good.json", image_folder=tmp_path / "nowhere")
    assert not (tmp_path / "good.json").exists()


def test_clean_refuses_more_pixels_than_training(tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text(json.dumps([make_row("1.jpg", "x")]))
    rules = Rules(max_pixels=100_000_000)
    with pytest.raises(ValueError, match=f"--max-pixels 100000000.*{MAX_PIXELS}"):
        clean(tmp_path / "records.json", tmp_path / "out.json", rules=rules)
    assert Rules().max_pixels == MAX_PIXELS


@pytest.mark.parametrize(
    ("option", "rules"),
    [
        ("--min-side", Rules(min_side=-1)),
        ("--max-aspect", Rules(max_aspect=float("nan"))),
        ("--max-aspect", Rules(max_aspect=0.5)),
        ("--max-caption", Rules(max_caption=0)),
        ("--max-pixels", Rules(max_pixels=0)),
    ],
)
def test_clean_refuses_rules_that_are_out_of_range(
    tmp_path: Path, option: str, rules: Rules
) -> None:
    with pytest.raises(ValueError, match=f"{option} .*must be at least"):
        clean(tmp_path / "records.json", tmp_path / "out.json", rules=rules)


def test_clean_refuses_a_file_for_the_shards_before_it_starts(mixed: Mixed) -> None:
    output = mixed.folder / "out.json"
    for compact in (output, mixed.records):
        with pytest.raises(ValueError, match=f"--compact .*{compact.name}: expected a folder"):
            clean(mixed.records, output, image_folder=mixed.images, compact=compact)
    assert not list(mixed.folder.glob("*.work"))


def test_clean_command_refuses_a_size_that_is_no_number(tmp_path: Path) -> None:
    argv = [str(tmp_path / "x.json"), "--output", str(tmp_path / "o.json"), "--compact-size", "²"]
    with pytest.raises(ValueError, match="--compact-size ²: expected a number of pixels"):
        main(argv)


def test_clean_refuses_an_unknown_suffix_before_it_starts(mixed: Mixed) -> None:
    with pytest.raises(ValueError, match=r"out\.txt.*\.jsonl"):
        clean(mixed.records, mixed.folder / "out.txt", image_folder=mixed.images)
    assert not list(mixed.folder.glob("*.work"))


# ---- duplicates ----


@pytest.mark.medium
@pytest.mark.parametrize("dedupe", ["exact", "perceptual"])
def test_clean_sets_aside_duplicates_of_an_earlier_image(tmp_path: Path, dedupe: str) -> None:
    originals = [make_photo(number, 300, 200) for number in range(12)]
    mirrored = originals[6].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    files = {
        f"{number}.jpg": encode_jpeg(image, quality=92) for number, image in enumerate(originals)
    }
    files["same.jpg"] = files["3.jpg"]
    files["smaller.jpg"] = encode_jpeg(originals[5].resize((150, 100)), quality=70)
    files["mirrored.jpg"] = encode_jpeg(mirrored)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    lines = [json.dumps(make_row(name, "x")) for name in files]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    clean(
        tmp_path / "records.jsonl",
        tmp_path / "out.json",
        dedupe=dedupe,
        rules=Rules(perceptual=dedupe == "perceptual"),
    )
    found = {entry["record"]["image"]: entry["detail"] for entry in read_quarantine(tmp_path)}
    expected = {"same.jpg": "of records.jsonl row 3"}
    if dedupe == "perceptual":
        expected["smaller.jpg"] = "of records.jsonl row 5"
    assert found == expected


@pytest.mark.medium
@pytest.mark.parametrize("dedupe", ["exact", "perceptual"])
def test_clean_keeps_new_captions_and_new_combinations_of_an_image(
    tmp_path: Path, dedupe: str
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encode_jpeg(make_photo(number)))
    (tmp_path / "copy.jpg").write_bytes(encode_jpeg(make_photo(0)))
    rows = [
        make_row("0.jpg", "a"),
        make_row("0.jpg", "b"),
        make_row("0.jpg", "a"),
        make_row("copy.jpg", "c"),
        {**make_row("", "d"), "image": ["0.jpg", "2.jpg"]},
        {**make_row("", "d"), "image": ["1.jpg", "2.jpg"]},
    ]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    rules = Rules(perceptual=dedupe == "perceptual")
    clean(tmp_path / "records.json", tmp_path / "out.json", dedupe=dedupe, rules=rules, workers=1)
    assert read_json(tmp_path / "out.json") == [rows[0], rows[1], rows[4], rows[5]]


@pytest.mark.medium
@pytest.mark.parametrize("dedupe", ["exact", "perceptual"])
def test_clean_compares_a_caption_with_all_kept_captions_of_its_image(
    tmp_path: Path, dedupe: str
) -> None:
    for name in ("a.jpg", "copy.jpg"):
        (tmp_path / name).write_bytes(encode_jpeg(make_photo(1)))
    # More rows than `find_duplicates` compares with each other.
    kept = [make_row("a.jpg", f"caption {number}") for number in range(12)]
    repeated = [*reversed(kept), make_row("copy.jpg", "new"), make_row("a.jpg", "caption 5", " ")]
    (tmp_path / "records.json").write_text(json.dumps([*kept, *repeated]))
    rules = Rules(perceptual=dedupe == "perceptual")
    clean(tmp_path / "records.json", tmp_path / "out.json", dedupe=dedupe, rules=rules, workers=1)
    assert read_json(tmp_path / "out.json") == kept
    originals = [f"of records.json row {row}" for row in [*reversed(range(12)), 0, 5]]
    assert [entry["detail"] for entry in read_quarantine(tmp_path)] == originals


@pytest.mark.medium
def test_clean_ignores_the_ids_and_the_form_of_duplicates(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(make_photo(1)))
    chat = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    rows = [
        {"id": 0, "image": "a.jpg", "instruction": "What?", "response": "a cat"},
        {"id": 1, "images": ["a.jpg"], "instruction": "What?", "responses": ["a cat"]},
        {"id": 2, "image": "a.jpg", "conversations": chat},
    ]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    clean(tmp_path / "records.json", tmp_path / "out.json", dedupe="exact", workers=1)
    assert read_json(tmp_path / "out.json") == rows[:1]


@pytest.mark.medium
def test_clean_keeps_records_of_one_image_that_train_differently(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(make_photo(1)))
    question = {"question": "Which animal?", "options": ["cat", "dog"], "answer": "cat"}
    pair = {"image": "a.jpg", "instruction": "What?", "chosen": "a cat"}
    rows = [
        make_row("a.jpg", "a cat"),
        {**make_row("a.jpg", "a cat"), "instruction": "What?"},
        {**make_row("a.jpg", "a cat"), "multiple_choice": [question]},
        {**pair, "rejected": "a dog"},
        {**pair, "rejected": "a car"},
    ]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    clean(tmp_path / "records.json", tmp_path / "out.json", dedupe="exact", workers=1)
    assert read_json(tmp_path / "out.json") == rows


def test_find_duplicates_finds_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (300, 19), dtype=np.uint8)
    hashes = np.concatenate([base, base[:100]])
    for index in range(300, 400):
        for bit in rng.choice(128, index % 8, replace=False):  # up to seven bits
            hashes[index, bit // 8] ^= 1 << (bit % 8)
    found = find_duplicates(np.arange(400), hashes, perceptual=True)
    bits = np.unpackbits(hashes[:, :16], axis=1)
    expected = {}
    for index in range(300, 400):
        near = np.flatnonzero((bits[:index] != bits[index]).sum(1) <= 5)
        if len(near):
            expected[index] = int(near[0])
    assert found == expected


def test_perceptual_hash_survives_size_and_compression() -> None:
    image = make_photo(1, 640, 480)
    small = decode_image(encode_jpeg(image.resize((200, 150)), quality=60))
    bits = [
        np.unpackbits(np.frombuffer(perceptual_hash(pixels)[:16], np.uint8))
        for pixels in (np.asarray(image), small)
    ]
    assert (bits[0] != bits[1]).sum() <= 5


# ---- compacted images ----


@pytest.mark.medium
@pytest.mark.parametrize("size", ["64", "exact"])
def test_clean_command_compacts_images_for_training(
    mixed: Mixed, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = mixed.folder / "shards"
    argv = [str(mixed.records), "--output", str(mixed.output), "--workers", "1"]
    argv += ["--image-folder", str(mixed.images), "--compact", str(shards)]
    assert main([*argv, "--compact-size", size]) == 0
    assert "11 ok" in capsys.readouterr().out
    records = open_records(mixed.output)
    expected = [row["response"] for row in mixed.rows[::2]]
    assert [record.responses[0] for record in records] == expected
    for index, record in enumerate(records):
        data = read_image_bytes(record.images[0], shards)
        if size == "exact":
            assert data == (mixed.images / f"{index}.jpg").read_bytes()
        else:
            assert decode_image(data).shape == (64, 85, 3)


def chat_with_parts(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the question of a chat whose content is a list of image parts and a text."""
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


_ANSWER = {"role": "assistant", "content": "a cat"}
_NAMED_PART = {"type": "image", "image": "0.jpg"}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"messages": [*chat_with_parts(_NAMED_PART), _ANSWER]}, ["0.jpg"]),
        (
            {
                "prompt": chat_with_parts(_NAMED_PART),
                "chosen": [_ANSWER],
                "rejected": [{"role": "assistant", "content": "a dog"}],
            },
            ["0.jpg"],
        ),
        (
            {
                "images": ["0.jpg", "1.jpg"],
                "messages": [
                    *chat_with_parts({"type": "image", "index": 1}, {"type": "image", "index": 0}),
                    _ANSWER,
                ],
            },
            ["1.jpg", "0.jpg"],
        ),
        ({"image": None, "images": ["0.jpg"], "instruction": "", "response": "a"}, ["0.jpg"]),
        ({"image": "0.jpg", "images": ["0.jpg"], "instruction": "", "response": "a"}, ["0.jpg"]),
        ({"image": ["1.jpg", "0.jpg"], "instruction": "", "response": "a"}, ["1.jpg", "0.jpg"]),
        ({"instruction": "Say hi", "response": "hi"}, []),
    ],
)
def test_clean_renames_the_compacted_images_of_every_form_of_record(
    tmp_path: Path, row: dict[str, Any], images: list[str]
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(encode_jpeg(make_photo(number)))
    source, output, shards = tmp_path / "rows.json", tmp_path / "out.jsonl", tmp_path / "shards"
    source.write_text(json.dumps([{**row, "id": "x"}]))
    counts = clean(source, output, compact=shards, compact_size=0, workers=1)
    assert counts == {"ok": 1}
    (before,), (after,) = open_records(source), open_records(output)
    assert [read_image_bytes(name, shards) for name in after.images] == [
        (tmp_path / name).read_bytes() for name in images
    ]
    assert replace(after, images=before.images, id=before.id) == before
    assert open_rows(output)[0]["id"] == "x"


@pytest.mark.medium
def test_clean_refuses_compacted_shards_of_other_records_or_sizes(tmp_path: Path) -> None:
    """Otherwise captions of one run would be joined to images of another, or images of two sizes would be mixed."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(encode_jpeg(make_photo(ord(name))))
        (tmp_path / f"{name}.json").write_text(json.dumps([make_row(f"{name}.jpg", name)]))
    options: dict[str, Any] = {"compact": tmp_path / "shards", "workers": 1}
    clean(tmp_path / "a.json", tmp_path / "out.json", **options)
    clean(tmp_path / "a.json", tmp_path / "out.json", **options)  # repeating a run is not an error
    with pytest.raises(ValueError, match=r"--compact .*shards.*records_sha256"):
        clean(tmp_path / "b.json", tmp_path / "out.json", compact_size=224, **options)
    with pytest.raises(ValueError, match=r"--compact .*shards.*compact_size was 224.* 64"):
        clean(tmp_path / "a.json", tmp_path / "out.json", compact_size=64, **options)


@pytest.mark.medium
def test_clean_refuses_to_compact_into_a_folder_with_other_files(mixed: Mixed) -> None:
    shards = mixed.folder / "shards"
    shards.mkdir()
    (shards / "00000.tar").write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match=r"--compact .*shards"):
        mixed.clean(compact=shards, workers=1)
    assert [path.name for path in shards.iterdir()] == ["00000.tar"]


@pytest.mark.medium
def test_clean_writes_records_beside_their_compacted_shards(tmp_path: Path) -> None:
    """Such a folder has the form of a download, so it can be passed to training as it is."""
    make_photo(1).save(tmp_path / "a.png")
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps(make_row("a.png", "a cat")) + "\n")
    shards = tmp_path / "shards"
    output = shards / "records.jsonl"
    for _ in range(2):
        assert clean(source, output, compact=shards, workers=1) == {"ok": 1}
    (record,) = open_records(shards)
    assert read_image_bytes(record.images[0], shards)
    (shards / "compact.json").unlink()
    with pytest.raises(ValueError, match="contains files that were not made from these records"):
        clean(source, output, compact=shards, workers=1)


@pytest.mark.medium
def test_clean_continues_compacted_shards_of_version_0_1_0(tmp_path: Path) -> None:
    """Such shards have one digest of all settings in `made_of`, and no compact.json."""
    import hashlib

    (tmp_path / "a.jpg").write_bytes(encode_jpeg(make_photo(1)))
    (tmp_path / "a.json").write_text(json.dumps([make_row("a.jpg", "a")]))
    shards = tmp_path / "shards"
    clean(tmp_path / "a.json", tmp_path / "out.json", compact=shards, workers=1)
    (shards / "compact.json").unlink()
    survivors = json.dumps(make_row("a.jpg", "a")) + "\n"
    digest = hashlib.sha256(f"{tmp_path.resolve()} 224{survivors}".encode()).hexdigest()
    (shards / "made_of").write_text(digest)
    before = (shards / "00000.tar").stat().st_mtime_ns
    clean(tmp_path / "a.json", tmp_path / "out.json", compact=shards, workers=1)
    assert (shards / "00000.tar").stat().st_mtime_ns == before
    (shards / "compact.json").unlink()
    with pytest.raises(ValueError, match=r"--compact .*shards"):
        clean(tmp_path / "a.json", tmp_path / "out.json", compact=shards, compact_size=64)


# ---- stopped and continued; see also tests/test_kill.py ----


@pytest.mark.medium
def test_clean_continues_where_it_was_stopped(
    mixed: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 4)
    chunks: list[module.Chunk] = []

    def run_three_tasks(function: Any, tasks: list[module.Chunk], **_: Any) -> None:
        for task in tasks[:3]:
            function(task)
        chunks.extend(tasks)
        raise KeyboardInterrupt

    run_all = module.run_record_tasks
    monkeypatch.setattr(module, "run_record_tasks", run_three_tasks)
    with pytest.raises(KeyboardInterrupt):
        mixed.clean()
    assert not mixed.output.exists()
    # This image has been validated and is not opened again.
    (mixed.images / "0.jpg").unlink()
    monkeypatch.setattr(module, "run_record_tasks", run_all)
    counts = mixed.clean(workers=2)
    assert counts["ok"] == 11
    assert len(chunks) == 6


@pytest.mark.medium
def test_clean_does_not_use_the_results_of_other_rules(mixed: Mixed) -> None:
    first = mixed.clean(shards="0/1", workers=1)  # the results stay in the work folder
    assert first["too_small"] == 1
    counts = mixed.clean(rules=Rules(min_side=10), workers=1)
    assert "too_small" not in counts


@pytest.mark.medium
def test_clean_combines_the_results_of_slices_in_a_last_run(
    mixed: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_RECORDS", 4)
    first = mixed.clean(shards="0/2", workers=1)
    second = mixed.clean(shards="1/2", workers=1)
    assert sum(first.values()) + sum(second.values()) == len(mixed.rows)
    # All records have been validated.
    monkeypatch.setattr(module, "validate_chunk", None)
    monkeypatch.setattr(module, "run_record_tasks", lambda *_, **__: None)
    assert mixed.clean(workers=1)["ok"] == 11


@pytest.mark.medium
def test_clean_is_refused_while_another_run_writes(
    mixed: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCK_TIMEOUT", 0.2)
    with (
        exclusive_lock(mixed.folder / ".out.json.lock", "out.json"),
        pytest.raises(ValueError, match=r"out\.json.*another process"),
    ):
        mixed.clean(workers=1)
    assert not mixed.output.exists()
    assert mixed.clean(workers=1)["ok"] == 11


@pytest.mark.medium
def test_two_runs_of_clean_into_one_output_leave_one_complete_output(mixed: Mixed) -> None:
    command = ["llava", "clean", mixed.records]
    command += ["--output", mixed.output, "--image-folder", mixed.images, "--quiet"]
    runs = [ForkedProcess(command) for _ in range(2)]
    statuses = [process.wait(300) for process in runs]
    assert 0 in statuses, [process.stderr for process in runs]
    for process, status in zip(runs, statuses):
        if status:
            assert "another process is writing" in process.stderr
    assert read_json(mixed.output) == mixed.rows[::2]
    names = {path.name for path in mixed.folder.iterdir()}
    assert names == {
        "images",
        "secret.jpg",
        "records.json",
        "out.json",
        "out_quarantine.jsonl",
        "out_report.html",
        "out_report.json",
    }


# ---- one bad item is set aside ----


def clean_rows(folder: Path, rows: list[dict[str, Any]]) -> tuple[dict[str, int], list[Any]]:
    """Clean rows whose images are in `folder`; return the counts and the quarantine."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = clean(source, folder / "clean.jsonl", rules=Rules(min_side=8))
    quarantine = (folder / "clean_quarantine.jsonl").read_bytes().split(b"\n")
    return counts, [json.loads(line) for line in quarantine if line]


def break_time_scale(data: bytes) -> bytes:
    scale = data.index((1000).to_bytes(4, "big"), data.index(b"mdhd"))
    return data[:scale] + bytes(4) + data[scale + 4 :]


def break_second_frame(data: bytes) -> bytes:
    """Make the second directory of a TIFF, or the second frame of a GIF, unreadable."""
    if data.startswith(b"II"):
        first = int.from_bytes(data[4:8], "little")
        entries = int.from_bytes(data[first : first + 2], "little")
        link = first + 2 + 12 * entries
        return data[:link] + (0x7FFFFFF0).to_bytes(4, "little") + data[link + 4 :]
    second = data.index(b"!\xf9", data.index(b"!\xf9") + 2)
    return data[: second + 12] + b"\xff" * 5


@pytest.mark.medium
@pytest.mark.parametrize(
    ("image_format", "damage"),
    [("AVIF", break_time_scale), ("TIFF", break_second_frame), ("GIF", break_second_frame)],
)
def test_clean_handles_a_damaged_animation_without_an_error(
    tmp_path: Path, image_format: str, damage: Callable[[bytes], bytes]
) -> None:
    buffer = io.BytesIO()
    frames = [make_photo(number, 64, 64) for number in range(3)]
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "a").write_bytes(damage(buffer.getvalue()))
    frames[0].save(tmp_path / "b.png")
    counts, quarantine = clean_rows(tmp_path, [make_row("a", "x"), make_row("b.png", "y")])
    # Pillow finds only the first page of such a TIFF, which can be trained on.
    assert counts["ok"] == (2 if image_format == "TIFF" else 1)
    assert [row["record"]["image"] for row in quarantine] == ["a"] * (2 - counts["ok"])
    for row in quarantine:
        assert row["reason"] in ("corrupt", "truncated", "animated")


@pytest.mark.medium
def test_clean_sets_aside_invalid_unicode_and_other_rows_unchanged(tmp_path: Path) -> None:
    make_photo(1).save(tmp_path / "a.png")
    good = make_row("a.png", "line\u2028line\u2029line\x85 \U0001f600")
    bad = [make_row("a.png", "a \ud83d b"), make_row("caf\udce9.png", "x"), {"video": "a.mp4"}]
    counts, quarantine = clean_rows(tmp_path, [good, *bad])
    assert counts == {"ok": 1, "not_a_record": 3}
    assert [row["record"] for row in quarantine] == bad, "nothing is changed"
    assert all("row" in row["detail"] for row in quarantine)
    assert open_records(tmp_path / "clean.jsonl")[0].responses == (good["response"],)


@pytest.mark.medium
def test_clean_sets_aside_a_row_that_is_nested_too_deeply(tmp_path: Path) -> None:
    make_photo(1).save(tmp_path / "a.png")
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(make_row('a.png', 'a cat'))}\n{deep}\n")
    counts = clean(tmp_path / "x.jsonl", tmp_path / "clean.jsonl", workers=1)
    assert counts == {"ok": 1, "not_a_record": 1}
    quarantine = (tmp_path / "clean_quarantine.jsonl").read_text()
    assert json.loads(quarantine)["record"] == deep


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="other systems require names in Unicode")
def test_clean_of_a_source_whose_file_name_is_not_utf_8(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    source.write_text(json.dumps(make_row("gone.png", "a cat")) + "\n")
    assert clean(source, tmp_path / "clean.jsonl", workers=1) == {"missing": 1}
    report = json.loads((tmp_path / "clean_report.json").read_text())
    assert report["examples"]["missing"][0]["name"] == f"{source.name} row 0"


@pytest.mark.medium
def test_clean_counts_images_whose_names_do_not_match_exactly(tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG", "c.png"):
        make_photo(ord(name[0])).save(tmp_path / name)
    rows = [make_row(name, "x") for name in ("a.png", "/home/ann/c.png", "B.png")]
    rows.append(make_row("/home/bob/c.png", "another image"))
    counts, quarantine = clean_rows(tmp_path, rows)
    assert counts == {"ok": 3, "ambiguous": 1}
    assert quarantine[0]["record"]["image"] == "/home/bob/c.png"
    report = json.loads((tmp_path / "clean_report.json").read_text())
    expected = {"image name matched by suffix": 1, "image name matched by case": 1}
    assert report["matched"] == expected


@pytest.mark.medium
@pytest.mark.parametrize("chunk_records", [1, 2, 500])
def test_clean_sets_aside_a_second_name_of_a_file_in_any_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_records: int
) -> None:
    """The names are paths of another machine. Which records are kept does not depend on the chunks."""
    monkeypatch.setattr(module, "CHUNK_RECORDS", chunk_records)
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(make_photo(1)))
    (tmp_path / "2.jpg").write_bytes(encode_jpeg(make_photo(2)))
    (tmp_path / "3.jpg").write_bytes(encode_jpeg(make_photo(3)))
    rows = [
        make_row("/x/a/1.jpg", "first"),
        make_row("/x/a/2.jpg", ""),
        make_row("/x/b/1.jpg", "another image"),
        make_row("/x/a/1.jpg", "second"),
        make_row("3.jpg", "exact name"),
        make_row("/x/b/2.jpg", "not the image of row 1"),
        make_row("/x/b/3.jpg", "not the image of row 5"),
    ]
    rows.insert(0, make_row("/x/a/3.jpg", "not the image of row 5"))
    counts, quarantine = clean_rows(tmp_path, rows)
    assert counts == {"ok": 3, "ambiguous": 4, "empty_caption": 1}
    assert [entry["record"] for entry in quarantine] == [
        rows[0],
        rows[2],
        rows[3],
        rows[6],
        rows[7],
    ]
    assert "3.jpg' and '/x/a/3.jpg'" in quarantine[0]["detail"]
    assert "'/x/a/1.jpg' and '/x/b/1.jpg'" in quarantine[2]["detail"]
    report = json.loads((tmp_path / "clean_report.json").read_text())
    assert report["matched"] == {"image name matched by suffix": 2}
    records = open_records(tmp_path / "clean.jsonl")
    check_distinct(lambda: (name for record in records for name in record.images), tmp_path)


@pytest.mark.medium
def test_clean_keeps_a_copy_of_an_image_that_is_set_aside(tmp_path: Path) -> None:
    """A record is a duplicate of kept records only. Row 1 is set aside, since its first image is ambiguous."""
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(encode_jpeg(make_photo(number)))
    rows = [make_row("/x/a/1.jpg", "x")]
    for folder in ("b", "a"):
        rows.append({**make_row("", "y"), "image": [f"/x/{folder}/1.jpg", "2.jpg"]})
    source = tmp_path / "records.json"
    source.write_text(json.dumps(rows))
    counts = clean(source, tmp_path / "out.json", dedupe="exact", workers=1)
    assert counts == {"ok": 2, "ambiguous": 1}
    assert read_json(tmp_path / "out.json") == [rows[0], rows[2]]


def test_clean_command_refuses_a_negative_number_of_workers_before_it_reads_anything(
    tmp_path: Path,
) -> None:
    argv = [str(tmp_path / "missing.json"), "--output", str(tmp_path / "o.json"), "--workers", "-1"]
    with pytest.raises(ValueError, match="--workers -1: must be at least 1"):
        main(argv)


@pytest.mark.medium
def test_clean_command_without_a_usable_record_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps([make_row("gone.jpg", "a cat")]))
    argv = [str(tmp_path / "x.json"), "--output", str(tmp_path / "o.json"), "--workers", "1"]
    assert main(argv) == 1
    output = capsys.readouterr()
    assert "o_quarantine.jsonl" in output.err
    assert "1 missing" in output.out
    assert (tmp_path / "o_quarantine.jsonl").read_text().count("\n") == 1
