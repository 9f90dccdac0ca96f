"""The commands `llava caption`, `llava predict` and `llava chat`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from llava_simplified.captioning.inputs import PICTURES
from llava_simplified.captioning.runner import Job, caption_file, load_model
from llava_simplified.data.images import load_pixels
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.prompt import Message
from llava_simplified.workers import run_tasks


def _parser(name: str, what: str, *, temperature: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(name, description=what)
    parser.add_argument("--model-path", required=True, help="checkpoint folder that training wrote")
    parser.add_argument(
        "--model-base", help="the language model, if it is not where it was at training"
    )
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    parser.add_argument(
        "--bits",
        type=int,
        choices=[4, 8, 16],
        help="of the language model's weights (as in training)",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--temperature", type=float, default=temperature, help="0 is greedy (%(default)s)"
    )
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
    given = {
        f.name: getattr(args, f.name)
        for f in fields(GenerationOptions)
        if f.name != "num_return_sequences"
    }
    return GenerationOptions(num_return_sequences=trials, **given)


def _job(
    args: argparse.Namespace, source: str, output: Path, options: GenerationOptions, **more: Any
) -> Job:
    names = (
        "model_path",
        "model_base",
        "vision_tower",
        "bits",
        "image_folder",
        "limit",
        "batch_size",
    )
    return Job(
        source=source,
        output=str(output),
        options=options,
        **{n: getattr(args, n) for n in names},
        **more,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line of `predict.py`."""
    parser = _parser("predict.py", "Caption pictures with a trained model.", temperature=0.2)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="records to caption: .json, .jsonl or .parquet")
    source.add_argument("--image", help="one picture to caption")
    parser.add_argument(
        "--image-folder",
        help="where the records' images are; the data file's folder where not given",
    )
    parser.add_argument(
        "--output", default="predictions.json", help=".json: an array; .jsonl: a row a line"
    )
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
    parser = _parser(
        "llava caption", "Caption a picture, a folder, a shard, or records.", temperature=0.0
    )
    parser.add_argument(
        "source",
        help="a picture, folder, glob pattern, .tar shard, or .json/.jsonl/.parquet records",
    )
    parser.add_argument("--image-folder", help="where the records' images are")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="what to ask; several times: several questions",
    )
    parser.add_argument("--output", help="(captions.jsonl; a single picture: the terminal)")
    parser.add_argument("--trials", type=int, default=1, help="captions per picture")
    parser.add_argument("--limit", type=int, help="only the first so many")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--num-chunks", type=int, help="spread over so many processes or machines ..."
    )
    parser.add_argument(
        "--chunk-idx", type=int, help="... of which this is one, from 0 (torchrun sets both)"
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="ray: run the chunks on a cluster",
    )
    args = parser.parse_args(argv)
    options = _options(args, args.trials)
    if (
        Path(args.source).is_file()
        and Path(args.source).suffix.lower() in PICTURES
        and not args.output
    ):
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
        path = (
            output if chunks == 1 else output.with_name(f"{output.stem}-{chunk}-of-{chunks}.jsonl")
        )
        return _job(
            args,
            args.source,
            path,
            options,
            questions=tuple(args.prompt),
            chunk=chunk,
            chunks=chunks,
        )

    if args.engine == "local":
        return _report(*caption_file(job(mine)), job(mine).output)
    failed = 0
    for done in run_tasks(
        caption_file, [job(chunk) for chunk in range(chunks)], engine=args.engine
    ):
        if done.result is None:
            failed += 1
            print(f"{done.spec.output}: {done.error}", file=sys.stderr)
        else:
            _report(*done.result, done.spec.output)
    return 1 if failed else 0


def chat_main(argv: list[str] | None = None) -> int:
    """The command line of `llava chat`: questions on standard input, answers as they are decoded."""
    parser = _parser(
        "llava chat", "Talk about a picture; an empty line or Ctrl-D ends it.", temperature=0.0
    )
    parser.add_argument("image")
    args = parser.parse_args(argv)
    pixels = load_pixels(args.image)
    model = load_model(args)
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


def _say(
    args: argparse.Namespace, image: str, questions: Sequence[str], options: GenerationOptions
) -> int:
    """Captions of one picture on the terminal; a single one appears as it is decoded."""
    pixels = load_pixels(image)  # a wrong path should not cost the loading of a model
    model = load_model(args)
    chosen = asdict(options)
    count = chosen.pop("num_return_sequences")
    for question in questions or (model.instruction,):
        if count == 1 and options.num_beams == 1:
            for piece in model.stream(question, [pixels], **chosen):
                print(piece, end="", flush=True)
            print()
        else:
            texts = model.caption([pixels], question, num_return_sequences=count, **chosen)[0]
            print("\n".join(texts if count > 1 else [texts]))
    return 0


def _report(count: int, bad: int, output: str) -> int:
    """Say what came of it; the exit status is 1 where not a single picture could be read."""
    print(f"{count:,} records captioned, {bad} set aside -> {output}")
    if bad:
        print(f"pictures that could not be read: {output}.bad.jsonl", file=sys.stderr)
    return 1 if bad and not count else 0
