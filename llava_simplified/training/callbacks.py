"""Watching a run: its speed, its alarms, and what the model says of some validation pictures while it learns."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from llava_simplified.data.dataset import CaptionDataset, load_record_images
from llava_simplified.data.images import ImageError
from llava_simplified.data.records import Record, prediction_row
from llava_simplified.evaluation.metrics import Sample, evaluate
from llava_simplified.model.generation import encode_images, generate_from_features
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava

FOLDER = "eval_captions"  # in the output folder: `step-N.jsonl`, which `llava evaluate` reads


class ProgressLine(TrainerCallback):
    """One line: steps, time left, and the last loss, learning rate, speed and share of padding."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            disable=not state.is_world_process_zero,
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.1e}, {logs['samples_per_second']:.1f} samples/s, "
                f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['padding']:.0%} padding"
            )
        elif "eval_loss" in logs:
            cider = f", CIDEr {logs['eval_cider']:.3f}" if "eval_cider" in logs else ""
            self.bar.write(
                f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}{cider}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class Meter(TrainerCallback):
    """How fast the steps since the last log were, evaluations and saves left out, waiting for data included."""

    def __init__(self) -> None:
        self._begun = self._seconds = 0.0
        self._counts = torch.zeros(3, dtype=torch.long)

    def begin(self) -> None:
        """A step begins: its batches are about to be fetched."""
        self._begun = time.perf_counter()

    def count(self, counts: torch.Tensor) -> None:
        """What its batches hold, on all processes together (3,): samples, tokens, and positions with the padding."""
        self._counts = self._counts.to(counts.device) + counts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds += time.perf_counter() - self._begun

    def read(self) -> dict[str, float]:
        """`samples_per_second`, `tokens_per_second` and `padding`, a share; and begin anew."""
        samples, tokens, positions = self._counts.tolist()
        seconds, padding = max(self._seconds, 1e-9), 1 - tokens / max(positions, 1)
        self._seconds, self._counts = 0.0, torch.zeros(3, dtype=torch.long)
        return {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": padding,
        }


class GradientAlarm:
    """Notices a gradient far larger than those before it: the first sign of a run that comes apart."""

    def __init__(self, times: float = 10, known: int = 20) -> None:
        self.times, self.known = times, known
        self.said = 0
        self._recent: deque[float] = deque(maxlen=100)

    def check(self, norm: float) -> str | None:
        """A sentence about `norm`, or None where it is nothing unusual (or where ten have been said)."""
        usual = statistics.median(self._recent) if len(self._recent) >= self.known else float("inf")
        self._recent.append(norm)
        if norm <= self.times * usual or self.said == 10:
            return None
        self.said += 1
        last = " (the last time that this is said)" if self.said == 10 else ""
        return f"gradient norm {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}{last}"


class EvalCaptions:
    """The same handful of validation pictures, captioned at every evaluation: the curve of what training is for.

    Args:
        dataset: validation examples.
        number: how many pictures, evenly spread over the records; those that can't be read or have no caption are left out.
        output_dir: captions go to `eval_captions/step-N.jsonl` in it.
    """

    def __init__(self, dataset: CaptionDataset, number: int, output_dir: Path) -> None:
        self.dataset = dataset
        self.folder = output_dir / FOLDER
        self.rows: list[tuple[int, Record]] = []
        self._drawn = False
        count = len(dataset.records)
        number = min(number, count)
        for index in (place * count // number for place in range(number)):
            record = dataset.records[index]
            if record.images and record.responses:
                try:
                    dataset.load_images(record)
                except ImageError:
                    continue  # counted, and reported, when its loss is computed
                self.rows.append((index, record))

    def write(
        self, model: Llava, step: int, callbacks: Sequence[TrainerCallback], show: int = 3
    ) -> float:
        """Caption them, greedily, and write them down; returns CIDEr-D.

        Args:
            callbacks: TensorBoard and Weights & Biases get pictures and captions too.
            show: how many are printed.
        """
        # compiled for training, the layers would be compiled anew for every length that decoding comes by
        with torch.compiler.set_stance("force_eager"):
            texts = [
                text
                for start in range(0, len(self.rows), 16)
                for text in self._say(model, start, start + 16)
            ]
        rows = [
            prediction_row(index, record, text) for (index, record), text in zip(self.rows, texts)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / f"step-{step}.jsonl").write_text(lines, encoding="utf-8")
        for row in rows[:show]:
            tqdm.write(f"  {row['image']}: {row['pred_output']!r}; true: {row['gt_caption']!r}")
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                self._to_tensorboard(callback.tb_writer, rows, step)
            elif isinstance(callback, WandbCallback):
                self._to_wandb(callback._wandb, rows, step)
        samples = [
            Sample(str(index), record.images[0], "", record.responses, (text,))
            for (index, record), text in zip(self.rows, texts)
        ]
        return evaluate(samples, java=False, resamples=0).mean["CIDEr-D"].value

    def _say(self, model: Llava, start: int, end: int) -> list[str]:
        records = [record for _, record in self.rows[start:end]]
        seen: list[torch.Tensor] = []
        for pixels, features in map(self.dataset.load_images, records):
            seen += [] if features is None else [features.to(model.device)]
            seen += [] if pixels is None else [encode_images(model, pixels)]
        prompts = [model.prompt.render(record.turns, None).input_ids for record in records]
        options = GenerationOptions(
            seed=0
        )  # without a seed it would draw from the generator that training draws from
        return [
            text
            for (text,) in generate_from_features(
                model, prompts, torch.cat(seen), options, [b""] * len(records)
            )
        ]

    def _pixels(self, record: Record) -> torch.Tensor:
        pixels = load_record_images(record, self.dataset.image_folder, self.dataset.transform)
        assert pixels is not None
        return pixels[0]

    def _to_tensorboard(self, writer: Any, rows: Sequence[dict[str, Any]], step: int) -> None:
        """Each picture once, and under its name what was said of it at every step."""
        for number, (row, (_, record)) in enumerate(zip(rows, self.rows)):
            name = f"eval_captions/{number:03}_{Path(row['image']).name}"
            if not self._drawn:
                writer.add_image(name, self._pixels(record), step)
            writer.add_text(name, f"{row['pred_output']}\n\ntrue: {row['gt_caption']}", step)
        self._drawn = True

    def _to_wandb(self, wandb: Any, rows: Sequence[dict[str, Any]], step: int) -> None:
        images = [
            wandb.Image(
                self._pixels(record).permute(1, 2, 0).numpy(),
                caption=f"{row['pred_output']} | true: {row['gt_caption']}",
            )
            for row, (_, record) in zip(rows, self.rows)
        ]
        wandb.log({FOLDER: images, "train/global_step": step})
