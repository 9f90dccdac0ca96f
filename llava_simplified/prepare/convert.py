"""`llava convert`: any caption source -> a file of records. `llava reduce`: a random sample of one."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llava_simplified.data.rows import open_rows
from llava_simplified.data.shards import IMAGE_SUFFIXES
from llava_simplified.prepare.sources import Columns, ParseIssues, SourceRow, read_source

INSTRUCTION = "Generate a caption of this image:"
_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")


def group_captions(
    read: Callable[[ParseIssues], Iterator[SourceRow]], odd: ParseIssues
) -> Iterator[SourceRow]:
    """One row an image with all its captions, streaming; `read` is called twice.

    The first pass counts how often each image occurs, 8 bytes a row; the second gives a row out when its
    image's last caption has come. So memory holds only images whose captions are apart in the source.
    """
    hashes = np.fromiter((hash(row.url or row.image) for row in read(ParseIssues())), np.int64)
    values, counts = np.unique(hashes, return_counts=True)
    several = dict(zip(values[counts > 1].tolist(), counts[counts > 1].tolist()))
    del hashes, values, counts
    waiting: dict[str, list[SourceRow]] = {}
    for row in read(odd):
        key = row.url or row.image
        if row.record is not None or not key or (expected := several.get(hash(key))) is None:
            yield row
            continue
        rows = waiting.setdefault(key, [])
        rows.append(row)
        if len(rows) == expected:
            yield _merged(waiting.pop(key))
    for rows in waiting.values():  # two images with one hash: neither was seen to be complete
        yield _merged(rows)


def _merged(rows: list[SourceRow]) -> SourceRow:
    return rows[0]._replace(captions=tuple(dict.fromkeys(c for row in rows for c in row.captions)))


def file_name(index: int, url: str) -> str:
    """The picture of row `index` in a folder: `0_1595581236.jpg`, that is index and CRC-32 of the URL."""
    return f"{index}_{zlib.crc32(url.encode())}.jpg"


def make_record(image: str, instruction: str, captions: Sequence[str]) -> dict[str, Any]:
    """The JSON of a record: `response` for one caption, `responses` for several."""
    said = {"response": captions[0]} if len(captions) == 1 else {"responses": list(captions)}
    return {"image": image, "instruction": instruction, **said}


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def to_records(
    rows: Iterable[SourceRow], odd: ParseIssues, instructions: list[str], image_folder: Path | None
) -> Iterator[tuple[dict[str, Any], SourceRow]]:
    """Rows -> JSON records, each with the row it came from; what can't become one is noted in `odd`."""
    for index, row in enumerate(rows):
        image = row.image or (file_name(index, row.url) if row.url else "")
        if row.record is None and not image:
            odd.note("row without an image (left out)", row.number, row.captions)
            continue
        if _ABSOLUTE.match(image):
            if image_folder is not None and Path(image).is_relative_to(image_folder.absolute()):
                image = str(Path(image).relative_to(image_folder.absolute()))
            else:  # of the machine that wrote it
                odd.note("absolute path, not in --image-folder (base name kept)", row.number, image)
                image = re.split(r"[/\\]", image)[-1]
        if image_folder is not None and image and "#" not in image:
            stem = image.rpartition(".")[0]  # what a URL held, only its first bytes can tell
            names = [image] if row.image else [f"{stem}.{suffix}" for suffix in IMAGE_SUFFIXES]
            found = next((name for name in names if (image_folder / name).is_file()), None)
            if found is None:
                odd.note(f"image not in {image_folder} (left out)", row.number, image)
                continue
            image = found
        if row.record is not None:
            yield ({**row.record, "image": image} if image else row.record), row
        elif not row.captions:
            odd.note("image without any caption (left out)", row.number, image)
        else:
            template = instructions[int(fraction(image + "?") * len(instructions))]
            yield make_record(image, template, row.captions), row


class RecordWriter:
    """Writes records to `.json` (an array, one row a line), `.jsonl` or `.parquet`; whole or not at all."""

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".json", ".jsonl", ".parquet"):
            raise ValueError(f"{path}: records are written to .json, .jsonl or .parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.count = path, 0
        self._partial = path.with_name(path.name + ".part")
        self._rows: list[dict[str, Any]] = []
        self._parquet: Any = None
        self._encode = json.JSONEncoder(ensure_ascii=False).encode
        self._file = (
            None if path.suffix == ".parquet" else self._partial.open("w", encoding="utf-8")
        )

    def write(self, record: dict[str, Any]) -> None:
        """Add one record."""
        if self._file is None:
            self._rows.append(record)
            if len(self._rows) == 8192:
                self._flush()
        elif self.path.suffix == ".jsonl":
            self._file.write(f"{self._encode(record)}\n")
        else:
            self._file.write(f"{',' if self.count else '['}\n{self._encode(record)}")
        self.count += 1

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for row in self._rows:
            if not isinstance(row.get("image"), str) or not row.get("instruction"):
                raise ValueError(
                    f"{self.path}: Parquet holds image, instruction and responses, but a row has {sorted(row)}: "
                    "write conversations to .json or .jsonl"
                )
        rows = [
            {**row, "responses": row.get("responses") or [row.get("response")]}
            for row in self._rows
        ]
        columns = {
            "image": pa.string(),
            "instruction": pa.string(),
            "responses": pa.list_(pa.string()),
        }
        table = pa.Table.from_pylist(rows, pa.schema(columns))
        self._parquet = self._parquet or pq.ParquetWriter(
            self._partial, table.schema, compression="zstd"
        )
        self._parquet.write_table(table)
        self._rows.clear()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is None:
            if kind is None:
                self._flush()
                self._parquet.close()
        else:
            if self.path.suffix == ".json":
                self._file.write("\n]\n" if self.count else "[]\n")
            self._file.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)


def _parse_split(text: str) -> dict[str, float]:
    try:
        parts = {
            name.strip(): float(share)
            for name, _, share in (p.partition("=") for p in text.split(","))
        }
    except ValueError:
        parts = {}
    if not parts or not all(0 < share < 1 for share in parts.values()) or sum(parts.values()) >= 1:
        raise ValueError(
            f"--split {text!r}: give names and shares below 1, as in val=0.01 or val=0.01,test=0.01"
        )
    return parts


def convert(
    source: str,
    output: Path,
    *,
    image_folder: Path | None = None,
    instruction: str = INSTRUCTION,
    split: str = "",
    columns: Columns = Columns(),  # noqa: B008 - immutable
) -> tuple[dict[str, int], ParseIssues]:
    """Write the records of `source` to `output`; returns each file's count, and what was odd.

    Args:
        image_folder: where the pictures are; rows whose picture isn't there are left out (and counted).
        instruction: what the user says, or a .txt of templates, one a line, drawn by a hash of the image.
        split: `val=0.01` sends that share, by a hash of the image, to `<output>_val`, the rest to
            `<output>_train`; `source` follows the source's own split (Karpathy's).
    """
    if image_folder is not None and not image_folder.is_dir():
        raise ValueError(f"--image-folder {image_folder}: no such folder")
    instructions = [instruction]
    if instruction.endswith(".txt"):
        instructions = [
            line.strip()
            for line in Path(instruction).read_text("utf-8").splitlines()
            if line.strip()
        ]
        if not instructions:
            raise ValueError(f"--instruction {instruction}: no template in this file")
    shares = _parse_split(split) if split not in ("", "source") else {}
    odd = ParseIssues()
    rows = group_captions(lambda notes: read_source(source, notes, columns), odd)
    writers: dict[str, RecordWriter] = {}
    with ExitStack() as stack:

        def begin(part: str) -> None:
            path = output.with_stem(f"{output.stem}_{part}") if part else output
            writers[part] = stack.enter_context(RecordWriter(path))

        for part in (
            ("train", *shares) if shares else ()
        ):  # a share that gets nothing leaves no older file in its place
            begin(part)
        for record, row in to_records(rows, odd, instructions, image_folder):
            part = ""
            if split == "source":
                part = {"restval": "train", "": "train"}.get(row.split, row.split)
                if not row.split:
                    odd.note(
                        "row without a split of its own (taken for training)", row.number, row.image
                    )
            elif shares:
                part, place = "train", fraction(str(record.get("image") or row.number))
                for name, share in shares.items():
                    if 0 <= place < share:
                        part = name
                    place -= share
            if part not in writers:
                begin(part)
            writers[part].write(record)
        if not any(writer.count for writer in writers.values()):
            raise ValueError(f"{source}: no record came of it\n" + "\n".join(odd.lines()))
    return {str(writer.path): writer.count for writer in writers.values()}, odd


def reduce(source: Path, output: Path, count: int, seed: int) -> int:
    """A random sample of `count` records, in their order; returns how many."""
    rows = open_rows(source)
    if count < 1:
        raise ValueError(f"--count {count}: at least 1")
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    with RecordWriter(output) as writer:
        for index in chosen:
            writer.write(rows[index])
    return len(chosen)


def main(argv: list[str] | None = None) -> int:
    """`llava convert SOURCE --output records.json`."""
    parser = argparse.ArgumentParser(
        "llava convert", description="Make records of any caption source."
    )
    parser.add_argument(
        "source", help="TSV, CSV, JSON, JSONL, Parquet, tar, a folder of them, a glob, a URL"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="records: .json, .jsonl or .parquet"
    )
    parser.add_argument(
        "--image-folder", type=Path, help="keep only rows whose picture is in this folder"
    )
    parser.add_argument(
        "--instruction", default=INSTRUCTION, help="a text, or a .txt of templates, one a line"
    )
    parser.add_argument(
        "--split", default="", help="val=0.01 (by hash of the image) or source (its own split)"
    )
    for column in Columns._fields:
        parser.add_argument(
            f"--{column}-column", default="", help=f"name of the column with the {column}"
        )
    args = parser.parse_args(argv)
    counts, odd = convert(
        args.source,
        args.output,
        image_folder=args.image_folder,
        instruction=args.instruction,
        split=args.split,
        columns=Columns(args.url_column, args.image_column, args.caption_column),
    )
    for path, count in counts.items():
        sys.stdout.write(f"{count:>9,} records -> {path}\n")
    sys.stdout.write("".join(f"{line}\n" for line in odd.lines()))
    return 0


def reduce_main(argv: list[str] | None = None) -> int:
    """`llava reduce records.json --count 1000 --seed 0`."""
    parser = argparse.ArgumentParser(
        "llava reduce", description="A random sample of a file of records."
    )
    parser.add_argument("records", type=Path, help=".json, .jsonl or .parquet")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: the same name with _COUNT added")
    args = parser.parse_args(argv)
    output = args.output or args.records.with_name(
        f"{args.records.stem}_{args.count}{args.records.suffix}"
    )
    sys.stdout.write(
        f"{reduce(args.records, output, args.count, args.seed):>9,} records -> {output}\n"
    )
    return 0
