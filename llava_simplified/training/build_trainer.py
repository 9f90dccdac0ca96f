"""From options to a trainer that stands before its first step: options checked, data opened, model built, its parts frozen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import IntervalStrategy

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments, describe
from llava_simplified.data.collate import Collator
from llava_simplified.data.dataset import CaptionDataset, open_data
from llava_simplified.data.images import ImageError
from llava_simplified.data.packing import PackedDataset
from llava_simplified.data.records import Record
from llava_simplified.model.build import build_model, load_tokenizer
from llava_simplified.model.checkpoint import load_projector, load_trained_weights
from llava_simplified.model.config import LlavaConfig, read_checkpoint_config
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, add_tower_lora, check_trainable, freeze
from llava_simplified.model.projector import init_projector_scale
from llava_simplified.model.weights import check_weights_digest, weights_digest
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Prompt
from llava_simplified.training.feature_cache import cache_features
from llava_simplified.training.kernels import (
    check_kernels,
    choose_attention,
    compile_layers,
    use_liger_kernels,
)
from llava_simplified.training.model_config import model_config, trained_parts
from llava_simplified.training.resume import check_same_run, resume_folder
from llava_simplified.training.trainer import LlavaTrainer


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[LlavaTrainer, Path | None]:
    """All that a run needs before its first step: the trainer, and the checkpoint that it goes on from, if any."""
    transformers.set_seed(args.seed)
    check_options(model_args, data_args, args)
    train_records, train_folder = open_data(
        str(data_args.train_data_path), data_args.train_image_folder, "--train_image_folder"
    )
    eval_records, eval_folder = (
        open_data(data_args.eval_data_path, data_args.val_image_folder, "--val_image_folder")
        if data_args.eval_data_path
        else (None, "")
    )
    architecture = describe_config(model_args, args, train_records)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    Prompt(
        tokenizer, model_args.template
    )  # a template that does not fit fails here, before 14 GB are loaded
    settings = {**describe(model_args, data_args, args), "processes": args.world_size}
    resumed = resume_folder(args)
    for difference in check_same_run(resumed, architecture, settings) if resumed else ():
        print(f"resuming {resumed}: {difference}", file=sys.stderr)
    Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)

    model = build_model(
        architecture, tokenizer=tokenizer, attn_implementation=model_args.attn_implementation
    )
    choose_attention(model.language_model, model_args.attn_implementation, args.device.type)
    if args.use_liger_kernel:
        use_liger_kernels(model.language_model)

    def dataset(records: Sequence[Record], folder: str) -> CaptionDataset:
        shared, transform = data_args.share_prefix, model.vision_tower.transform
        return CaptionDataset(
            records, model.prompt, folder, transform, args.model_max_length, shared
        )

    train_set = dataset(train_records, train_folder)
    eval_set = dataset(eval_records, eval_folder) if eval_records else None
    prepare(model, model_args)
    sets = [train_set] if eval_set is None else [train_set, eval_set]
    cache_features(
        model.vision_tower, data_args, args, architecture.weights_digests["vision_tower"], sets
    )
    start_trained_parts(model, model_args, train_set, resumed)
    parts = trained_parts(model_args)
    table = check_trainable(model, parts)
    examples: Any = train_set
    if data_args.packing:
        examples = PackedDataset(
            train_set, model.vision_tower.num_tokens, data_args.pack_length, args.seed
        )
    if args.compile_layers:
        compile_layers(model.language_model)
    trainer = LlavaTrainer(
        model,
        args,
        architecture,
        parts,
        settings,
        data_args.max_bad_images,
        train_dataset=examples,
        eval_dataset=eval_set,
        data_collator=Collator(
            model.vision_tower.num_tokens, model.prompt.end_id, dummy_image_batch(model, train_set)
        ),
    )
    packs = (
        f" in {len(examples):,} packs, {examples.fill_ratio:.1%} full" if data_args.packing else ""
    )
    if args.world_size > 1:
        packs += f", {args.world_size} processes, {trainer.accelerator.distributed_type.value}"
    trainer.accelerator.print(
        f"{table}\n{len(train_set):,} training examples{packs}, template {model.prompt.name}"
    )
    return trainer, resumed


def check_options(model: ModelArguments, data: DataArguments, args: TrainingArguments) -> None:
    """Raise ValueError for options that can't go together, or not here."""
    if not data.train_data_path:
        raise ValueError("--train_data_path is needed: a .json, .jsonl or .parquet file of records")
    if args.eval_strategy != "no" and not data.eval_data_path:
        raise ValueError(
            f"--eval_strategy {IntervalStrategy(args.eval_strategy).value} needs --eval_data_path; or --eval_strategy no"
        )
    if (metric := args.metric_for_best_model) is not None:
        if metric.removeprefix("eval_") not in ("loss", "perplexity", "cider"):
            raise ValueError(f"--metric_for_best_model is eval_loss or cider, not {metric!r}")
        if args.eval_strategy == "no":
            raise ValueError(
                "the best checkpoint is known by evaluations: --eval_strategy steps --eval_data_path ..."
            )
    if args.label_smoothing_factor or args.neftune_noise_alpha:
        raise ValueError(
            "--label_smoothing_factor and --neftune_noise_alpha: this loss has neither"
        )
    if model.tune_vision_tower not in ("off", "full", "lora"):
        raise ValueError(
            f"--tune_vision_tower is off, full or lora, not {model.tune_vision_tower!r}"
        )
    if model.tune_vision_tower != "off" and data.cache_vision_features in ("memory", "disk"):
        raise ValueError(
            "--tune_vision_tower changes the features with every step: --cache_vision_features pixels, auto or off"
        )
    if "wandb" in args.report_to and find_spec("wandb") is None:
        raise ValueError("--report_to wandb: it is not installed: pip install wandb")
    if model.init_from and model.pretrain_mm_mlp_adapter:
        raise ValueError(
            "--init_from brings a projector along: leave --pretrain_mm_mlp_adapter away"
        )
    if origin := model.init_from or model.pretrain_mm_mlp_adapter:
        check_origin(model, origin)
    check_kernels(model, data, args)


def check_origin(model: ModelArguments, folder: str) -> None:
    """Raise ValueError where what a checkpoint trained would meet features or weights that it never saw."""
    manifest = read_checkpoint_config(folder)
    before = manifest["architecture"]
    layers = before["mm_vision_select_layer"]
    if model.mm_vision_select_layer != (layers if isinstance(layers, list) else [layers]):
        raise ValueError(
            f"{folder}: its projector was trained with --mm_vision_select_layer {layers}"
        )
    parts = [("vision_tower", model.vision_tower), ("language_model", model.model_name_or_path)]
    for part, name in parts if model.init_from and manifest["trained"] == "adapter" else parts[:1]:
        inside = (
            Path(name).resolve().parent == Path(folder).resolve()
        )  # the checkpoint's own, trained or merged
        if not inside and (digest := before["weights_digests"].get(part)):
            check_weights_digest(part, name, digest)


def describe_config(
    model: ModelArguments, args: TrainingArguments, records: Sequence[Record]
) -> LlavaConfig:
    """What the checkpoint will say of the model's parts."""
    sample = next((record for record in islice(records, 1000) if record.images), records[0])
    question = next(turn.content for turn in sample.turns if turn.role == "user")
    digests = {}
    for part, option in (
        ("language_model", "model_name_or_path"),
        ("vision_tower", "vision_tower"),
    ):
        try:
            digests[part] = weights_digest(name := getattr(model, option))
        except OSError as error:
            raise ValueError(f"--{option} {name}: {error}") from error
    return replace(
        model_config(model, args.frozen_dtype),
        instruction=question.removeprefix(f"{IMAGE_PLACEHOLDER}\n" * len(sample.images)),
        weights_digests=digests,
    )


def prepare(model: Llava, args: ModelArguments) -> None:
    """Freeze what is frozen, adapt what is adapted."""
    parts = trained_parts(args)
    freeze(model, parts)
    if parts.vision_tower == "lora":
        add_tower_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout)
    if parts.language_model == "adapter":
        add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_bias)


def start_trained_parts(
    model: Llava, args: ModelArguments, train_set: CaptionDataset, resumed: Path | None = None
) -> None:
    """Where training starts: from a checkpoint, this run's or another's, or afresh.

    Raises:
        ValueError: `--init_from` names a checkpoint that trained something else.
    """
    if resumed:
        load_trained_weights(model, resumed)
    elif args.init_from:
        manifest = read_checkpoint_config(args.init_from)
        before, tower = manifest["trained"], manifest["trained_tower"]
        now, now_tower = trained_parts(args).stored.values()
        start = Path(args.init_from) / "vision_tower"
        if tower not in ("off", now_tower) and Path(args.vision_tower).resolve() != start.resolve():
            raise ValueError(
                f"--init_from {args.init_from}: its vision tower was trained too: --tune_vision_tower {tower}, or "
                f"--vision_tower {start} to go on with it frozen"
                + " (`llava merge` writes it)"
                * (tower == "lora")
            )
        own = (
            Path(args.init_from) / "language_model"
        )  # an adapter may be put on what was trained whole
        on_it = (
            before == "language_model" and Path(args.model_name_or_path).resolve() == own.resolve()
        )
        if before not in (now, "projector") and not on_it:
            raise ValueError(
                f"{args.init_from}: trained its {before}, this run trains the {now}; `llava merge`, or start at {own}"
            )
        load_trained_weights(model, args.init_from)
    elif args.pretrain_mm_mlp_adapter:
        load_projector(model.projector, args.pretrain_mm_mlp_adapter)
    else:
        _fit_projector(model, train_set)


def dummy_image_batch(model: Llava, train_set: CaptionDataset) -> dict[str, torch.Tensor]:
    """An image of nothing, in the form that the images of the batches have."""
    if train_set.features is None:
        return {
            "pixel_values": torch.zeros(1, 3, *model.vision_tower.transform.crop, dtype=torch.uint8)
        }
    blank = train_set.features.dummy_image[None]
    return {"pixel_values" if blank.dtype == torch.uint8 else "image_features": blank}


@torch.no_grad()
def _fit_projector(model: Llava, train_set: CaptionDataset) -> None:
    """Scale the fresh projector on the features of some training images, evenly spread and so always the same."""
    wanted = 64 if train_set.features is None else 1024  # stored ones cost nothing
    features = []
    for index in range(0, len(train_set.records), max(len(train_set.records) // wanted, 1)):
        try:
            pixels, stored = train_set.load_images(train_set.records[index])
        except ImageError:
            continue  # counted, and reported, when training meets it
        if stored is None and pixels is not None:
            stored = model.vision_tower(pixels.to(next(model.vision_tower.parameters()).device))
        features += [] if stored is None else [stored.cpu()]
    if features:
        embed: Any = model.language_model.get_input_embeddings()
        # through the module: Gemma's multiplies the table by a constant
        words = embed(torch.arange(0, embed.num_embeddings, 7, device=embed.weight.device))
        init_projector_scale(model.projector, torch.cat(features).to(words.device), words)
