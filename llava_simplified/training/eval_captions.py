"""Caption a few validation images at every evaluation, to show problems that the loss does not show.

The captions are written to `eval_captions/step-N.jsonl` in the output folder, in the format of
prediction files, so that `llava evaluate` can read them. Images and captions are also logged to
TensorBoard and Weights & Biases.
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
LOGGED_CAPTIONS = 3  # number of captions that are logged at each evaluation


class EvalCaptions:
    """Caption the same validation images at every evaluation.

    Args:
        dataset: The validation set.
        count: Number of images, evenly spread over the records. Unreadable images and records without
            a response are skipped.
        output_dir: Output folder of the run.

    Attributes:
        rows: Index and record of each image.
    """

    def __init__(self, dataset: CaptionDataset, count: int, output_dir: Path) -> None:
        self.dataset = dataset
        self.folder = output_dir / FOLDER
        self.rows: list[tuple[int, Record]] = []
        self._images_logged = False  # each image is logged to TensorBoard only once per run
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
                continue  # the evaluation loop will report and count this image
            self.rows.append((index, record))

    def write(self, model: Llava, step: int, callbacks: Sequence[TrainerCallback]) -> float:
        """Caption the images with greedy decoding, and write the captions to files and trackers.

        Args:
            model: The unwrapped model.
            step: Number of the training step.
            callbacks: Callbacks of the trainer. Captions are logged to TensorBoard and Weights & Biases
                if their callbacks are among them.

        Returns:
            CIDEr-D of the captions.
        """
        texts: list[str] = []
        # Do not use compiled layers here: they would be compiled again for each length of the sequence.
        with torch.compiler.set_stance("force_eager"):
            for start in range(0, len(self.rows), BATCH_SIZE):
                records = [record for _, record in self.rows[start : start + BATCH_SIZE]]
                texts += self._caption(model, records)

        predictions = []
        samples = []
        for (index, record), text in zip(self.rows, texts):
            predictions.append(prediction_row(index, record, text))
            sample = Sample(
                index=str(index),
                image=record.images[0],
                instruction="",
                references=record.responses,
                captions=(text,),
            )
            samples.append(sample)
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
        (self.folder / f"step-{step}.jsonl").write_text("".join(lines), encoding="utf-8")
        for prediction in predictions[:LOGGED_CAPTIONS]:
            logger.info(
                "  %s: %r; reference: %r",
                prediction["image"],
                prediction["pred_output"],
                prediction["gt_caption"],
            )
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                self._log_to_tensorboard(callback.tb_writer, predictions, step)
            elif isinstance(callback, WandbCallback):
                self._log_to_wandb(callback._wandb, predictions, step)
        return evaluate(samples, java=False, resamples=0).mean["CIDEr-D"].value

    def _caption(self, model: Llava, records: Sequence[Record]) -> list[str]:
        """Caption records with greedy decoding."""
        features = []
        for record in records:
            pixels, cached = self.dataset.load_images(record)
            # The dataset returns either features or pixels, depending on its cache.
            if cached is not None:
                features.append(cached.to(model.device))
            if pixels is not None:
                features.append(encode_images(model, pixels))
        prompts = [model.prompt.render(record.turns, None).input_ids for record in records]
        # Pass a seed although greedy decoding needs no random numbers. Without one, a seed would be drawn
        # from torch's global generator, and the run would differ from one without captions.
        options = GenerationOptions(seed=0)
        # The hashes only determine random numbers, which greedy decoding does not use.
        hashes = [b""] * len(records)
        sequences = generate_from_features(model, prompts, torch.cat(features), options, hashes)
        return [text for (text,) in sequences]

    def _pixels(self, record: Record) -> torch.Tensor:
        """Return the first image of a record, resized and cropped for the tower: uint8 (3, height, width)."""
        pixels = load_record_images(record, self.dataset.image_folder, self.dataset.transform)
        assert pixels is not None, "only records with images are captioned"
        return pixels[0]

    def _log_to_tensorboard(
        self, writer: Any, predictions: Sequence[dict[str, Any]], step: int
    ) -> None:
        """Log each image once, and the caption of every evaluation under the same name."""
        for number, (prediction, (_, record)) in enumerate(zip(predictions, self.rows)):
            name = f"{FOLDER}/{number:03}_{Path(prediction['image']).name}"
            if not self._images_logged:
                writer.add_image(name, self._pixels(record), step)
            text = f"{prediction['pred_output']}\n\nreference: {prediction['gt_caption']}"
            writer.add_text(name, text, step)
        self._images_logged = True

    def _log_to_wandb(self, wandb: Any, predictions: Sequence[dict[str, Any]], step: int) -> None:
        """Log the images with their captions."""
        images = []
        for prediction, (_, record) in zip(predictions, self.rows):
            pixels = self._pixels(record).permute(1, 2, 0).numpy()
            caption = f"{prediction['pred_output']} | reference: {prediction['gt_caption']}"
            images.append(wandb.Image(pixels, caption=caption))
        wandb.log({FOLDER: images, "train/global_step": step})
