"""Pictures -> captions: a file of records, a folder, a shard or one picture; in batches, and going on where it was stopped.

`predict.py` and `llava predict` (the tutorial's flags), `llava caption` and `llava chat` come here.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import torch
from tqdm.auto import tqdm

from llava_simplified.data.dataset import open_data
from llava_simplified.data.engines import run_shards
from llava_simplified.data.images import ImageError, decode_image, load_pixels, read_image_bytes
from llava_simplified.data.records import Record, place_images, prediction_row
from llava_simplified.data.shards import shard_index
from llava_simplified.model.generation import GenerationOptions, content_keys, encode, generate_from
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import Message

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
WINDOW = 8  # batches that are sorted together, so that prompts of one length meet


# ---- what is captioned ----


class Pictures(Sequence[Record]):
    """Each question about each picture, as a record made when it is asked for."""

    def __init__(self, names: Sequence[str], questions: Sequence[str]) -> None:
        self.names, self.questions = names, questions

    def __len__(self) -> int:
        return len(self.names) * len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, question = self.names[index // len(self.questions)], self.questions[index % len(self.questions)]
        return Record((name,), place_images([Message("user", question)], 1, name), (), name)


def open_source(source: str, image_folder: str | None, questions: Sequence[str]) -> tuple[Sequence[Record], str]:
    """What SOURCE holds, and the folder that its images are in.

    Args:
        source: a picture, a .tar shard, a folder (with all below it) or glob pattern of these, or a file of records.
        questions: asked about every picture; records bring their own.

    Raises:
        ValueError: nothing is there, no picture, or questions beside records.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl", ".parquet"):
        if questions:
            raise ValueError(f"--prompt: the records of {source} bring their own questions")
        return open_data(source, image_folder, "--image-folder", answered=False)
    folder = Path()
    if path.is_dir():
        folder, found = path, sorted(path.rglob("*"))
    elif path.is_file():
        folder, found = path.parent, [path]
    else:
        found = sorted(map(Path, glob.glob(source, recursive=True)))  # noqa: PTH207 - may be absolute
    names: list[str] = []
    for file in found:
        name = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
        if file.suffix == ".tar":
            names += [f"{name}#{key.decode()}" for key in shard_index(file).keys]
        elif file == path or (file.suffix.lower() in PICTURES and file.is_file()):
            names.append(name)
    if not names:
        raise ValueError(f"{source}: no picture, folder of pictures, shard or file of records")
    return Pictures(names, questions), str(folder.absolute())


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
    output, bad_path, begun = (Path(job.output + end) for end in ("", ".bad.jsonl", ".settings.json"))
    records, folder = open_source(job.source, job.image_folder, job.questions)
    # of a batch's size a caption knows nothing, and a folder may be moved
    settings = {**asdict(job), "batch_size": None, "output": None, "model": _written(job.model_path)}
    settings = json.loads(json.dumps({**settings, "contents of the source": _contents(records, job.source)}))
    if output.exists():
        old = json.loads(begun.read_text(encoding="utf-8")) if begun.exists() else {}
        if other := [name for name in settings if name not in old or old[name] != settings[name]]:
            raise ValueError(f"{output} was begun with another {', '.join(other)}: delete it, or give another --output")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        bad_path.unlink(missing_ok=True)
        begun.write_text(json.dumps(settings), encoding="utf-8")
    done = _whole_records(output, job.options.num_return_sequences) | _whole_records(bad_path, 1)

    model = model or _load(job)
    if isinstance(records, Pictures) and not job.questions:
        records.questions = (model.instruction,)
    indices = range(min(len(records), job.limit or len(records)))[job.chunk :: job.chunks]
    todo = [index for index in indices if index not in done]
    bar = tqdm(total=len(indices), initial=len(indices) - len(todo), unit=" records", dynamic_ncols=True)
    with output.open("ab") as good, bad_path.open("ab") as rejected, bar:
        for rows, bad in caption_records(model, records, folder, job.options, job.batch_size, todo):
            for stream, batch in ((good, rows), (rejected, bad)):
                stream.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch))
                stream.flush()
            bar.update(len(rows) // job.options.num_return_sequences + len(bad))
    bad_count = len(_whole_records(bad_path, 1))
    if not bad_count:
        bad_path.unlink()
    return len(indices) - bad_count, bad_count


def _written(model_path: str) -> list[int]:
    """When a checkpoint's files were written: trained anew in the same place, it is another model."""
    return sorted(path.stat().st_mtime_ns for path in Path(model_path).glob("*.safetensors")) if model_path else []


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
                    bad.append({"index": index, "image": record.images[0], "error": f"{record.id}: {outcome}"})
                else:
                    rows += [prediction_row(index, record, text) for text in outcome]
                head += 1
            yield rows, bad


def _caption_window(
    model: Llava, window: Sequence[Record], image_folder: str | Path, options: GenerationOptions, batch_size: int
) -> Iterator[dict[int, list[str] | ImageError]]:
    """Batches of prompts of nearly one length: what was said, or what is wrong with a picture, by place in the window."""

    def load(name: str) -> torch.Tensor:
        return model.vision_tower.transform(decode_image(read_image_bytes(name, image_folder)))

    prompts = [model.prompt.render(record.turns, None, record.id).input_ids for record in window]
    order = sorted(range(len(window)), key=lambda place: len(prompts[place]))
    features: dict[str, torch.Tensor] = {}  # a picture is read and encoded once, however much is asked about it
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
                features.update(zip(new, encode(model, torch.stack([pixels[name].result() for name in new]))))
            if asked:
                batch = [prompts[place] for place in asked]
                shown = torch.stack([features[name] for name in wanted]) if wanted else None
                keys = content_keys(batch, [pixels[name].result() for name in wanted])
                outcomes |= zip(asked, generate_from(model, batch, shown, options, keys))
            yield outcomes


# ---- commands ----


def _parser(name: str, what: str, *, temperature: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(name, description=what)
    parser.add_argument("--model-path", required=True, help="checkpoint folder that training wrote")
    parser.add_argument("--model-base", help="the language model, if it is not where it was at training")
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    parser.add_argument("--bits", type=int, choices=[4, 8, 16], help="of the language model's weights (as in training)")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (%(default)s)")
    decoding.add_argument("--top_p", "--top-p", type=float, default=1.0)
    decoding.add_argument("--top-k", type=int, default=0)
    decoding.add_argument("--repetition-penalty", type=float, default=1.0)
    decoding.add_argument("--num_beams", "--num-beams", type=int, default=1)
    decoding.add_argument("--length-penalty", type=float, default=1.0)
    decoding.add_argument("--min-new-tokens", type=int, default=0)
    decoding.add_argument("--max-new-tokens", type=int, default=64)
    decoding.add_argument("--seed", type=int, default=0)
    return parser


def _options(args: argparse.Namespace, trials: int) -> GenerationOptions:
    given = {f.name: getattr(args, f.name) for f in fields(GenerationOptions) if f.name != "num_return_sequences"}
    return GenerationOptions(num_return_sequences=trials, **given)


def _job(args: argparse.Namespace, source: str, output: Path, options: GenerationOptions, **more: Any) -> Job:
    names = ("model_path", "model_base", "vision_tower", "bits", "image_folder", "limit", "batch_size")
    return Job(source=source, output=str(output), options=options, **{n: getattr(args, n) for n in names}, **more)


def main(argv: list[str] | None = None) -> int:
    """The command line of `predict.py`."""
    parser = _parser("predict.py", "Caption pictures with a trained model.", temperature=0.2)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="records to caption: .json, .jsonl or .parquet")
    source.add_argument("--image", help="one picture to caption")
    parser.add_argument("--image-folder", help="where the records' images are; the data file's folder where not given")
    parser.add_argument("--output", default="predictions.json", help=".json: an array; .jsonl: a row a line")
    parser.add_argument("--trials", type=int, help="captions per picture (3; greedy: 1)")
    parser.add_argument("--instruction", help="for --image; default: the one it was trained with")
    parser.add_argument("--limit", type=int, help="only the first so many records")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    options = _options(args, args.trials or (1 if args.temperature == 0 or args.image else 3))
    if args.image:
        return _say(args, args.image, [args.instruction] if args.instruction else [], options)
    output = Path(args.output)
    as_array = output.suffix != ".jsonl"
    # an array can't grow: its rows are collected beside it
    rows_path = output.with_name(f"{output.name}.part.jsonl") if as_array else output
    count, bad = caption_file(_job(args, args.data_path, rows_path, options))
    if as_array:
        rows = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()]
        output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        named = Path(f"{output}.bad.jsonl")
        named.unlink(missing_ok=True)  # what an earlier file said
        if bad:
            Path(f"{rows_path}.bad.jsonl").replace(named)
        rows_path.unlink()
        Path(f"{rows_path}.settings.json").unlink()
    return _report(count, bad, args.output)


def caption_main(argv: list[str] | None = None) -> int:
    """The command line of `llava caption`."""
    parser = _parser("llava caption", "Caption a picture, a folder, a shard, or records.", temperature=0.0)
    parser.add_argument("source", help="a picture, folder, glob pattern, .tar shard, or .json/.jsonl/.parquet records")
    parser.add_argument("--image-folder", help="where the records' images are")
    parser.add_argument("--prompt", action="append", default=[], help="what to ask; several times: several questions")
    parser.add_argument("--output", help="(captions.jsonl; a single picture: the terminal)")
    parser.add_argument("--trials", type=int, default=1, help="captions per picture")
    parser.add_argument("--limit", type=int, help="only the first so many")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-chunks", type=int, help="spread over so many processes or machines ...")
    parser.add_argument("--chunk-idx", type=int, help="... of which this is one, from 0 (torchrun sets both)")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="ray: run the chunks on a cluster")
    args = parser.parse_args(argv)
    options = _options(args, args.trials)
    if Path(args.source).is_file() and Path(args.source).suffix.lower() in PICTURES and not args.output:
        return _say(args, args.source, args.prompt, options)

    chunks = args.num_chunks or int(os.environ.get("WORLD_SIZE", "1"))
    mine = args.chunk_idx if args.chunk_idx is not None else int(os.environ.get("RANK", "0"))
    if not 0 <= mine < chunks:
        raise ValueError(f"--chunk-idx {mine} is not one of --num-chunks {chunks}, counted from 0")
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    output = Path(args.output or "captions.jsonl")
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: captions are written as .jsonl")

    def job(chunk: int) -> Job:
        path = output if chunks == 1 else output.with_name(f"{output.stem}-{chunk}-of-{chunks}.jsonl")
        return _job(args, args.source, path, options, questions=tuple(args.prompt), chunk=chunk, chunks=chunks)

    if args.engine == "local":
        return _report(*caption_file(job(mine)), job(mine).output)
    failed = 0
    for done in run_shards(caption_file, [job(chunk) for chunk in range(chunks)], engine=args.engine):
        if done.result is None:
            failed += 1
            print(f"{done.spec.output}: {done.error}", file=sys.stderr)
        else:
            _report(*done.result, done.spec.output)
    return 1 if failed else 0


def chat_main(argv: list[str] | None = None) -> int:
    """The command line of `llava chat`: questions on standard input, answers as they are decoded."""
    parser = _parser("llava chat", "Talk about a picture; an empty line or Ctrl-D ends it.", temperature=0.0)
    parser.add_argument("image")
    args = parser.parse_args(argv)
    pixels = load_pixels(args.image)
    model = _load(args)
    options = asdict(_options(args, 1))
    turns: list[Message] = []
    while question := _read_line("> "):
        turns.append(Message("user", question))
        pieces = []
        for piece in model.stream(turns, [pixels], **options):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        turns.append(Message("assistant", "".join(pieces).strip() or "."))
    return 0


def _read_line(sign: str) -> str:
    print(sign if sys.stdin.isatty() else "", end="", flush=True)
    return sys.stdin.readline().strip()


def _load(asked: argparse.Namespace | Job) -> Llava:
    where = {name: getattr(asked, name) for name in ("model_base", "vision_tower", "bits")}
    return Llava.from_pretrained(asked.model_path, **where)


def _say(args: argparse.Namespace, image: str, questions: Sequence[str], options: GenerationOptions) -> int:
    """Captions of one picture on the terminal; a single one appears as it is decoded."""
    pixels = load_pixels(image)  # a wrong path should not cost the loading of a model
    model = _load(args)
    chosen = asdict(options)
    count = chosen.pop("num_return_sequences")
    for question in questions or (model.instruction,):
        if count == 1 and options.num_beams == 1:
            for piece in model.stream(question, [pixels], **chosen):
                print(piece, end="", flush=True)
            print()
        else:
            texts = model.caption([pixels], question, n=count, **chosen)[0]
            print("\n".join(texts if count > 1 else [texts]))
    return 0


def _report(count: int, bad: int, output: str) -> int:
    """Say what came of it; the exit status is 1 where not a single picture could be read."""
    print(f"{count:,} records captioned, {bad} set aside -> {output}")
    if bad:
        print(f"pictures that could not be read: {output}.bad.jsonl", file=sys.stderr)
    return 1 if bad and not count else 0
