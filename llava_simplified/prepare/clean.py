"""`llava clean`: which records the trainer can really use, and why not the others.

Every picture gets the verdict of the one decoder and of the tower's own transform, as in training. What fails
is set aside with its reason, in a file beside the output; nothing is deleted. Work goes by chunks of records,
whose verdicts stay on disk until the end, so that a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from llava_simplified.data.images import (
    FORMATS,
    MAX_PIXELS,
    ImageError,
    check_image,
    decode_image,
    read_image_bytes,
    shrink_image,
)
from llava_simplified.data.records import Record
from llava_simplified.data.rows import RowFile, find_records, open_rows
from llava_simplified.data.shards import ShardWriter
from llava_simplified.data.transforms import ImageTransform
from llava_simplified.html_report import make_thumbnail
from llava_simplified.prepare.convert import RecordWriter
from llava_simplified.prepare.preparation_report import Example, write_preparation_report
from llava_simplified.workers import add_worker_arguments, parse_slice, run_tasks

CHUNK = 500  # records whose verdicts are written at once
SHARD = 5_000  # records of a compacted shard
_RESULTS = pa.schema(
    {
        "reason": pa.string(),
        "detail": pa.string(),
        "bad": pa.list_(pa.int16()),  # which responses can't be used, where others can
        "digest": pa.binary(16),
        "look": pa.binary(19),
    }
)


@dataclass(frozen=True)
class Rules:
    """What a usable record is; sides in pixels, captions in characters."""

    min_side: int = 32
    max_aspect: float = 10.0
    max_caption: int = 2_000
    max_pixels: int = MAX_PIXELS
    perceptual: bool = False


class ValidationResult(NamedTuple):
    """`reason` is empty for a good record; `digest` and `look`: which pictures are the same, or look it."""

    reason: str = ""
    detail: str = ""
    bad: tuple[int, ...] = ()
    digest: bytes | None = None
    look: bytes | None = None


def validate_record(
    row: dict[str, Any], where: str, folder: Path, transform: ImageTransform | None, rules: Rules
) -> ValidationResult:
    """What training would make of a record."""
    try:
        record = Record.from_json(row, where)
        whole, data = hashlib.sha256(), b""
        for name in record.images:
            data = read_image_bytes(name, folder)
            _check(data, transform, rules)
            whole.update(data)
        digest = whole.digest() if record.images else None
        look = (
            perceptual_hash(decode_image(data))
            if rules.perceptual and len(record.images) == 1
            else digest
        )
    except ImageError as error:
        return ValidationResult(error.kind, str(error))
    except ValueError as error:
        return ValidationResult("not_a_record", str(error))
    bad = {i: why for i, text in enumerate(record.responses) if (why := _unusable(text, rules))}
    if len(bad) == len(record.responses):
        return ValidationResult(bad.get(0, "no_caption"), repr(record.responses)[:200])
    return ValidationResult(
        "",
        ", ".join(sorted(set(bad.values()))),
        tuple(bad),
        digest and digest[:16],
        look and look[:19],
    )


def _check(data: bytes, transform: ImageTransform | None, rules: Rules) -> None:
    """An ImageError that says what rule a picture breaks, if it breaks one."""
    _, suffix, width, height = check_image(data, rules.max_pixels)
    if min(height, width) < rules.min_side:
        raise ImageError("too_small", f"{width}x{height} pixels, --min-side is {rules.min_side}")
    if max(height, width) > rules.max_aspect * min(height, width):
        raise ImageError("aspect", f"{width}x{height} pixels, --max-aspect is {rules.max_aspect:g}")
    if transform is not None:
        transform.resized_size(height, width)  # all that it can fail at
    if suffix != "jpg":
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ImageError("animated", f"{frames} frames")


def _unusable(caption: str, rules: Rules) -> str:
    if not caption.strip():
        return "empty_caption"
    return "long_caption" if len(caption) > rules.max_caption else ""


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """19 bytes that are nearly equal for pictures that look the same, whatever their size and compression.

    The difference hash (brightness against the right and the lower neighbour, on an 8x8 grid) and the mean colour.
    """
    small = Image.fromarray(pixels).resize((9, 9), Image.Resampling.BOX, reducing_gap=2.0)
    grey = np.asarray(small.convert("L"), np.int16)
    right, below = grey[:8, 1:] > grey[:8, :8], grey[1:, :8] > grey[:8, :8]
    color = np.asarray(small, np.float32).mean((0, 1)).astype(np.uint8)
    return np.packbits(np.stack([right, below])).tobytes() + color.tobytes()


def find_duplicates(rows: np.ndarray, data: np.ndarray, perceptual: bool) -> dict[int, int]:
    """{later row: the earlier row it repeats}.

    Args:
        rows: (n,) row numbers, ascending.
        data: (n, width) uint8, the digest or look of each; equal ones are duplicates, and with `perceptual`
            those that differ in at most 5 of 128 bits and little in colour.
    """
    if not len(rows):
        return {}
    if not perceptual:
        keys = np.ascontiguousarray(data).view(f"V{data.shape[1]}").reshape(-1)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        origin = first[inverse.reshape(-1)]
        return {
            int(rows[i]): int(rows[origin[i]])
            for i in np.flatnonzero(origin != np.arange(len(rows)))
        }
    found: dict[int, int] = {}
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.uint8)
    hashes, colors = data[:, :16], data[:, 16:].astype(np.int16)
    for band in range(
        0, 16, 2
    ):  # 5 differing bits leave one of 8 bands equal, where both are neighbours
        order = np.lexsort(np.roll(hashes, -band, axis=1).T[::-1])
        for step in range(1, 9):
            one, other = order[:-step], order[step:]
            near = bits[hashes[one] ^ hashes[other]].sum(1) <= 5
            near &= np.abs(colors[one] - colors[other]).max(1) <= 8
            for a, b in zip(one[near], other[near]):
                early, late = sorted((int(rows[a]), int(rows[b])))
                found[late] = min(early, found.get(late, early))
    return found


# ---- over many records


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop`, to be judged by a worker that leaves the verdicts in `path`."""

    records: str
    start: int
    stop: int
    folder: str
    transform: ImageTransform | None
    rules: Rules
    path: str


@lru_cache(maxsize=1)
def _rows(path: str) -> RowFile:
    return open_rows(path)


def validate_chunk(chunk: Chunk) -> dict[str, int]:
    """Write the verdicts on a chunk, unless they are there; returns how many there are of each."""
    path = Path(chunk.path)
    if not path.exists():
        rows, folder = _rows(chunk.records), Path(chunk.folder)
        verdicts = []
        for index in range(chunk.start, chunk.stop):
            try:
                row = rows[index]
            except ValueError as error:
                verdicts.append(ValidationResult("not_a_record", str(error)))
                continue
            verdicts.append(
                validate_record(row, rows.where(index), folder, chunk.transform, chunk.rules)
            )
        table = pa.Table.from_pylist([verdict._asdict() for verdict in verdicts], _RESULTS)
        pq.write_table(table, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return Counter(pq.read_table(path, columns=["reason"])["reason"].to_pylist())


@dataclass(frozen=True)
class CompactShard:
    """Survivors `start` to `stop`, whose pictures go into `output/<number>.tar`."""

    records: str
    start: int
    stop: int
    folder: str
    output: str
    number: int
    side: int


def compact_shard(spec: CompactShard) -> int:
    """Write one shard of shrunk (`side` 0: untouched) pictures, and its manifest; returns how many it holds."""
    output, rows = Path(spec.output), _rows(spec.records)
    manifest = output / f"{spec.number:05d}.parquet"
    if manifest.exists():
        return pq.read_metadata(manifest).num_rows
    entries = []
    writer = ShardWriter(output / f"{spec.number:05d}.tar.part")
    for index in range(spec.start, spec.stop):
        record = Record.from_json(rows[index], rows.where(index))
        for number, name in enumerate(record.images):
            data = read_image_bytes(name, spec.folder)
            picture = shrink_image(data, spec.side) if spec.side else check_image(data)
            key = compact_key(index, number)
            about = {"key": key, "source": name, "width": picture.width, "height": picture.height}
            offset = writer.add(key, picture.data, picture.suffix, record.responses, about)
            place = {
                "offset": offset,
                "length": len(picture.data),
                "file": f"{key}.{picture.suffix}",
            }
            entries.append({**about, **place, "captions": list(record.responses), "status": "ok"})
    writer.close()
    (output / f"{spec.number:05d}.tar.part").replace(output / f"{spec.number:05d}.tar")
    pq.write_table(pa.Table.from_pylist(entries), manifest.with_suffix(".part"), compression="zstd")
    manifest.with_suffix(".part").replace(manifest)
    return len(entries)


def compact_key(index: int, number: int) -> str:
    """The key of picture `number` of row `index`."""
    return f"{index:09d}" if not number else f"{index:09d}_{number}"


def clean(
    source: Path,
    output: Path,
    *,
    image_folder: Path | None = None,
    vision_tower: str = "",
    rules: Rules = Rules(),
    dedupe: str = "",
    compact: Path | None = None,
    compact_size: int = 224,
    engine: str = "local",
    workers: int = 0,
    shards: str = "",
    progress: bool = False,
) -> dict[str, int]:
    """Write the usable records of `source` to `output`, in their order; returns how many rows got which verdict.

    Beside it: `<output>_quarantine.jsonl` (reason, detail and the record itself), `<output>_report.html` and `.json`.

    Args:
        image_folder: where the pictures are; by default, where `source` is.
        vision_tower: whose transform every picture must pass; none if empty.
        dedupe: `exact` (same bytes), `perceptual` (looks the same), or "". Other words about a picture are no duplicate.
        compact: a folder for shards of the survivors, their shorter side shrunk to `compact_size` (0 keeps the
            bytes); then `output` names the pictures there.
        shards: `i/n`, judge only this slice; a last call without it puts everything together.
    """
    if rules.max_pixels > MAX_PIXELS:
        raise ValueError(
            f"--max-pixels {rules.max_pixels}: training opens no picture of more than {MAX_PIXELS}"
        )
    rows = open_rows(source)
    folder = image_folder or find_records(source).parent
    if not folder.is_dir():
        raise ValueError(f"--image-folder {folder}: no such folder")
    stat, transform = (
        rows.path.stat(),
        ImageTransform.from_pretrained(vision_tower) if vision_tower else None,
    )
    facts = [
        str(rows.path),
        stat.st_size,
        stat.st_mtime_ns,
        str(folder),
        str(transform),
        asdict(rules),
    ]
    work = (
        output.with_name(f"{output.name}.work")
        / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    )
    work.mkdir(parents=True, exist_ok=True)
    chunks = []
    for number, start in enumerate(range(0, len(rows), CHUNK)):
        stop, path = min(start + CHUNK, len(rows)), str(work / f"{number:06d}.parquet")
        chunks.append(Chunk(str(source), start, stop, str(folder), transform, rules, path))
    mine = [chunks[i] for i in parse_slice(shards, len(chunks))]
    _run(validate_chunk, mine, engine, workers, progress)
    if shards:
        return dict(sum((Counter(validate_chunk(chunk)) for chunk in mine), Counter()))
    duplicates = {}
    if dedupe:
        duplicates = find_duplicates(
            *_fingerprints(chunks, dedupe == "perceptual"), dedupe == "perceptual"
        )
    kept = output if compact is None else work / "survivors.jsonl"
    counts, examples = _write(rows, _verdicts(chunks, rows, duplicates), kept, output, folder)
    if compact is not None:
        _compact(kept, folder, compact, compact_size, engine, workers, progress)
        _write_compacted(open_rows(kept), output)
    _report(rows, counts, examples, output)
    shutil.rmtree(work.parent)
    return dict(counts)


def _fingerprints(chunks: list[Chunk], perceptual: bool) -> tuple[np.ndarray, np.ndarray]:
    rows, data = [np.zeros(0, np.int64)], [np.zeros((0, 19 if perceptual else 16), np.uint8)]
    for chunk in chunks:
        column = pq.read_table(chunk.path)["look" if perceptual else "digest"].to_pylist()
        there = [i for i, value in enumerate(column) if value is not None]
        rows.append(np.array(there, np.int64) + chunk.start)
        joined = b"".join(column[i] for i in there)
        data.append(np.frombuffer(joined, np.uint8).reshape(len(there), data[0].shape[1]))
    return np.concatenate(rows), np.concatenate(data)


def _verdicts(
    chunks: list[Chunk], rows: RowFile, duplicates: dict[int, int]
) -> Iterator[ValidationResult]:
    for chunk in chunks:
        for index, values in enumerate(pq.read_table(chunk.path).to_pylist(), chunk.start):
            verdict = ValidationResult(**values)
            if index in duplicates and not _other_words(rows[index], rows[duplicates[index]]):
                verdict = verdict._replace(
                    reason="duplicate", detail=f"of {rows.where(duplicates[index])}"
                )
            yield verdict


def _other_words(row: dict[str, Any], first: dict[str, Any]) -> bool:
    return row != first and all(row.get(name) == first.get(name) for name in ("image", "images"))


def _run(function: Any, specs: list[Any], engine: str, workers: int, progress: bool) -> None:
    done, total = 0, sum(spec.stop - spec.start for spec in specs)
    for result in run_tasks(function, specs, engine=engine, workers=workers):
        if result.error:
            raise ValueError(f"{result.error}\nThe same command goes on where this stopped.")
        done += result.spec.stop - result.spec.start
        if progress:
            sys.stderr.write(f"\r{done:,} of {total:,} records   {'' if done < total else chr(10)}")


def _write(
    rows: RowFile, verdicts: Iterator[ValidationResult], kept: Path, output: Path, folder: Path
) -> tuple[Counter[str], dict[str, list[Example]]]:
    """Survivors to `kept`, the others to the quarantine beside `output`."""
    counts, examples = Counter[str](), dict[str, list[Example]]()
    aside = output.with_name(f"{output.stem}_quarantine.jsonl")
    with RecordWriter(kept) as good, RecordWriter(aside) as bad:
        for index, verdict in enumerate(verdicts):
            counts[verdict.reason or "ok"] += 1
            if verdict.reason:
                text = rows.raw(index).decode("utf-8", "replace")
                bad.write(
                    {"reason": verdict.reason, "detail": verdict.detail, "record": _readable(text)}
                )
                if len(seen := examples.setdefault(verdict.reason, [])) < 12:
                    caption, thumbnail = _shown(text, folder)
                    example = Example(
                        name=rows.where(index),
                        caption=caption,
                        detail=verdict.detail,
                        thumbnail=thumbnail,
                    )
                    seen.append(example)
                continue
            row = rows[index]
            if verdict.bad:  # some of its captions can't be used, the others can
                unusable = [row["responses"][i] for i in verdict.bad]
                bad.write(
                    {
                        "reason": verdict.detail,
                        "detail": "",
                        "record": {**row, "responses": unusable},
                    }
                )
                row["responses"] = [
                    r for i, r in enumerate(row["responses"]) if i not in verdict.bad
                ]
            good.write(row)
    return counts, examples


def _readable(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _compact(
    records: Path, folder: Path, output: Path, side: int, engine: str, workers: int, progress: bool
) -> None:
    """A shard that is there whole is taken as it is: the mark says that it was made of the same rows."""
    output.mkdir(parents=True, exist_ok=True)
    mark, made_of = output / "made_of", hashlib.sha256(f"{folder.resolve()} {side}".encode())
    with records.open("rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            made_of.update(block)
    if any(output.iterdir()) and not (mark.is_file() and mark.read_text() == made_of.hexdigest()):
        raise ValueError(
            f"--compact {output}: what is there was made of other records; empty it, or name another folder"
        )
    mark.write_text(made_of.hexdigest())
    specs, count = [], len(open_rows(records))
    for number, start in enumerate(range(0, count, SHARD)):
        stop = min(start + SHARD, count)
        specs.append(
            CompactShard(str(records), start, stop, str(folder), str(output), number, side)
        )
    _run(compact_shard, specs, engine, workers, progress)


def _write_compacted(survivors: RowFile, output: Path) -> None:
    with RecordWriter(output) as writer:
        for index, row in enumerate(survivors):
            name = "image" if "image" in row else "images"
            several = isinstance(row.get(name), list)
            count = len(row[name]) if several else int(bool(row.get(name)))
            places = [
                f"{index // SHARD:05d}.tar#{compact_key(index, number)}" for number in range(count)
            ]
            writer.write({**row, **({name: places if several else places[0]} if places else {})})


def _report(
    rows: RowFile, counts: Counter[str], examples: dict[str, list[Example]], output: Path
) -> None:
    path = output.with_name(f"{output.stem}_report.html")
    write_preparation_report(
        path,
        title=f"Cleaning of {rows.name}",
        facts={"records": f"{len(rows):,}", "kept": f"{counts['ok']:,}"},
        outcomes=counts,
        examples=examples,
    )
    plain = {
        reason: [{**example, "thumbnail": ""} for example in some]
        for reason, some in sorted(examples.items())
    }
    report = json.dumps({"outcomes": counts, "examples": plain}, indent=1, ensure_ascii=False)
    path.with_suffix(".json").write_text(report, "utf-8")


def _shown(text: str, folder: Path) -> tuple[str, str]:
    """Caption and picture of a record that was set aside, as far as there are any."""
    try:
        record = Record.from_json(_readable(text), "")
    except ValueError:
        return text[:200], ""
    caption = " / ".join(record.responses)[:200]
    try:
        pixels = decode_image(read_image_bytes(record.images[0], folder)) if record.images else None
    except ImageError:
        pixels = None
    return caption, "" if pixels is None else make_thumbnail(pixels).data_uri


def main(argv: list[str] | None = None) -> int:
    """`llava clean data/cc3m --vision_tower openai/clip-vit-base-patch16 --output cc3m_clean.json`."""
    parser = argparse.ArgumentParser(
        "llava clean", description="Keep the records that training can use."
    )
    add, rules = parser.add_argument, Rules()
    add(
        "records",
        type=Path,
        help="a folder of `llava download`, or .json, .jsonl, .parquet of records",
    )
    add("--output", type=Path, required=True, help="the good records: .json, .jsonl or .parquet")
    add("--image-folder", type=Path, help="where the pictures are (default: with the records)")
    add(
        "--vision_tower",
        "--vision-tower",
        default="",
        help="whose transform the pictures must pass",
    )
    add(
        "--min-side",
        type=int,
        default=rules.min_side,
        help="pixels of the shorter side (%(default)s)",
    )
    add(
        "--max-aspect",
        type=float,
        default=rules.max_aspect,
        help="longer side over shorter side (%(default)s)",
    )
    add("--max-caption", type=int, default=rules.max_caption, help="characters (%(default)s)")
    add("--max-pixels", type=int, default=rules.max_pixels, help="(%(default)s)")
    add(
        "--dedupe",
        choices=["exact", "perceptual"],
        default="",
        help="keep the first of equal pictures",
    )
    add(
        "--compact",
        type=Path,
        metavar="SHARDS",
        help="also write the kept pictures, smaller, to shards here",
    )
    add(
        "--compact-size",
        default="224",
        help="their shorter side, 224 or 256; exact keeps the bytes",
    )
    add_worker_arguments(parser)
    args = parser.parse_args(argv)
    if args.compact_size != "exact" and not args.compact_size.isdigit():
        raise ValueError(f"--compact-size {args.compact_size!r}: a number of pixels, or exact")
    same = ("image_folder", "vision_tower", "dedupe", "compact", "engine", "workers", "shards")
    counts = clean(
        args.records,
        args.output,
        rules=Rules(
            args.min_side,
            args.max_aspect,
            args.max_caption,
            args.max_pixels,
            args.dedupe == "perceptual",
        ),
        compact_size=0 if args.compact_size == "exact" else int(args.compact_size),
        progress=sys.stderr.isatty(),
        **{name: getattr(args, name) for name in same},
    )
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        sys.stdout.write(f"{count:>9,} {reason or 'ok'}\n")
    if not args.shards:
        sys.stdout.write(f"{counts.get('ok', 0):>9,} records -> {args.output}\n")
    return 0
