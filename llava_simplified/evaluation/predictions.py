"""Read prediction files and reference captions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_simplified.data.records import open_records
from llava_simplified.data.rows import open_rows
from llava_simplified.evaluation.metrics import Sample, normalize_caption


def read_predictions(
    path: Path, references: Mapping[str, Sequence[str]] | None = None
) -> list[Sample]:
    """Read a prediction file, and group the rows (one per trial) by image.

    Args:
        path: A `.json`, `.jsonl` or `.parquet` file of rows with `index`, `image`, `instruction`, `gt_caption` and
            `pred_output`. Rows with the same `index` and `image` are trials of one image.
        references: Captions by file name, stem or image id (see `read_references`). They replace `gt_caption` (a
            string or a list of strings) in the rows.

    Raises:
        ValueError: A row is not a valid prediction. The message names file, row and problem.
    """
    rows = open_rows(path)
    samples: dict[tuple[str, str], Sample] = {}
    for number in range(len(rows)):
        row: object = rows[number]
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: a prediction must be a JSON object, got {type(row).__name__}."
            )
        image = _read_text(row, "image", where)
        caption = _read_text(row, "pred_output", where)
        row_references: Sequence[str]
        if references is None:
            row_references = _own_references(row, where)
        else:
            row_references = _find_references(image, references, where)

        index = str(row.get("index", image))
        # If there is no index, the key is the image.
        key = (index, image)
        previous = samples.get(key)
        captions: tuple[str, ...] = (caption,)
        if previous is not None:
            # Require the same references, because the trials of an image are scored together.
            if previous.references != tuple(row_references):
                raise ValueError(
                    f"{where}: its references differ from those in an earlier row of index "
                    f"{index}, image {image!r}."
                )
            captions = (*previous.captions, caption)
        samples[key] = Sample(
            index=index,
            image=image,
            instruction=str(row.get("instruction", "")),
            references=tuple(row_references),
            captions=captions,
        )
    return list(samples.values())


def _read_text(row: Mapping[str, object], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {key!r} must be a string, got {value!r}. The row has the keys {sorted(row)}."
        )
    return value


def _own_references(row: Mapping[str, object], where: str) -> list[str]:
    """Return the references in the row's `gt_caption`."""
    value = row.get("gt_caption")
    texts = value if isinstance(value, list) else [value]
    # Reject empty references, which would match empty captions.
    captions = [text for text in texts if isinstance(text, str) and text.strip()]
    if not captions or len(captions) < len(texts):
        raise ValueError(
            f"{where}: 'gt_caption' must be a caption or a list of captions, got {value!r}. "
            "To use a file of reference captions instead, pass --references."
        )
    return captions


def _find_references(
    image: str, references: Mapping[str, Sequence[str]], where: str
) -> Sequence[str]:
    """Return the references of an image by its file name, its stem, or the image id in its name."""
    name = Path(image).name
    stem = Path(image).stem
    candidates = [name, stem]
    # Extract the image id from COCO's file names: COCO_val2014_000000000042.jpg, 000000000042.jpg. Do not use numbers in
    # other names; in `shard.tar#key`, for example, it is the number of the shard.
    coco_name = re.fullmatch(r"(?:COCO_\w+_)?0*(\d+)", stem)
    if coco_name and "#" not in name:
        candidates.append(coco_name[1])
    for candidate in candidates:
        if candidate in references:
            return references[candidate]
    raise ValueError(
        f"{where}: --references contains no caption for {name!r}, neither by file name nor by image id."
    )


def read_references(path: Path) -> dict[str, list[str]]:
    """Read a COCO caption file, `{"images": [...], "annotations": [...]}`.

    Returns:
        Captions by file name and by image id (as text).

    Raises:
        ValueError: The file does not have this format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        captions: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            image_id = str(annotation["image_id"])
            captions.setdefault(image_id, []).append(annotation["caption"])
        by_name: dict[str, list[str]] = {}
        for image in content.get("images", []):
            image_id = str(image["id"])
            name = Path(image["file_name"]).name
            if image_id in captions:  # ignore images without captions; they may not be needed
                by_name[name] = captions[image_id]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--references: {path} is not a COCO caption file ({type(error).__name__}: {error}). "
            'It needs {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.'
        ) from None
    # Merge both kinds of keys, which cannot collide: file names have a suffix, image ids are numbers.
    return captions | by_name


def read_train_captions(path: Path) -> set[str]:
    """Return all responses of a training file, normalized by `normalize_caption`.

    Args:
        path: Records in any format that `llava train` supports.
    """
    captions: set[str] = set()
    for record in open_records(path):
        captions.update(normalize_caption(response) for response in record.responses)
    return captions
