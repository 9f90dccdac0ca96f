"""Read prediction files and reference captions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_simplified.data.records import open_records
from llava_simplified.data.rows import open_rows
from llava_simplified.evaluation.metrics import Sample, plain


def read_predictions(
    path: Path, references: Mapping[str, Sequence[str]] | None = None
) -> list[Sample]:
    """The rows of a prediction file, one a trial, gathered by picture (`index` and `image`).

    Args:
        references: base name, stem or number of a picture -> captions (see `read_references`), in place of
            the rows' own `gt_caption` (a text or a list of texts).

    Raises:
        ValueError: names the file, the row and what is wrong with it.
    """
    rows = open_rows(path)
    found: dict[tuple[str, str], Sample] = {}
    for number in range(len(rows)):
        row, where = rows[number], f"{path} row {number}"
        image, written = (_text(row, key, where) for key in ("image", "pred_output"))
        true = (
            _own_references(row, where)
            if references is None
            else _references_of(image, references, where)
        )
        key = (str(row.get("index", image)), image)
        old = found.get(key)
        if old and old.references != tuple(true):
            raise ValueError(
                f"{where}: other references than in an earlier row of index {key[0]}, {image!r}"
            )
        captions = (*old.captions, written) if old else (written,)
        found[key] = Sample(key[0], image, str(row.get("instruction", "")), tuple(true), captions)
    return list(found.values())


def _text(row: object, key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a prediction is a JSON object, this is {type(row).__name__}")
    if not isinstance(row.get(key), str):
        raise ValueError(
            f"{where}: {key!r} must be a text, got {row.get(key)!r}; its keys are {sorted(row)}"
        )
    return row[key]


def _own_references(row: dict[str, Any], where: str) -> list[str]:
    value = row.get("gt_caption")
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or not texts
        or not all(isinstance(t, str) and t.strip() for t in texts)
    ):
        raise ValueError(
            f"{where}: 'gt_caption' must be a caption or a list of captions, got {value!r}; see --references"
        )
    return texts


def _references_of(
    image: str, references: Mapping[str, Sequence[str]], where: str
) -> Sequence[str]:
    name, stem = Path(image).name, Path(image).stem
    # in other names it may count anything, and the number of a shard is no picture's
    number = None if "#" in name else re.fullmatch(r"(?:COCO_\w+_)?0*(\d+)", stem)
    for key in (name, stem, number[1] if number else ""):
        if key in references:
            return references[key]
    raise ValueError(
        f"{where}: the references hold no caption of {name!r}, neither by name nor by number"
    )


def read_references(path: Path) -> dict[str, list[str]]:
    """Captions by file name and by image id, of a COCO caption file `{"images", "annotations"}`.

    Raises:
        ValueError: the file is not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        by_id: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            by_id.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
        names = {
            Path(image["file_name"]).name: str(image["id"]) for image in content.get("images", [])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a COCO caption file ({type(error).__name__}: {error}); it needs "
            '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
        ) from None
    return by_id | {name: by_id[key] for name, key in names.items() if key in by_id}


def read_train_captions(path: Path) -> set[str]:
    """All answers of a training file, in any form the trainer reads."""
    return {plain(response) for record in open_records(path) for response in record.responses}
