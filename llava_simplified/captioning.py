"""Records and pictures -> captions, in batches. `predict.py` and `llava predict` come here."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_simplified.data.dataset import record_pixels
from llava_simplified.data.images import ImageError, load_pixels
from llava_simplified.data.records import Record, open_records
from llava_simplified.model.generation import GenerationOptions, generate
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IMAGE_PLACEHOLDER


def main(argv: list[str] | None = None) -> int:
    """The command line of `predict.py`."""
    parser = argparse.ArgumentParser("predict.py", description="Caption pictures with a trained model.")
    parser.add_argument("--model-path", required=True, help="checkpoint folder that training wrote")
    parser.add_argument("--model-base", help="the language model, if it is not where it was at training")
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="records to caption: .json, .jsonl or .parquet")
    source.add_argument("--image", help="one picture to caption")
    parser.add_argument(
        "--image-folder", help="where the records' images are; the data file's folder where not given"
    )
    parser.add_argument("--output", default="predictions.json", help=".json: an array; .jsonl: a row a line")
    parser.add_argument("--trials", type=int, help="captions per picture (3; greedy: 1)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_p", "--top-p", type=float, default=1.0)
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--instruction", help="for --image; default: the one it was trained with")
    parser.add_argument("--limit", type=int, help="only the first so many records")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    chosen = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "num_beams": args.num_beams,
        "seed": args.seed,
    }
    trials = args.trials or (1 if args.temperature == 0 or args.image else 3)
    options = GenerationOptions(num_return_sequences=trials, **chosen)
    records: Sequence[Record] = []
    if args.image:
        load_pixels(args.image)  # a wrong path should not cost the loading of a model
    else:
        records = open_records(args.data_path)
        records = [records[i] for i in range(min(len(records), args.limit or len(records)))]
    model = Llava.from_pretrained(args.model_path, model_base=args.model_base, vision_tower=args.vision_tower)
    if args.image:
        texts = model.caption([args.image], args.instruction, n=trials, **chosen)
        for text in texts[0] if trials > 1 else texts:
            print(text)
        return 0
    folder = args.image_folder or str(Path(args.data_path).parent)
    count, bad = write_predictions(model, records, folder, Path(args.output), options, args.batch_size)
    print(f"{count:,} records captioned, {len(bad)} set aside -> {args.output}")
    return 1 if bad and not count else 0


def write_predictions(
    model: Llava,
    records: Sequence[Record],
    image_folder: str | Path,
    output: Path,
    options: GenerationOptions,
    batch_size: int = 16,
) -> tuple[int, list[str]]:
    """Caption records into a `.json` array or `.jsonl`; returns how many, and what could not be read.

    Pictures that can't be read are named in `<output>.bad.jsonl`.
    """
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    captioned, start = 0, time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    for batch_rows, batch_bad in caption_records(model, records, image_folder, options, batch_size):
        rows += batch_rows
        bad += batch_bad
        captioned += len(batch_rows) // options.num_return_sequences
        rate = captioned / (time.monotonic() - start)
        print(f"\r{captioned:,}/{len(records):,} pictures, {rate:.1f}/s ", end="", file=sys.stderr)
    print(file=sys.stderr)
    if output.suffix == ".jsonl":
        output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if bad:
        report = output.with_suffix(output.suffix + ".bad.jsonl")
        report.write_text("".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")
        print(
            f"{len(bad)} pictures could not be read, see {report}; the first: {bad[0]['error']}",
            file=sys.stderr,
        )
    return captioned, [row["error"] for row in bad]


def caption_records(
    model: Llava,
    records: Sequence[Record],
    image_folder: str | Path,
    options: GenerationOptions,
    batch_size: int = 16,
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Batch by batch: the prediction rows (one a trial), and the records whose picture can't be read."""
    for start in range(0, len(records), batch_size):
        good: list[tuple[int, Record]] = []
        pixels, bad = [], []
        for index in range(start, min(start + batch_size, len(records))):
            record = records[index]
            try:
                pixels.append(record_pixels(record, image_folder, model.vision_tower.transform))
                good.append((index, record))
            except ImageError as error:
                bad.append({"index": index, "image": record.images[0], "error": f"{record.id}: {error}"})
        rows: list[dict[str, Any]] = []
        if good:
            prompts = [model.prompt.render(record.turns, None, record.id).input_ids for _, record in good]
            images = [p for p in pixels if p is not None]
            captions = generate(model, prompts, torch.cat(images) if images else None, options)
            rows = [
                _row(index, record, text) for (index, record), texts in zip(good, captions) for text in texts
            ]
        yield rows, bad


def _row(index: int, record: Record, text: str) -> dict[str, Any]:
    truth: str | list[str] = (
        list(record.responses) if len(record.responses) > 1 else "".join(record.responses)
    )
    return {
        "index": index,
        "image": record.images[0] if record.images else None,
        "instruction": record.turns[-1].text.replace(f"{IMAGE_PLACEHOLDER}\n", ""),
        "gt_caption": truth,
        "pred_output": text,
    }
