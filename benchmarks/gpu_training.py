"""Section "training" of `bench_gpu.py`: captions per second, FLOP/s and memory, compared with Trainer + PEFT.

Both sides train LoRA adapters and a projector of the same random model with `transformers.Trainer`. They
compute in bfloat16 and have their frozen weights in bfloat16. Decoding images is not measured: our side gets uint8
pixels, as our data pipeline returns them, and stock LLaVA gets normalized float32 pixels, as its processor returns
them. Each side tries batches of decreasing size until one fits into memory.
"""

from __future__ import annotations

import collections
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_machine import Limits
from gpu_models import (
    INSTRUCTION,
    NUM_IMAGES,
    build,
    caption_prompt,
    make_images,
    make_records,
    to_stock,
    write_folders,
)
from gpu_report import Report, Values
from gpu_workload import Shape, Workload
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as StockArguments
from workload import option_arguments

from llava_simplified.arguments import TrainingArguments, parse_arguments
from llava_simplified.data.collate import Collator
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.model.llava import Llava
from llava_simplified.prompt import IGNORE_INDEX, IMAGE_INDEX

WARM_UP_STEPS = 1
LORA_RANK, LORA_ALPHA = 16, 32


def run(workload: Workload, report: Report) -> None:
    """Run the section."""
    limits = Limits.measure(workload)
    report.add("limits", **limits.as_values())
    results: dict[str, Values | None] = {}
    # Name, captions per image, gradient checkpointing, and the batch sizes (in images) to try.
    sides: list[tuple[str, int, bool, list[int]]] = [
        ("1 caption", 1, False, workload.pick([64, 32, 16, 8], [2])),
        ("5 captions", 5, False, workload.pick([16, 8, 4], [2])),
        ("1 caption, checkpointing", 1, True, workload.pick([64, 32, 16], [2])),
        ("5 captions, checkpointing", 5, True, workload.pick([16, 8], [2])),
    ]
    for name, captions, checkpointing, batches in sides:
        measure = partial(
            measure_ours, workload, limits, captions, batches, gradient_checkpointing=checkpointing
        )
        results[name] = report.attempt(f"ours, {name}", measure, seconds=workload.pick(8, 0))
    for checkpointing, batches in (
        (False, workload.pick([48, 32, 16, 8], [2])),
        (True, workload.pick([128, 64, 32], [2])),
    ):
        name = "stock, checkpointing" if checkpointing else "stock"
        measure = partial(measure_stock, workload, batches, checkpointing)
        results[name] = report.attempt(f"{name}, Trainer + PEFT", measure, workload.pick(10, 0))
    add_ratios(report, results)
    # More measurements of our side.
    report.attempt("forecast of `llava plan`", partial(compare_plan, workload, results))
    report.attempt("synchronizations in a step", partial(count_synchronizations, workload))
    report.attempt("full fine-tuning, 1B", partial(measure_full, workload, limits), 12)
    if workload.is_tiny:
        return  # the remaining measurements require a GPU, or compile for a minute
    # Compiled layers need a little more memory, so do not try the largest batch of the first measurement.
    _, _, _, first_batches = sides[0]
    batches = first_batches[1:]
    compiled = partial(measure_ours, workload, limits, 1, batches, compile_layers=True)
    report.attempt("ours, 1 caption, compiled layers", compiled, 30)
    if find_spec("bitsandbytes"):
        report.attempt("QLoRA, 1 caption", partial(measure_qlora, workload, limits), 20)


def add_ratios(report: Report, results: dict[str, Values | None]) -> None:
    """Write our speed / stock's speed. Each side is compared by its faster run, with checkpointing or without."""
    stock = [results["stock"], results["stock, checkpointing"]]
    rates = [values["captions/s"] for values in stock if values]
    if not rates:
        return
    # Stock LLaVA trains each caption as a separate sequence. With five captions, its captions/s stay the same.
    for captions in ("1 caption", "5 captions"):
        ours = [results[captions], results[f"{captions}, checkpointing"]]
        own_rates = [values["captions/s"] for values in ours if values]
        if own_rates:
            report.add(f"ours / stock, {captions}", ratio=max(own_rates) / max(rates))


# ---- our side ----


def make_arguments(folder: str, workload: Workload, **options: Any) -> TrainingArguments:
    """Return our training arguments, with the options that all runs share."""
    values = {
        "output_dir": folder,
        "max_steps": WARM_UP_STEPS + measured_steps(workload),
        "bf16": workload.dtype == torch.bfloat16,
        "save_strategy": "no",
        "logging_steps": 100,
        "disable_tqdm": True,
        "report_to": "none",
        "train_sampling_strategy": "sequential",  # the same batches in every run
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        **options,
    }
    _, _, args = parse_arguments(option_arguments(values))
    return args


def build_adapted(workload: Workload, text: Shape, **options: Any) -> Llava:
    """Build a model with LoRA adapters, ready for training."""
    from llava_simplified.model.config import TrainedParts
    from llava_simplified.model.lora import add_lora, freeze

    model = build(workload, text, **options)
    freeze(model, TrainedParts("adapter"))
    with torch.device(workload.device):
        add_lora(model, LORA_RANK, LORA_ALPHA)
    return model


def build_our_trainer(
    workload: Workload, model: Llava, args: TrainingArguments, captions: int, parts: str
) -> Any:
    """Return a `LlavaTrainer` on random records, whose images are in memory."""
    from llava_simplified.model.config import LlavaConfig, TrainedParts
    from llava_simplified.training.trainer import LlavaTrainer

    if args.compile_layers:
        from llava_simplified.training.kernels import compile_layers

        compile_layers(model.language_model)
    rows = args.per_device_train_batch_size * args.max_steps
    dataset = CaptionDataset(
        make_records(rows, captions),
        model.prompt,
        image_folder="",
        transform=model.vision_tower.transform,
        features=make_images(workload),
    )
    # Saving a checkpoint reads the config and the tokenizer from these folders.
    folders = write_folders(Path(str(args.output_dir)) / "models", workload, workload.large)
    return LlavaTrainer(
        model,
        args,
        LlavaConfig(*folders, mm_projector_type="mlp2x_gelu"),
        TrainedParts(parts),  # type: ignore[arg-type]
        settings={},
        max_bad_images=1.0,
        train_dataset=dataset,
        eval_dataset=None,
        data_collator=Collator(model.vision_tower.num_tokens, model.prompt.end_id),
    )


def measure_ours(
    workload: Workload,
    limits: Limits,
    captions: int,
    batches: Sequence[int],
    build_model: Callable[[], Llava] | None = None,
    parts: str = "adapter",
    **options: Any,
) -> Values:
    """Train a few steps with the largest batch that fits into memory.

    Args:
        workload: The device and the shapes.
        limits: The limits of the device.
        captions: Captions per image.
        batches: Batch sizes to try in images, the largest first.
        build_model: Function that builds the model; by default one with LoRA adapters.
        parts: "adapter", or "full" if all weights of the language model are trained.
        **options: Other training options.
    """

    def train(batch: int) -> Values:
        if build_model is not None:
            model = build_model()
        else:
            model = build_adapted(workload, workload.large)
        with tempfile.TemporaryDirectory() as folder:
            args = make_arguments(folder, workload, per_device_train_batch_size=batch, **options)
            trainer = build_our_trainer(workload, model, args, captions, parts)
            values = time_steps(workload, trainer, batch * captions)
        flops = step_flops(model, batch, captions, adapted=parts == "adapter")
        rate = flops / values["seconds"]
        return {
            "images": batch,
            **values,
            "TFLOP/s": rate / 1e12,
            "share of matmul": rate / limits.flops,
        }

    return with_largest_batch(batches, train)


def measure_full(workload: Workload, limits: Limits) -> Values:
    """Train all weights of a language model of 1B parameters."""
    from llava_simplified.model.config import TrainedParts
    from llava_simplified.model.lora import freeze

    def build_full() -> Llava:
        model = build(workload, workload.medium)
        freeze(model, TrainedParts("full"))
        return model

    batches = workload.pick([32, 16, 8], [2])
    return measure_ours(
        workload,
        limits,
        captions=1,
        batches=batches,
        build_model=build_full,
        parts="full",
    )


def measure_qlora(workload: Workload, limits: Limits) -> Values:
    """Train adapters of a model whose weights are quantized to 4 bits."""
    from bitsandbytes.nn import Linear4bit

    def build_quantized() -> Llava:
        from llava_simplified.model.config import TrainedParts
        from llava_simplified.model.lora import add_lora, find_linear_modules, freeze

        model = build(workload, workload.large)
        lm: Any = model.language_model
        for name in find_linear_modules(lm):
            linear = lm.get_submodule(name)
            quantized = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            # bitsandbytes quantizes the weight when it is moved to the device, below.
            quantized.load_state_dict({"weight": linear.weight.data.cpu()})
            lm.set_submodule(name, quantized.to(workload.device))
        freeze(model, TrainedParts("adapter"))
        with torch.device(workload.device):
            add_lora(model, LORA_RANK, LORA_ALPHA)
        return model

    return measure_ours(
        workload,
        limits,
        captions=1,
        batches=[32, 16],
        build_model=build_quantized,
    )


# ---- stock ----


def measure_stock(workload: Workload, batches: Sequence[int], checkpointing: bool) -> Values:
    """Train stock LLaVA with Trainer and PEFT, with the largest batch that fits."""
    from peft import LoraConfig, get_peft_model

    images = make_images(workload)
    # A small model is enough for its image transform and its tokenizer.
    template = build(workload, workload.small)
    transform = template.vision_tower.transform
    normalized = {name: transform.normalize(pixels) for name, pixels in images.items()}
    prompt = caption_prompt(template)

    def train(batch: int) -> Values:
        model = build(workload, workload.large)
        stock = to_stock(model)
        image_token = stock.config.image_token_id
        config = LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            modules_to_save=["multi_modal_projector"],
        )
        adapted: Any = get_peft_model(stock, config)
        # Keep the trained weights in float32, as our side does.
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # Gradient checkpointing requires that the input of a layer has a gradient. The embeddings are frozen.
        if checkpointing:
            adapted.enable_input_require_grads()
        samples = stock_samples(model, prompt, image_token, batch * 8)
        with tempfile.TemporaryDirectory() as folder:
            args = StockArguments(
                output_dir=folder,
                max_steps=WARM_UP_STEPS + measured_steps(workload),
                per_device_train_batch_size=batch,
                remove_unused_columns=False,
                use_cpu=workload.device.type == "cpu",
                bf16=workload.dtype == torch.bfloat16,
                gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                save_strategy="no",
                logging_steps=100,
                disable_tqdm=True,
                report_to="none",
            )
            collator = partial(collate_stock, normalized=normalized)
            trainer = Trainer(adapted, args, train_dataset=samples, data_collator=collator)
            return {"images": batch, **time_steps(workload, trainer, batch)}

    return with_largest_batch(batches, train)


def stock_samples(model: Llava, prompt: list[int], image_token: int, count: int) -> Any:
    """Return token ids and labels of single captions, with one placeholder for each image token."""
    position = prompt.index(IMAGE_INDEX)
    image = [image_token] * model.vision_tower.num_tokens
    expanded = prompt[:position] + image + prompt[position + 1 :]
    samples = []
    for record in make_records(count, captions=1):
        _, (answer,) = model.prompt.render_branches(record.turns, record.responses)
        samples.append(
            {
                "image": record.images[0],
                "input_ids": expanded + answer,
                "labels": [IGNORE_INDEX] * len(expanded) + answer,
            }
        )
    return samples


def collate_stock(
    rows: list[dict[str, Any]], normalized: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a batch that is padded on the right, as LLaVA's processor and collator do."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[Any]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        padding = longest - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [1] * padding)
        batch["labels"].append(row["labels"] + [IGNORE_INDEX] * padding)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * padding)
    tensors = {name: torch.tensor(values) for name, values in batch.items()}
    tensors["pixel_values"] = torch.stack([normalized[row["image"]] for row in rows])
    return tensors


# ---- measuring ----


def measured_steps(workload: Workload) -> int:
    """Return the number of measured steps, which follow `WARM_UP_STEPS`."""
    return workload.pick(3, 1)


def with_largest_batch(batches: Sequence[int], train: Callable[[int], Values]) -> Values:
    """Return what `train` returns for the first batch size that fits into memory.

    Raises:
        torch.OutOfMemoryError: Even the last batch size does not fit.
    """
    from gpu_report import free_memory

    for batch in batches[:-1]:
        try:
            return train(batch)
        except torch.OutOfMemoryError:
            pass
        # Free the memory outside the handler. Within it, the exception still exists, and its frames refer to tensors.
        free_memory()
    return train(batches[-1])


class StepClock(TrainerCallback):
    """Measures the mean seconds of the steps after the warm-up."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._start = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP_STEPS:
            self._workload.synchronize()
            self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps:
            self._workload.synchronize()
            elapsed = time.perf_counter() - self._start
            self.seconds = elapsed / measured_steps(self._workload)


def time_steps(workload: Workload, trainer: Any, captions: int) -> Values:
    """Train, and return captions per second, seconds per step and peak memory."""
    clock = StepClock(workload)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    if workload.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return {
        "captions/s": captions / clock.seconds,
        "seconds": clock.seconds,
        "memory": workload.peak_memory(),
    }


def step_flops(model: Llava, images: int, captions: int, adapted: bool) -> float:
    """Return the FLOPs that a step needs, with shared prompts and logits at trained positions only.

    A weight costs two FLOPs per position (multiply, add) in each of these passes:

        forward                  all weights
        gradient of the input    all weights but those of the frozen tower
        gradient of the weight   trained weights

    The recomputation of gradient checkpointing is not counted. Only the half of the attention matrix below the diagonal
    is counted, because a token attends to earlier tokens only.

    Args:
        model: The model.
        images: Images per step.
        captions: Captions per image.
        adapted: Whether LoRA adapters are trained, and not all weights of the language model.
    """
    language_model: Any = model.language_model
    config = language_model.config
    adapter = frozen = 0
    head = language_model.get_output_embeddings().weight
    embedding = language_model.get_input_embeddings().weight
    for name, parameter in language_model.named_parameters():
        if "lora_" in name:
            adapter += parameter.numel()
        elif parameter is not head and parameter is not embedding:
            frozen += parameter.numel()
    tower = sum(parameter.numel() for parameter in model.vision_tower.parameters())
    patches = model.vision_tower.num_tokens
    prefix = len(caption_prompt(model)) - 1 + patches

    # Count trained positions, and pairs (query, key) of positions. The records repeat after `NUM_IMAGES`, so count that
    # many, and scale the sums to the images of a step.
    trained = attended = 0.0
    for record in make_records(NUM_IMAGES, captions):
        attended += prefix**2 / 2
        for response in record.responses:
            length = len(response) + 1
            trained += length
            attended += length * (prefix + length / 2)
    trained, attended = trained * images / NUM_IMAGES, attended * images / NUM_IMAGES
    positions = images * prefix + trained
    # FLOPs per weight and position: 2 for forward, 2 for the gradient of the input, and 2 for the gradient of a trained
    # weight.
    passes = 4 if adapted else 6
    layers = positions * (passes * frozen + 6 * adapter)
    # Attention has two products (scores, and weighted sums of values), each with one pass in forward and two in
    # backward. A product costs two FLOPs, so the factor is 2 * 3 * 2.
    attention = 12 * attended * config.hidden_size * config.num_hidden_layers
    # The lm_head is computed at trained positions only, and the frozen tower only forward.
    return layers + attention + passes * trained * head.numel() + 2 * images * patches * tower


# ---- the forecast, and synchronizations ----


def compare_plan(workload: Workload, results: dict[str, Values | None]) -> Values:
    """Compare the memory that `llava plan` forecasts with the measured peak."""
    import json

    from llava_simplified.training.plan import make_plan

    comparison: Values = {}
    sides = [("1 caption", 1, False), ("5 captions, checkpointing", 5, True)]
    for name, captions, checkpointing in workload.pick(sides, sides[1:]):
        measured = results.get(name)
        if measured is None:
            continue  # even the smallest batch did not fit
        with tempfile.TemporaryDirectory() as folder:
            models = write_folders(Path(folder), workload, workload.large)
            # Write the data of two steps. The plan does not open the images.
            rows = []
            for record in make_records(measured["images"] * 2, captions):
                instruction = f"<image>{INSTRUCTION}"
                row = {"image": "0", "instruction": instruction, "responses": record.responses}
                rows.append(row)
            data = Path(folder) / "train.json"
            data.write_text(json.dumps(rows))
            language_model, tower = models
            options = {
                "model_name_or_path": language_model,
                "vision_tower": tower,
                "train_data_path": data,
                "output_dir": f"{folder}/out",
                "mm_projector_type": "mlp2x_gelu",
                "cache_vision_features": "off",
                "lora_r": LORA_RANK,
                "lora_alpha": LORA_ALPHA,
                "per_device_train_batch_size": measured["images"],
                "gradient_checkpointing": checkpointing,
                "report_to": "none",
                "bf16": workload.dtype == torch.bfloat16,
            }
            plan = make_plan(*parse_arguments(option_arguments(options)))
        comparison[f"forecast, {name}"] = round(plan.peak)
        comparison[f"measured, {name}"] = measured["memory"]
        if measured["memory"]:
            comparison[f"ratio, {name}"] = plan.peak / measured["memory"]
    return comparison


@contextmanager
def recorded_synchronizations() -> Iterator[list[str]]:
    """Yield a list. When the `with` block has ended, the list contains the lines of code that have waited for the GPU."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing" in str(warning.message):
            places.append(f"{Path(warning.filename).name}:{warning.lineno}")


def count_synchronizations(workload: Workload) -> Values:
    """Count how often, and where, Python waits for the GPU in a training step."""
    if workload.device.type != "cuda":
        return {"skipped": "there are none on a CPU"}
    model = build_adapted(workload, workload.small)
    places: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        args = make_arguments(folder, workload, per_device_train_batch_size=2)
        trainer = build_our_trainer(workload, model, args, captions=5, parts="adapter")
        step = trainer.training_step

        def training_step(model: nn.Module, *rest: Any) -> torch.Tensor:
            with recorded_synchronizations() as found:
                loss = step(model, *rest)
            # Do not count the warm-up, in which kernels are loaded and memory is allocated.
            if trainer.state.global_step >= WARM_UP_STEPS:
                places.extend(found)
            return loss

        trainer.training_step = training_step
        trainer.train()
    counts = collections.Counter(places)
    return {"per step": len(places) / measured_steps(workload), "places": dict(counts)}
