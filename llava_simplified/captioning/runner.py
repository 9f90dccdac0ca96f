"""Pictures -> captions: a file of records, a folder, a shard or one picture; in batches, and going on where it was stopped.

`predict.py` and `llava predict` (the tutorial's flags), `llava caption` and `llava chat` come here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from llava_simplified.captioning.inputs import Pictures, open_inputs
from llava_simplified.data.images import ImageError, decode_image, read_image_bytes
from llava_simplified.data.records import Record, prediction_row
from llava_simplified.model.generation import encode_images, generate_from_features
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava
from llava_simplified.model.sampling import prompt_hashes

WINDOW = 8  # batches that are sorted together, so that prompts of one length meet


# ---- what is captioned ----


# ---- captions, batch by batch ----


@dataclass(frozen=True)
class Job:
    """What `caption_file` needs to know: it can be sent to another process or machine, and compared at a resume."""

    model_path: str
    source: str
    output: str
    options: GenerationOptions
    questions: tuple[str, ...] = ()
    image_folder: str | None = None
    model_base: str | None = None
    vision_tower: str | None = None
    bits: int | None = None
    limit: int | None = None
    batch_size: int = 16
    chunk: int = 0
    chunks: int = 1


def caption_file(job: Job, model: Llava | None = None) -> tuple[int, int]:
    """Caption a source, or one chunk of it, into a .jsonl file; returns how many records it holds, and how many were bad.

    What the file has already is kept: a killed run goes on, no record twice, none missing. Pictures that can't be read
    are named in `<output>.bad.jsonl`.

    Raises:
        ValueError: nothing to caption, or the file was begun with other settings.
    """
    output, bad_path, begun = (
        Path(job.output + end) for end in ("", ".bad.jsonl", ".settings.json")
    )
    records, folder = open_inputs(job.source, job.image_folder, job.questions)
    # of a batch's size a caption knows nothing, and a folder may be moved
    settings = {
        **asdict(job),
        "batch_size": None,
        "output": None,
        "model": _written(job.model_path),
    }
    settings = json.loads(
        json.dumps({**settings, "contents of the source": _contents(records, job.source)})
    )
    if output.exists():
        old = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else {}
        if other := [name for name in settings if name not in old or old[name] != settings[name]]:
            raise ValueError(
                f"{output} was begun with another {', '.join(other)}: delete it, or give another --output"
            )
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        bad_path.unlink(missing_ok=True)
        begun.write_text(json.dumps(settings), encoding="utf-8")
    done = _whole_records(output, job.options.num_return_sequences) | _whole_records(bad_path, 1)

    model = model or load_model(job)
    if isinstance(records, Pictures) and not job.questions:
        records.questions = (model.instruction,)
    indices = range(min(len(records), job.limit or len(records)))[job.chunk :: job.chunks]
    todo = [index for index in indices if index not in done]
    bar = tqdm(
        total=len(indices), initial=len(indices) - len(todo), unit=" records", dynamic_ncols=True
    )
    with output.open("ab") as good, bad_path.open("ab") as rejected, bar:
        for rows, bad in caption_records(model, records, folder, job.options, job.batch_size, todo):
            for stream, batch in ((good, rows), (rejected, bad)):
                stream.write(
                    b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch)
                )
                stream.flush()
            bar.update(len(rows) // job.options.num_return_sequences + len(bad))
    bad_count = len(_whole_records(bad_path, 1))
    if not bad_count:
        bad_path.unlink()
    return len(indices) - bad_count, bad_count


def _written(model_path: str) -> list[int]:
    """When a checkpoint's files were written: trained anew in the same place, it is another model."""
    return (
        sorted(path.stat().st_mtime_ns for path in Path(model_path).glob("*.safetensors"))
        if model_path
        else []
    )


def _contents(records: Sequence[Record], source: str) -> object:
    """Which record has which number: with a picture more in the folder, other ones."""
    if isinstance(records, Pictures):
        return hashlib.sha256("\n".join(records.names).encode()).hexdigest()
    return [Path(source).stat().st_size, Path(source).stat().st_mtime_ns]


def _whole_records(path: Path, rows_each: int) -> set[int]:
    """The records whose rows are all in a .jsonl file. What a killed run left of one more is cut off."""
    if not path.exists():
        return set()
    whole: set[int] = set()
    last, count, position, kept = -1, 0, 0, 0
    with path.open("r+b") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                break
            position += len(line)
            index = json.loads(line)["index"]
            last, count = index, count + 1 if index == last else 1
            if count == rows_each:
                whole.add(index)
                kept = position
        stream.truncate(kept)
    return whole


def caption_records(
    model: Llava,
    records: Sequence[Record],
    image_folder: str | Path,
    options: GenerationOptions,
    batch_size: int = 16,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The records at `indices` (all of them where None), in order, each as soon as those before it are done.

    Yields:
        The prediction rows (one a trial), and a row for each record whose picture can't be read.
    """
    indices = range(len(records)) if indices is None else indices
    for start in range(0, len(indices), WINDOW * batch_size):
        numbers = indices[start : start + WINDOW * batch_size]
        window = [records[index] for index in numbers]
        head, done = 0, dict[int, list[str] | ImageError]()
        for batch in _caption_window(model, window, image_folder, options, batch_size):
            done |= batch
            rows: list[dict[str, Any]] = []
            bad: list[dict[str, Any]] = []
            while head in done:
                index, record, outcome = numbers[head], window[head], done.pop(head)
                if isinstance(outcome, ImageError):
                    bad.append(
                        {
                            "index": index,
                            "image": record.images[0],
                            "error": f"{record.id}: {outcome}",
                        }
                    )
                else:
                    rows += [prediction_row(index, record, text) for text in outcome]
                head += 1
            yield rows, bad


def _caption_window(
    model: Llava,
    window: Sequence[Record],
    image_folder: str | Path,
    options: GenerationOptions,
    batch_size: int,
) -> Iterator[dict[int, list[str] | ImageError]]:
    """Batches of prompts of nearly one length: what was said, or what is wrong with a picture, by place in the window."""

    def load(name: str) -> torch.Tensor:
        return model.vision_tower.transform(decode_image(read_image_bytes(name, image_folder)))

    prompts = [model.prompt.render(record.turns, None, record.id).input_ids for record in window]
    order = sorted(range(len(window)), key=lambda place: len(prompts[place]))
    features: dict[
        str, torch.Tensor
    ] = {}  # a picture is read and encoded once, however much is asked about it
    with ThreadPoolExecutor(1) as reader:  # ahead of the model
        names = dict.fromkeys(name for place in order for name in window[place].images)
        pixels = {name: reader.submit(load, name) for name in names}
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            outcomes: dict[int, list[str] | ImageError] = {}
            for place in places:
                errors = [pixels[name].exception() for name in window[place].images]
                if error := next(filter(None, errors), None):
                    if not isinstance(error, ImageError):
                        raise error
                    outcomes[place] = error
            asked = [place for place in places if place not in outcomes]
            wanted = [name for place in asked for name in window[place].images]
            if new := [name for name in dict.fromkeys(wanted) if name not in features]:
                features.update(
                    zip(
                        new,
                        encode_images(model, torch.stack([pixels[name].result() for name in new])),
                    )
                )
            if asked:
                batch = [prompts[place] for place in asked]
                shown = torch.stack([features[name] for name in wanted]) if wanted else None
                keys = prompt_hashes(batch, [pixels[name].result() for name in wanted])
                outcomes |= zip(asked, generate_from_features(model, batch, shown, options, keys))
            yield outcomes


# ---- commands ----


def load_model(asked: argparse.Namespace | Job) -> Llava:
    where = {name: getattr(asked, name) for name in ("model_base", "vision_tower", "bits")}
    return Llava.from_pretrained(asked.model_path, **where)
