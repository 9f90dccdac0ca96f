"""The demo's images and captions: emoji drawings and their English names.

The drawings and the names come from two packages. They are matched by the code points of the emoji. The packages
use different notations for these (see `normalize_code_points`).
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

NUM_HELD_OUT = 300  # images that the demo does not train on
PREVIEW_STRIDE = 6  # every sixth of these is evaluated while the model trains, which takes a few seconds each time
# The prompt is only the image. A question would take a fifth of the tokens of a sample, and a caption does not need it.
INSTRUCTION = ""
_DRAWING = re.compile(r"package/img/google/64/([0-9a-f-]+)\.png")


def build_images(drawings: Path, names: Path, target: Path) -> None:
    """Write `images/*.png` (64 x 64, with alpha), `train.json`, `val.json`, and `preview.json`, a part of `val.json`.

    Args:
        drawings: The npm package `emoji-datasource-google` (.tgz).
        names: The npm package `emojibase-data` (.tgz).
        target: An empty folder.

    Raises:
        ValueError: A drawing has no name.
    """
    captions_by_code = _read_captions(names)
    folder = target / "images"
    folder.mkdir()
    digests: dict[str, str] = {}  # file name -> sha256
    captions: dict[str, str] = {}  # file name -> caption
    with tarfile.open(drawings) as archive:
        for member in archive:
            # Select the files with one drawing each; the package also contains sheets of all drawings. Their names are
            # code points: "1f1f3-1f1f4.png" is the flag of Norway.
            match = _DRAWING.fullmatch(member.name)
            if match is None:
                continue
            source = archive.extractfile(member)
            if source is None:  # a folder or a link
                continue
            code = normalize_code_points(match[1])
            if code not in captions_by_code:
                raise ValueError(f"{drawings}: the package {names} has no name for {member.name}")
            data = source.read()
            name = f"{match[1]}.png"
            (folder / name).write_bytes(data)
            # Hash the drawing, because some emoji have the same one; see `choose_held_out`.
            digests[name] = hashlib.sha256(data).hexdigest()
            captions[name] = captions_by_code[code]

    held_out = choose_held_out(digests, NUM_HELD_OUT)
    _write_records(target / "train.json", digests.keys() - held_out, captions)
    _write_records(target / "val.json", held_out, captions)
    _write_records(target / "preview.json", set(sorted(held_out)[::PREVIEW_STRIDE]), captions)


def _write_records(path: Path, names: set[str], captions: Mapping[str, str]) -> None:
    """Write the records of `names`, sorted by name."""
    records = []
    for name in sorted(names):
        record = {"image": name, "instruction": INSTRUCTION, "response": captions[name]}
        records.append(record)
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _read_captions(names: Path) -> dict[str, str]:
    """Return code points -> English name of each emoji, including skin tone variants."""
    with tarfile.open(names) as archive:
        source = archive.extractfile("package/en/data.json")
        assert source is not None, f"{names}: package/en/data.json is not a file"
        entries = json.load(source)
    # [{"hexcode": "1F44B", "label": "waving hand", "skins": [{"hexcode": "1F44B-1F3FB", ...}]}, ...]
    captions = {}
    for entry in entries:
        for variant in (entry, *entry.get("skins", ())):
            captions[normalize_code_points(variant["hexcode"])] = variant["label"]
    return captions


def normalize_code_points(code: str) -> str:
    """Return the code points of an emoji in a uniform notation: "1F3F3-FE0F" -> "1f3f3".

    FE0F selects the colored presentation of a character. Only some packages write it, so it is removed.
    """
    parts = code.lower().split("-")
    return "-".join(part for part in parts if part != "fe0f")


def choose_held_out(digests: Mapping[str, str], count: int) -> set[str]:
    """Choose images for validation by the hashes of their bytes.

    The choice is deterministic, and does not depend on the order and names of the files. Files with the
    same bytes (the flags of Norway and Svalbard) are always in the same split.

    Args:
        digests: File name -> sha256 of the file.
        count: Number of files to choose. A group of equal files that would exceed it is skipped.

    Raises:
        ValueError: `count` images cannot be chosen, or none would be left for training.
    """
    groups: dict[str, list[str]] = {}
    for name, digest in digests.items():
        groups.setdefault(digest, []).append(name)
    # Sorting by hash gives a random order that is the same on every machine.
    chosen: set[str] = set()
    for digest in sorted(groups):
        group = groups[digest]
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    if len(chosen) < count or len(chosen) == len(digests):
        raise ValueError(
            f"cannot hold out {count} of {len(digests)} images and keep others for training"
        )
    return chosen
