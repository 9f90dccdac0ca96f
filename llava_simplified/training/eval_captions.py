"""Captions of a few validation images at every evaluation: they show what the loss cannot.

The captions are written to `eval_captions/step-N.jsonl` in the output folder, in the form of
predictions, so that `llava evaluate` reads them. TensorBoard and Weights & Biases receive images
and captions too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from llava_simplified.data.dataset import CaptionDataset, load_record_images
from llava_simplified.data.images import ImageError
from llava_simplified.data.records import Record, prediction_row
from llava_simplified.evaluation.metrics import Sample, evaluate
from llava_simplified.model.generation import encode_images, generate_from_features
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.model.llava import Llava

logger = logging.getLogger(__name__)

FOLDER = "eval_captions"
BATCH_SIZE = 16
LOGGED_CAPTIONS = 3  # per evaluation


class EvalCaptions:
    """Caption the same validation images at every evaluation.

    Args:
        dataset: The validation set.
        count: Number of images, evenly spread over the records. Images that cannot be read and
            records without a response are left out.
        output_dir: Output folder of the run.

    Attributes:
        rows: Index and record of each image.
    """

    def __init__(self, dataset: CaptionDataset, count: int, output_dir: Path) -> None:
        self.dataset = dataset
        self.folder = output_dir / FOLDER
        self.rows: list[tuple[int, Record]] = []
        self._images_logged = False  # to TensorBoard, once per run
        total = len(dataset.records)
        count = min(count, total)
        for position in range(count):
            index = position * total // count
            record = dataset.records[index]
            if not record.images or not record.responses:
                continue
            try:
                dataset.load_images(record)
            except ImageError:
                continue  # reported and counted when its loss is computed
            self.rows.append((index, record))

    def write(self, model: Llava, step: int, callbacks: Sequence[TrainerCallback]) -> float:
        """Caption the images with greedy decoding, and write the captions.

        Args:
            model: The unwrapped model.
            step: Number of the training step.
            callbacks: Callbacks of the trainer; those of TensorBoard and Weights & Biases receive
                the captions.

        Returns:
            CIDEr-D of the captions.
        """
        texts: list[str] = []
        # Layers that are compiled for training would be compiled again for each length that occurs
        # while decoding.
        with torch.compiler.set_stance("force_eager"):
            for start in range(0, len(self.rows), BATCH_SIZE):
                records = [record for _, record in self.rows[start : start + BATCH_SIZE]]
                texts += self._caption(model, records)

        predictions = []
        samples = []
        for (index, record), text in zip(self.rows, texts):
            predictions.append(prediction_row(index, record, text))
            samples.append(Sample(str(index), record.images[0], "", record.responses, (text,)))
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
        (self.folder / f"step-{step}.jsonl").write_text("".join(lines), encoding="utf-8")
        for row in predictions[:LOGGED_CAPTIONS]:
            logger.info(
                "  %s: %r; reference: %r", row["image"], row["pred_output"], row["gt_caption"]
            )
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                self._log_to_tensorboard(callback.tb_writer, predictions, step)
            elif isinstance(callback, WandbCallback):
                self._log_to_wandb(callback._wandb, predictions, step)
        return evaluate(samples, java=False, resamples=0).mean["CIDEr-D"].value

    def _caption(self, model: Llava, records: Sequence[Record]) -> list[str]:
        features = []
        for record in records:
            pixels, cached = self.dataset.load_images(record)
            # Either features or pixels, as the cache of the dataset stores.
            if cached is not None:
                features.append(cached.to(model.device))
            if pixels is not None:
                features.append(encode_images(model, pixels))
        prompts = [model.prompt.render(record.turns, None).input_ids for record in records]
        # Greedy decoding draws nothing. Without a seed it would still touch the generator that
        # training draws from, and the run would differ from one without captions.
        options = GenerationOptions(seed=0)
        # Images are not identified: nothing is shared between prompts.
        image_keys = [b""] * len(records)
        sequences = generate_from_features(model, prompts, torch.cat(features), options, image_keys)
        return [text for (text,) in sequences]

    def _pixels(self, record: Record) -> torch.Tensor:
        """Return the first image of a record as the tower receives it: uint8 (3, height, width)."""
        pixels = load_record_images(record, self.dataset.image_folder, self.dataset.transform)
        assert pixels is not None, "only records with images are captioned"
        return pixels[0]

    def _log_to_tensorboard(
        self, writer: Any, predictions: Sequence[dict[str, Any]], step: int
    ) -> None:
        """Log each image once, and under its name the caption of every evaluation."""
        for number, (row, (_, record)) in enumerate(zip(predictions, self.rows)):
            name = f"{FOLDER}/{number:03}_{Path(row['image']).name}"
            if not self._images_logged:
                writer.add_image(name, self._pixels(record), step)
            writer.add_text(name, f"{row['pred_output']}\n\nreference: {row['gt_caption']}", step)
        self._images_logged = True

    def _log_to_wandb(self, wandb: Any, predictions: Sequence[dict[str, Any]], step: int) -> None:
        images = []
        for row, (_, record) in zip(predictions, self.rows):
            pixels = self._pixels(record).permute(1, 2, 0).numpy()
            caption = f"{row['pred_output']} | reference: {row['gt_caption']}"
            images.append(wandb.Image(pixels, caption=caption))
        wandb.log({FOLDER: images, "train/global_step": step})
