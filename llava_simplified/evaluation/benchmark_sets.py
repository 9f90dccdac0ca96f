"""Find the images and references of captioning benchmarks, in the folder structures that their copies usually have.

    coco         dataset_coco.json (Karpathy's splits), val2014/, train2014/; or annotations/captions_val2017.json, val2017/
    flickr30k    dataset_flickr30k.json, flickr30k-images/
    nocaps       nocaps_val_4500_captions.json, images/
    textcaps     TextCaps_0.1_val.json, train_images/

The files may be in the folder itself or in one of its subfolders, and are recognized by their names. Images are found by
the names in these files. COCO's images are found by two names, because the releases of 2014 and 2017 name the same
image differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

# Name of each domain of nocaps in its files -> name in papers. The order is that of the tables in papers.
_DOMAINS = {
    "in-domain": "in-domain",
    "near-domain": "near-domain",
    "out-domain": "out-of-domain",
    "out-of-domain": "out-of-domain",
}
_COCO_2017_FOLDERS = ("val2017", "train2017")


@dataclass(frozen=True)
class BenchmarkImage:
    """An image of a benchmark.

    Attributes:
        image: Its path, relative to the folder of the benchmark.
        references: Reference captions.
        domain: Domain of nocaps that the image belongs to; empty in the other benchmarks.
    """

    image: str
    references: tuple[str, ...]
    domain: str = ""


@dataclass(frozen=True)
class BenchmarkSet:
    """The images of one split.

    Attributes:
        name: "coco", "flickr30k", "nocaps" or "textcaps".
        split: Name of the split.
        folder: Folder of the images.
        images: The images, in the order of the file.
        source: The file with the references.
        instances: COCO instance annotations of the images; empty if there are none.
        notes: Sentences for the reader of the scores, for example about missing images.
    """

    name: str
    split: str
    folder: Path
    images: list[BenchmarkImage]
    source: Path
    instances: tuple[Path, ...] = ()
    notes: list[str] = field(default_factory=list)


class _Entry(NamedTuple):
    """An image as a benchmark's file describes it. `names` are its possible file names, the most likely one first."""

    names: tuple[str, ...]
    references: tuple[str, ...]
    domain: str = ""


class _Source(NamedTuple):
    """Where the data of a split is.

    Attributes:
        file: Name of the file with the references.
        read: Reader of this file: (its JSON content, the split) -> its images.
        image_folders: Folders that may contain the images.
        instances: Name of the file of COCO instance annotations; empty if there is none.
    """

    file: str
    read: Callable[[Any, str], Iterator[_Entry]]
    image_folders: tuple[str, ...]
    instances: str = ""


# ---- readers ----


def _read_karpathy(content: Any, split: str) -> Iterator[_Entry]:
    """Read dataset_coco.json or dataset_flickr30k.json: `{"images": [{"filename", "split", "sentences"}]}`."""
    for image in content["images"]:
        if image["split"] != split:
            continue
        names = [image["filename"]]
        if image.get("filepath"):  # only dataset_coco.json has it
            names.insert(0, f"{image['filepath']}/{image['filename']}")
        if "cocoid" in image:
            names += _coco_2017_names(image["cocoid"])
        texts = []
        for sentence in image["sentences"]:
            texts.append(sentence["raw"])
        yield _Entry(tuple(names), tuple(texts))


def _coco_2017_names(image_id: int) -> Iterator[str]:
    """Yield the possible names of an image of COCO in the release of 2017.

    This release has the same images as the one of 2014, but moved some of them from val to train.
    """
    name = f"{image_id:012}.jpg"
    for folder in _COCO_2017_FOLDERS:
        yield f"{folder}/{name}"
    yield name


def _read_coco(content: Any, split: str) -> Iterator[_Entry]:
    """Read a COCO caption file: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`."""
    # An annotation whose image is not listed raises KeyError below. If it were skipped, its caption would be lost.
    captions: dict[object, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in content["images"]:
        domain = str(image.get("domain", ""))
        if domain:  # only nocaps has domains
            domain = _DOMAINS[domain]
        # The folder of an official split of COCO has the name of the split.
        name = PurePosixPath(image["file_name"]).name
        names = dict.fromkeys([image["file_name"], f"{split}/{name}", name])
        yield _Entry(tuple(names), tuple(captions[image["id"]]), domain)


def _read_textcaps(content: Any, split: str) -> Iterator[_Entry]:
    """Read TextCaps_0.1_val.json: `{"data": [{"image_id", "reference_strs"}]}`, with a row for each caption."""
    references: dict[str, list[str]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for row in content["data"]:
        image_id = row["image_id"]
        known = references.setdefault(image_id, [])
        # In the published file, every row repeats all captions of its image (`reference_strs`). Some copies of it have
        # only the caption of the row (`caption_str`).
        for text in row.get("reference_strs") or [row["caption_str"]]:
            if text not in known:
                known.append(text)
        name = f"{image_id}.jpg"
        names[image_id] = (name, row.get("image_path") or name)
    for image_id, texts in references.items():
        yield _Entry(names[image_id], tuple(texts))


# ---- benchmarks ----

# Folders that may contain the images. Their names differ between the sites that distribute copies of the data sets.
_COMMON_FOLDERS = ("", "images")
_COCO_FOLDERS = (*_COMMON_FOLDERS, "train2014", "val2014")
_FLICKR_FOLDERS = (
    "flickr30k-images",
    "flickr30k_images",
    "flickr30k_images/flickr30k_images",
    "Images",
    *_COMMON_FOLDERS,
)
_NOCAPS_FOLDERS = (*_COMMON_FOLDERS, "val", "validation", "images/val")
_TEXTCAPS_FOLDERS = ("train_images", "train_val_images/train_images", *_COMMON_FOLDERS)


def _coco_source(split: str) -> _Source:
    """Return the source of an official split of COCO."""
    return _Source(f"captions_{split}.json", _read_coco, _COCO_FOLDERS, f"instances_{split}.json")


_KARPATHY_COCO = _Source(
    "dataset_coco.json", _read_karpathy, _COCO_FOLDERS, instances="instances_val2014.json"
)
_KARPATHY_FLICKR = _Source("dataset_flickr30k.json", _read_karpathy, _FLICKR_FOLDERS)

# The first split is the one that papers report.
BENCHMARKS: dict[str, dict[str, _Source]] = {
    "coco": {
        "test": _KARPATHY_COCO,
        "val": _KARPATHY_COCO,
        "val2014": _coco_source("val2014"),
        "val2017": _coco_source("val2017"),
    },
    "nocaps": {"val": _Source("nocaps_val_4500_captions.json", _read_coco, _NOCAPS_FOLDERS)},
    "flickr30k": {"test": _KARPATHY_FLICKR, "val": _KARPATHY_FLICKR},
    "textcaps": {
        "val": _Source("TextCaps_0.1_val.json", _read_textcaps, _TEXTCAPS_FOLDERS),
        "train": _Source("TextCaps_0.1_train.json", _read_textcaps, _TEXTCAPS_FOLDERS),
    },
}


def read_benchmark(name: str, folder: Path, split: str | None = None) -> BenchmarkSet:
    """Find and read a split of a benchmark.

    Args:
        name: A key of `BENCHMARKS`.
        folder: Folder with its files and images.
        split: Name of the split; by default the one that papers report.

    Raises:
        ValueError: The split does not exist, a file is missing or has another form, or no image is in the folder.
    """
    # The first split is the default.
    splits = BENCHMARKS[name]
    split = split or next(iter(splits))
    if split not in splits:
        raise ValueError(
            f"--split {split}: {name} has no references for this split. Pass one of {', '.join(splits)}."
        )
    source = splits[split]
    path = _find_file(folder, source.file)
    if path is None:
        # The folder often has the files of another split. Suggest that split, but do not silently use it.
        hint = ""
        for other, other_source in splits.items():
            if not hint and _find_file(folder, other_source.file):
                hint = f" The folder has the files of --split {other}."
        raise ValueError(
            f"{folder}: {source.file}, which has the references of {name} ({split}), is neither in the "
            f"folder nor in one of its subfolders.{hint}"
        )
    entries = _read_entries(path, source, split)
    images, num_missing = _locate_images(entries, folder, source.image_folders)
    notes = []
    if num_missing:
        # Missing images stay in the list: captioning counts them as failed, and writes their names to a file.
        notes.append(f"{num_missing} of {len(images)} images of the benchmark are not in {folder}")
    if name == "nocaps" and not any(entry.domain for entry in entries):
        notes.append(f"{path.name} contains no domains, so there are no scores by domain")
    instances: tuple[Path, ...] = ()
    if source.instances:
        found = _find_file(folder, source.instances)
        instances = (found,) if found else ()
    return BenchmarkSet(
        name=name,
        split=split,
        folder=folder,
        images=images,
        source=path,
        instances=instances,
        notes=notes,
    )


def _find_file(folder: Path, name: str) -> Path | None:
    """Return the file with this name in a folder, or else in one of its subfolders; None if there is none.

    Raises:
        ValueError: Several subfolders contain such a file.
    """
    if (folder / name).is_file():
        return folder / name
    found = sorted(path for path in folder.glob(f"*/{name}") if path.is_file())
    if len(found) > 1:
        raise ValueError(
            f"{folder}: found both {found[0]} and {found[1]}; move the right one into the folder itself."
        )
    return found[0] if found else None


def _read_entries(path: Path, source: _Source, split: str) -> list[_Entry]:
    """Read and check the images of a split; raise ValueError if the file has another form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        entries = list(source.read(content, split))
        for entry in entries:
            _check_entry(entry)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not have the form of the published file ({type(error).__name__}: {error}). Download the "
            "file again."
        ) from None
    if not entries:
        raise ValueError(f"{path} has no images of the split {split!r}. Download the file again.")
    return entries


def _check_entry(entry: _Entry) -> None:
    """Raise an error unless all names and references are strings, and at least one reference is not blank."""
    for text in (*entry.names, *entry.references):
        if not isinstance(text, str):
            raise TypeError(f"expected a string, got {text!r}")
    if not any(text.strip() for text in entry.references):
        raise ValueError(f"the image {entry.names[0]!r} has no reference caption")


def _locate_images(
    entries: Sequence[_Entry], folder: Path, image_folders: Sequence[str]
) -> tuple[list[BenchmarkImage], int]:
    """Return the images with their paths, and the number of images that are missing from the folder.

    Raises:
        ValueError: All images are missing.
    """
    images = []
    num_missing = 0
    for entry in entries:
        path = _locate_image(entry.names, folder, image_folders)
        if path is None:
            num_missing += 1
            path = entry.names[0]
        # Published files contain some empty captions. Drop them; `_check_entry` has made sure that a caption remains.
        references = tuple(text for text in entry.references if text.strip())
        images.append(BenchmarkImage(path, references, entry.domain))
    if num_missing == len(entries):
        expected = ", ".join(name or "the folder itself" for name in image_folders)
        raise ValueError(
            f"{folder}: none of the {num_missing} images was found, for example {entries[0].names[0]!r}. "
            f"The images must be in one of these folders: {expected}."
        )
    return images, num_missing


def _locate_image(names: Sequence[str], folder: Path, image_folders: Sequence[str]) -> str | None:
    """Return the path of the first of these names that exists, relative to the folder; None if none exists."""
    for name in names:
        # The file is untrusted: a name such as "../../secret.png" must not lead out of the folder.
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(
                f"{folder}: the benchmark's file has the image name {name!r}, which leads out of the folder; image "
                "names must be relative paths without '..'."
            )
        for image_folder in image_folders:
            path = PurePosixPath(image_folder) / name
            if (folder / path).is_file():
                return str(path)
    return None


def images_by_domain(images: Sequence[BenchmarkImage]) -> Mapping[str, set[str]]:
    """Return the names of the images of each domain, in the order of `_DOMAINS`; empty if there are no domains."""
    found: dict[str, set[str]] = {}
    for image in images:
        found.setdefault(image.domain, set()).add(image.image)
    # In a benchmark without domains, the only key of `found` is "". The loop leaves it out.
    by_domain: dict[str, set[str]] = {}
    for domain in _DOMAINS.values():
        if domain in found:
            by_domain[domain] = found[domain]
    return by_domain
