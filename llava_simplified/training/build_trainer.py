"""Build the trainer of a run from its options."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers.trainer_utils import IntervalStrategy

from llava_simplified.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_simplified.data.collate import Collator
from llava_simplified.data.dataset import CaptionDataset, drop_bad_records
from llava_simplified.data.images import ImageError
from llava_simplified.data.open_data import open_data
from llava_simplified.data.packing import PackedDataset
from llava_simplified.data.records import Record, Records
from llava_simplified.extras import install_command
from llava_simplified.model.build import (
    build_model,
    check_vocabulary,
    find_language_model_config,
    load_tokenizer,
)
from llava_simplified.model.checkpoint import load_projector, load_trained_weights
from llava_simplified.model.config import (
    DEFAULT_INSTRUCTION,
    LlavaConfig,
    TrainedParts,
    read_checkpoint_config,
)
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora import add_lora, add_tower_lora, check_trainable, freeze
from llava_simplified.model.lora_options import parse_lora_options, pissa_method
from llava_simplified.model.pissa import initialize as initialize_pissa
from llava_simplified.model.projector import init_projector_scale
from llava_simplified.model.weights import check_weights_digest, weights_digest
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Prompt
from llava_simplified.training.cider_reward import FREQUENCIES_FILE
from llava_simplified.training.encode import cache_features, check_cache_mode
from llava_simplified.training.kernels import (
    check_kernels,
    choose_attention,
    compile_layers,
    use_liger_kernels,
)
from llava_simplified.training.model_config import model_config, trained_parts
from llava_simplified.training.policy_trainer import PolicyTrainer, kl_coefficient
from llava_simplified.training.preference_pairs import (
    PairCollator,
    PairDataset,
    record_problem,
)
from llava_simplified.training.preference_trainer import PreferenceTrainer
from llava_simplified.training.reference_weights import ReferenceWeights
from llava_simplified.training.resume import check_same_run, find_resume_folder, run_settings
from llava_simplified.training.rewards import (
    Reward,
    RewardOptions,
    check_reward_options,
    parse_rewards,
)
from llava_simplified.training.rollouts import PromptCollator, PromptDataset
from llava_simplified.training.trainer import LlavaTrainer, TrainingSet

logger = logging.getLogger(__name__)

# Number of images whose features determine the scale of a new projector. The vision tower needs about a
# second for 64 images. Cached features cost nothing, so more of them are used.
_SCALING_IMAGES = 64
_SCALING_CACHED_IMAGES = 1024
# Number of records that are searched for an instruction that is used with images.
_MAX_SEARCHED_RECORDS = 1000

OBJECTIVES = ("sft", "scst", "rloo", "grpo", "dpo")
# The dataset class by objective. The other objectives sample captions and use `PromptDataset`.
DATASETS: dict[str, type[CaptionDataset]] = {"sft": CaptionDataset, "dpo": PairDataset}


# The order of the steps below:
#
#     options     check everything that can be checked without loading anything
#     data        open the training and validation records
#     config      build the model config, which every checkpoint contains
#     model       load the pretrained parts; freeze them or add adapters
#     features    run the frozen vision tower over all images, if that saves time (see `encode`)
#     weights     load a checkpoint (resumed run, --init_from, --pretrain_mm_mlp_adapter), or
#                 initialize the projector
#     trainer     datasets, collator, and the table of trained parameters
#
# Errors are raised as early as possible: a misspelled folder should be reported before a model of
# 14 GB is loaded.


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[LlavaTrainer, Path | None]:
    """Build the trainer of a run.

    Returns:
        The trainer, and the checkpoint from which the run is resumed, or None.

    Raises:
        ValueError: The options are invalid, contradict each other, or do not match the data, the
            model or the checkpoint.
    """
    _use_one_gpu(args)
    # Set the seed first: the weights of new adapters and projectors are random.
    transformers.set_seed(args.seed)
    check_options(model_args, data_args, args)
    resumed = find_resume_folder(args)
    train_records, train_folder = open_data(
        str(data_args.train_data_path),
        data_args.train_image_folder,
        "--train_image_folder",
        # Pairs that cannot be used, such as those with an empty answer, are left out below.
        require_responses=args.objective != "dpo",
        max_bad_records=data_args.max_bad_records,
    )
    eval_records: Records | None = None
    eval_folder = ""
    if data_args.eval_data_path:
        eval_records, eval_folder = open_data(
            data_args.eval_data_path,
            data_args.val_image_folder,
            "--val_image_folder",
            max_bad_records=data_args.max_bad_records,
        )
    config = build_config(model_args, args, train_records)
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, trust_remote_code=model_args.trust_remote_code
    )
    # Create a prompt only to check the chat template before the model is loaded.
    prompt = Prompt(tokenizer, model_args.template)
    language_model = model_args.model_name_or_path
    check_vocabulary(prompt, find_language_model_config(language_model), language_model)
    train_records = drop_bad_records(
        train_records,
        data_args.max_bad_records,
        prompt,
        args.model_max_length,
        record_problem(args.objective),
    )
    if eval_records:
        eval_records = drop_bad_records(
            eval_records, data_args.max_bad_records, prompt, args.model_max_length
        )

    settings = run_settings(model_args, data_args, args)
    if resumed:
        for difference in check_same_run(resumed, config, settings):
            logger.warning("resuming %s: %s", resumed, difference)
    Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)

    # Replace kernels before adding LoRA: LoRA wraps the layers, and Liger expects the original ones.
    attention = model_args.attn_implementation
    model = build_model(
        config,
        tokenizer=tokenizer,
        attn_implementation=attention,
        trust_remote_code=model_args.trust_remote_code,
    )
    choose_attention(model.language_model, attention, args.device.type)
    if args.use_liger_kernel:
        use_liger_kernels(model.language_model)
    parts = trained_parts(model_args)
    set_trainable(model, model_args, parts)

    train_set = build_dataset(model, train_records, train_folder, data_args, args, args.objective)
    eval_set = None
    datasets = [train_set]
    if eval_records:
        # Validation computes the supervised loss of the responses, whatever the objective is.
        eval_set = build_dataset(model, eval_records, eval_folder, data_args, args, "sft")
        datasets.append(eval_set)
    digest = config.weights_digests["vision_tower"]
    # Cache features only now that the trained parts are set: features of a trained tower cannot be cached.
    cache_features(model.vision_tower, data_args, args, digest, datasets)
    reference = None
    if args.objective == "dpo" or (args.objective != "sft" and kl_coefficient(args) > 0):
        # The reference is the model at the start of the run. If the run is resumed, copy these weights before
        # the weights of the checkpoint are loaded below.
        initialize_trained_parts(model, model_args, parts, train_set)
        reference = ReferenceWeights(model)
    if reference is None or resumed:
        initialize_trained_parts(model, model_args, parts, train_set, resumed)
    table = check_trainable(model, parts)

    examples: TrainingSet = train_set
    if data_args.packing:
        tokens_per_image = model.vision_tower.num_tokens
        examples = PackedDataset(train_set, tokens_per_image, data_args.pack_length, args.seed)
    _check_full_batches(args, len(examples))
    # Compile the layers before the trainer is created: DDP, FSDP or DeepSpeed wrap the model there.
    if args.compile_layers:
        compile_layers(model.language_model)
    options: dict[str, Any] = {
        "model": model,
        "args": args,
        "config": config,
        "parts": parts,
        "settings": settings,
        "max_bad_images": data_args.max_bad_images,
        "train_dataset": examples,
        "eval_dataset": eval_set,
        "data_collator": _create_collator(model, train_set, args.objective, data_args.share_prefix),
    }
    trainer = _create_trainer(options, train_records, reference, data_args.share_prefix)
    if trainer.accelerator.is_local_main_process:
        logger.info("%s\n%s", table, _describe_data(trainer, train_set, examples, model.prompt))
    return trainer, resumed


def _use_one_gpu(args: TrainingArguments) -> None:
    """Train on one GPU, if a single process was started on a machine that has several."""
    if args.n_gpu <= 1:
        return
    logger.warning(
        "This machine has %d GPUs, but a process trains on one of them. To use all: torchrun --nproc_per_node %d -m "
        "llava_simplified train, with the same options.",
        args.n_gpu,
        args.n_gpu,
    )
    # Otherwise, the trainer would use `nn.DataParallel`. It splits every tensor of a batch in as many parts as there are
    # GPUs, but `logit_positions` and `image_positions` are indices into the whole batch.
    args._n_gpu = 1


def _check_full_batches(args: TrainingArguments, num_rows: int) -> None:
    """Raise ValueError if `--dataloader_drop_last` would leave out all examples, because they do not fill a batch.

    Args:
        args: Training options.
        num_rows: Number of examples, or of packs.
    """
    # With `split_batches`, the processes share a batch of the given size.
    is_split = cast(Any, args.accelerator_config).split_batches
    batch_size = args.train_batch_size * (1 if is_split else args.world_size)
    if args.dataloader_drop_last and num_rows < batch_size:
        raise ValueError(
            f"--dataloader_drop_last True leaves out batches that are not full, but there are only {num_rows} examples or packs "
            f"for a batch of {batch_size}. Pass --dataloader_drop_last False, or a smaller --per_device_train_batch_size."
        )


def _create_trainer(
    options: dict[str, Any],
    records: Sequence[Record],
    reference: ReferenceWeights | None,
    share_prefix: bool,
) -> LlavaTrainer:
    """Return the trainer of the run's objective; `options` are the arguments of `LlavaTrainer`."""
    args: TrainingArguments = options["args"]
    if args.objective == "sft":
        return LlavaTrainer(**options)
    if args.objective == "dpo":
        assert reference is not None, "it is always created for dpo"
        return PreferenceTrainer(reference, **options)
    reward_options = RewardOptions.from_arguments(
        args,
        device=str(args.device),
        seed=args.seed,
        frequencies_file=Path(str(args.output_dir)) / FREQUENCIES_FILE,
        # The digest of the file is not sufficient: the number of records also depends on how many bad ones were left out.
        data_digest=f"{options['settings']['train_data_sha256']}, {len(records)} records",
    )
    # One process counts the document frequencies, and stores them for the others.
    with args.main_process_first(desc="document frequencies"):
        references = (record.responses for record in records)
        reward = Reward(args.reward, references, reward_options)
    return PolicyTrainer(reward, reference, share_prefix, **options)


def _create_collator(
    model: Llava, train_set: CaptionDataset, objective: str, share_prefix: bool
) -> Collator:
    """Return the collator of an objective."""
    tokens_per_image = model.vision_tower.num_tokens
    pad_token_id = model.prompt.end_id
    arguments = (tokens_per_image, pad_token_id, dummy_image_batch(model, train_set))
    if objective == "sft":
        return Collator(*arguments)
    if objective == "dpo":
        return PairCollator(share_prefix, *arguments)
    return PromptCollator(*arguments)


def build_dataset(
    model: Llava,
    records: Sequence[Record],
    folder: str,
    data_args: DataArguments,
    args: TrainingArguments,
    objective: str,
) -> CaptionDataset:
    """Return the dataset of an objective: examples with responses, with pairs, or prompts to sample from."""
    dataset_class = DATASETS.get(objective, PromptDataset)
    # One example per record: prompts are not repeated for each reference, and pairs stay together.
    one_per_record = data_args.share_prefix or dataset_class is not CaptionDataset
    dataset = dataset_class(
        records,
        model.prompt,
        folder,
        model.vision_tower.transform,
        max_length=args.model_max_length,
        share_prefix=one_per_record,
    )
    if isinstance(dataset, PromptDataset):
        dataset.trains_references = args.sft_weight > 0
    return dataset


def _describe_data(
    trainer: LlavaTrainer, train_set: CaptionDataset, examples: TrainingSet, prompt: Prompt
) -> str:
    """Return a line about the data and the processes, for the log."""
    text = f"{len(train_set):,} training examples"
    if isinstance(examples, PackedDataset):
        text += f" in {len(examples):,} packs, {examples.fill_ratio:.1%} full"
    if trainer.args.world_size > 1:
        engine = trainer.accelerator.distributed_type.value
        text += f", {trainer.args.world_size} processes, {engine}"
    return f"{text}, template {prompt.name}"


# ---- options ----


def check_options(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    planning: bool = False,
) -> None:
    """Check for options that contradict each other, or that this machine or project does not support.

    Args:
        model_args: Model options.
        data_args: Data options.
        args: Training options.
        planning: Do not check what only the machine of the run must have: its device, optional
            packages, and the weights. `llava plan` may run on another one, and without records.

    Raises:
        ValueError: An option is not supported; the message names it and what to pass instead.
    """
    if not model_args.model_name_or_path:
        raise ValueError(
            "--model_name_or_path is required: the folder of a language model or its name on the Hugging Face Hub, such "
            "as mistralai/Mistral-7B-Instruct-v0.1. Or pass --config with a recipe that names one."
        )
    if not data_args.train_data_path and not planning:
        raise ValueError(
            "--train_data_path is required: a .json, .jsonl or .parquet file of records."
        )
    _check_numbers(data_args, args)
    # `llava plan` can estimate a recipe without any records.
    has_records = not planning or bool(data_args.train_data_path)
    _check_evaluation_options(data_args, args, has_records)
    if args.label_smoothing_factor or args.neftune_noise_alpha:
        raise ValueError(
            "--label_smoothing_factor and --neftune_noise_alpha are not supported. Remove them; with --objective dpo, "
            "--dpo_label_smoothing is for pairs whose answers may be swapped."
        )
    if args.push_to_hub:
        # The trainer of Transformers would upload the output folder before the model is in it.
        raise ValueError(
            "--push_to_hub True is not supported. Remove it, and publish the finished model with `llava push`."
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "--train_sampling_strategy batch_rebalance is not supported. Pass group_by_length for batches of similar length, "
            "or --packing True."
        )
    _check_tower_options(model_args, data_args)
    _check_bias(model_args, args)
    _check_lora_options(model_args)
    if "wandb" in args.report_to and not planning and find_spec("wandb") is None:
        raise ValueError(
            f"--report_to wandb requires wandb: run {install_command('wandb')}, or pass --report_to none."
        )
    if model_args.init_from and model_args.pretrain_mm_mlp_adapter:
        raise ValueError(
            "--init_from and --pretrain_mm_mlp_adapter both load a projector. Pass only one of them."
        )
    origin = model_args.init_from or model_args.pretrain_mm_mlp_adapter
    if origin:
        check_origin(model_args, origin, check_weights=not planning)
    _check_objective(model_args, data_args, args)
    check_kernels(model_args, data_args, args, check_machine=not planning)


def _check_numbers(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raise ValueError if a number is out of range, and no other check or library would say so."""
    counts = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "eval_captions": 0,
        "early_stopping_patience": 0,
    }
    for name, fewest in counts.items():
        if getattr(args, name) < fewest:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {fewest} or more.")
    # Both would save the model without a step. A negative `max_steps` means that the epochs count.
    if args.max_steps == 0:
        raise ValueError(
            "--max_steps 0: expected 1 or more, or -1 to train for --num_train_epochs."
        )
    # The comparisons are written so that a NaN is refused too.
    if args.max_steps < 0 and not args.num_train_epochs > 0:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs:g}: expected more than 0.")
    for name in ("max_bad_images", "max_bad_records"):
        share = getattr(data_args, name)
        if not 0 <= share <= 1:
            raise ValueError(f"--{name} {share:g}: expected a share from 0 to 1, such as 0.01.")
    if not data_args.feature_cache_gb >= 0:
        raise ValueError(f"--feature_cache_gb {data_args.feature_cache_gb:g}: expected 0 or more.")


def _check_evaluation_options(
    data_args: DataArguments, args: TrainingArguments, has_records: bool
) -> None:
    """Raise ValueError if the options of evaluation contradict each other, or records to evaluate on are missing."""
    evaluates = args.eval_strategy != "no"
    if evaluates and has_records and not data_args.eval_data_path:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise ValueError(
            f"--eval_strategy {strategy} requires validation records. Pass --eval_data_path FILE, or --eval_strategy no."
        )
    metric = args.metric_for_best_model
    if metric is None:
        return
    if metric.removeprefix("eval_") not in ("loss", "perplexity", "cider"):
        raise ValueError(
            f"--metric_for_best_model {metric}: expected eval_loss, eval_perplexity or cider."
        )
    if not evaluates:
        raise ValueError(
            f"--metric_for_best_model {metric} requires evaluations. Pass --eval_strategy steps --eval_data_path FILE."
        )


def _check_objective(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> None:
    """Check the options of rewards and preferences.

    Raises:
        ValueError: An option is invalid, or cannot be used with the objective.
    """
    objective = args.objective
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective {objective}: expected one of {', '.join(OBJECTIVES)}.")
    if not args.sft_weight >= 0:
        raise ValueError(f"--sft_weight {args.sft_weight}: expected 0 or more.")
    if objective == "sft":
        if args.sft_weight:
            raise ValueError(
                "--sft_weight adds the supervised loss to the loss of another objective. Remove it, or pass --objective "
                "rloo or dpo."
            )
        return
    if not model_args.init_from:
        raise ValueError(
            f"--objective {objective} improves a model that can already caption images. Train one with --objective sft "
            "first, and pass --init_from CHECKPOINT."
        )
    if args.kl_coef is not None and not args.kl_coef >= 0:
        raise ValueError(f"--kl_coef {args.kl_coef}: expected 0 or more.")
    if objective == "dpo":
        _check_preferences(data_args, args)
    else:
        _check_sampling(data_args, args)


def _check_preferences(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raise ValueError for options that training on preference pairs does not support."""
    if not args.dpo_beta > 0:
        raise ValueError(f"--dpo_beta {args.dpo_beta}: expected a number above 0, such as 0.1.")
    if not 0 <= args.dpo_label_smoothing < 0.5:
        raise ValueError(
            f"--dpo_label_smoothing {args.dpo_label_smoothing}: expected 0 or more, and less than 0.5. It is the "
            "share of pairs whose chosen and rejected answers are assumed to be swapped; at 0.5, the pairs teach nothing."
        )
    if args.kl_coef:
        raise ValueError(
            f"--kl_coef {args.kl_coef}: --objective dpo has no separate KL term. Remove --kl_coef; --dpo_beta determines "
            "how close the model stays to the initial one."
        )
    if data_args.packing and not data_args.share_prefix:
        raise ValueError(
            "--packing True --share_prefix False: packing requires that both answers of a pair share one copy of the "
            "prompt. Pass --share_prefix True, or --packing False."
        )


def _check_sampling(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raise ValueError for options that sampling does not support."""
    objective = args.objective
    if data_args.packing:
        raise ValueError(
            f"--packing True --objective {objective}: examples are grouped into packs by their length before training, but "
            "the length of a caption is unknown until it is sampled. Pass --packing False. To save time, --share_prefix True "
            "computes the prompt of an image only once."
        )
    # scst compares each sample with the greedy caption; rloo and grpo compare the samples with each other.
    fewest = 1 if objective == "scst" else 2
    if args.num_samples < fewest:
        raise ValueError(
            f"--num_samples {args.num_samples}: expected at least {fewest} with --objective {objective}."
        )
    if not args.sample_temperature > 0:
        raise ValueError(
            f"--sample_temperature {args.sample_temperature}: expected a number above 0; at 0 all samples are the same."
        )
    if args.sample_max_tokens < 1:
        raise ValueError(f"--sample_max_tokens {args.sample_max_tokens}: expected 1 or more.")
    check_reward_options(parse_rewards(args.reward), RewardOptions.from_arguments(args))


def _check_bias(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Raise ValueError if biases would be trained in 16 bits, in which small updates are lost.

    The adapter is in float32, but PEFT trains the biases of the frozen model in its data type.
    """
    if model_args.lora_enable and model_args.lora_bias != "none" and args.frozen_dtype != "float32":
        raise ValueError(
            f"--lora_bias {model_args.lora_bias}: biases would be trained in {args.frozen_dtype}, in which small updates are "
            "lost. Pass --bf16 False --fp16 False, or --lora_bias none."
        )


def _check_tower_options(model_args: ModelArguments, data_args: DataArguments) -> None:
    """Raise ValueError if the options of the vision tower contradict each other."""
    tuning = model_args.tune_vision_tower
    if tuning not in ("off", "full", "lora"):
        raise ValueError(f"--tune_vision_tower {tuning}: expected off, full or lora.")
    check_cache_mode(data_args.cache_vision_features, tuning)


def _check_lora_options(model_args: ModelArguments) -> None:
    """Raise ValueError if `--lora_options` is invalid or contradicts other options."""
    options = parse_lora_options(model_args.lora_options)
    if not options:
        return
    if trained_parts(model_args).language_model != "adapter":
        raise ValueError(
            "--lora_options: this run trains no adapter of the language model. Remove the option, or pass "
            "--lora_enable True --tune_mm_mlp_adapter False."
        )
    method = pissa_method(options)
    if not method:
        return
    if model_args.bits != 16:
        # PiSSA subtracts the adapter from the frozen weights. The differences would have to be quantized
        # again, with other scales.
        raise ValueError(
            f"--lora_options: init_lora_weights {method} changes the frozen weights, but --bits {model_args.bits} "
            "quantizes them. Pass --bits 16, or remove init_lora_weights."
        )
    if model_args.lora_dropout:
        logger.warning(
            "--lora_dropout %g: PiSSA moves the principal part of the weights into the adapter, where dropout removes "
            "random parts of it. Pass --lora_dropout 0, as the authors of PiSSA do.",
            model_args.lora_dropout,
        )


def check_origin(model_args: ModelArguments, folder: str, check_weights: bool = True) -> None:
    """Check that the weights of a checkpoint fit the pretrained parts of this run.

    A projector or an adapter is only meaningful with the features and weights that it was trained
    with, but it could be loaded with any weights of the same shape.

    Args:
        model_args: Model options.
        folder: The checkpoint of `--init_from` or `--pretrain_mm_mlp_adapter`.
        check_weights: Compare the base weights too, which must be on this machine.

    Raises:
        ValueError: The checkpoint was trained with different vision layers, other image tokens, another preparation of
            the images, or different base weights.
    """
    checkpoint = read_checkpoint_config(folder)
    trained_with = checkpoint["architecture"]
    layers = trained_with["mm_vision_select_layer"]
    expected_layers = layers if isinstance(layers, list) else [layers]
    if model_args.mm_vision_select_layer != expected_layers:
        values = " ".join(str(layer) for layer in expected_layers)
        raise ValueError(
            f"{folder}: its projector was trained with different layers of the vision tower. Pass "
            f"--mm_vision_select_layer {values}."
        )
    # These do not change a shape, so the weights would be loaded without an error.
    for name, default in (("mm_vision_select_feature", "patch"), ("mm_token_pool", 0)):
        value = trained_with.get(name, default)
        if getattr(model_args, name) != value:
            raise ValueError(
                f"--{name} {getattr(model_args, name)}: the projector of {folder} was trained with other image tokens. Pass "
                f"--{name} {value}."
            )
    aspect_ratio = trained_with.get("image_aspect_ratio", "crop")
    if model_args.image_aspect_ratio != aspect_ratio:
        raise ValueError(
            f"--image_aspect_ratio {model_args.image_aspect_ratio}: the projector of {folder} was trained with images that "
            f"were prepared in another way. Pass --image_aspect_ratio {aspect_ratio}."
        )
    if not check_weights:
        return
    parts = [("vision_tower", model_args.vision_tower)]
    if model_args.init_from and checkpoint["trained"] == "adapter":
        parts.append(("language_model", model_args.model_name_or_path))
    for part, path in parts:
        # Do not compare the digest of a part that is loaded from the checkpoint itself: it was trained
        # or merged, so it differs from the base weights.
        is_in_checkpoint = Path(path).resolve().parent == Path(folder).resolve()
        digest = trained_with.get("weights_digests", {}).get(part)
        if digest and not is_in_checkpoint:
            check_weights_digest(part, path, digest)


def build_config(
    model_args: ModelArguments, args: TrainingArguments, records: Sequence[Record]
) -> LlavaConfig:
    """Return the config of the model, which every checkpoint of the run contains.

    Raises:
        ValueError: The weights of a pretrained part are missing.
    """
    return replace(
        model_config(model_args, args.frozen_dtype),
        instruction=_default_instruction(records),
        weights_digests={
            "language_model": _digest("--model_name_or_path", model_args.model_name_or_path),
            "vision_tower": _digest("--vision_tower", model_args.vision_tower),
        },
    )


def _default_instruction(records: Sequence[Record]) -> str:
    """Return the instruction of the first record with exactly one image: the default of `Llava.caption`."""
    # If none of the first records has one image, prefer a record with several images to one without.
    chosen: Record | None = None
    for index in range(min(len(records), _MAX_SEARCHED_RECORDS)):
        with suppress(ValueError):  # skip bad records, which are left out of training too
            record = records[index]
            if len(record.images) == 1:
                chosen = record
                break
            if chosen is None or (record.images and not chosen.images):
                chosen = record
    if chosen is None:
        return DEFAULT_INSTRUCTION
    question = next(turn.content for turn in chosen.turns if turn.role == "user")
    if len(chosen.images) > 1:
        # The instruction is used for single images. Without a placeholder, the image is placed before the text.
        question = (
            question.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()
        )
    return question.removeprefix(f"{IMAGE_PLACEHOLDER}\n")


def _digest(option: str, name_or_path: str) -> str:
    """Return the digest of a model's weights; errors name the option."""
    try:
        return weights_digest(name_or_path)
    except OSError as error:
        raise ValueError(f"{option} {name_or_path}: {error}") from error
    except ValueError as error:  # its message names the folder
        raise ValueError(f"{option} {error}") from error


# ---- trained parts ----


def set_trainable(model: Llava, model_args: ModelArguments, parts: TrainedParts) -> None:
    """Freeze the model except for `parts`, and add the LoRA adapters of `parts`."""
    freeze(model, parts)
    rank, alpha, dropout = model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout
    if parts.vision_tower == "lora":
        add_tower_lora(model, rank, alpha, dropout)
    if parts.language_model == "adapter":
        options = parse_lora_options(model_args.lora_options)
        add_lora(model, rank, alpha, dropout, model_args.lora_bias, options)


def initialize_trained_parts(
    model: Llava,
    model_args: ModelArguments,
    parts: TrainedParts,
    train_set: CaptionDataset,
    resumed: Path | None = None,
) -> None:
    """Load the trained parts from a checkpoint, or initialize the projector.

    Args:
        model: The model, with adapters in place.
        model_args: Model options.
        parts: The parts that this run trains.
        train_set: The training set, whose images are used to scale a new projector.
        resumed: The checkpoint of a resumed run.

    Raises:
        ValueError: The checkpoint of `--init_from` contains trained parts that this run does not load.
    """
    if resumed:
        load_trained_weights(model, resumed)
    elif model_args.init_from:
        _check_same_parts(parts, model_args, model_args.init_from)
        load_trained_weights(model, model_args.init_from)
    elif model_args.pretrain_mm_mlp_adapter:
        load_projector(model.projector, model_args.pretrain_mm_mlp_adapter)
    else:
        _scale_projector(model, train_set)
    # Do this last: it does nothing if the adapter was loaded from a checkpoint.
    initialize_pissa(model.language_model)


def _check_same_parts(parts: TrainedParts, model_args: ModelArguments, folder: str) -> None:
    """Check that this run loads every trained part of a checkpoint.

    Raises:
        ValueError: A trained part of the checkpoint would not be loaded.
    """
    before = TrainedParts.from_stored(read_checkpoint_config(folder))

    # If the checkpoint contains a trained tower, this run must either continue to train it, or load the tower
    # of the checkpoint and freeze it.
    own_tower = Path(folder) / "vision_tower"
    loads_own_tower = Path(model_args.vision_tower).resolve() == own_tower.resolve()
    if before.vision_tower not in ("none", parts.vision_tower) and not loads_own_tower:
        merge_first = " (written by `llava merge`)" if before.vision_tower == "lora" else ""
        raise ValueError(
            f"--init_from {folder}: its vision tower is trained. Pass --tune_vision_tower {before.vision_tower} to "
            f"continue training it, or --vision_tower {own_tower}{merge_first} to keep it frozen."
        )

    # Require the same of the language model. Exception: if all weights of the checkpoint's language model were
    # trained, this run may load that model and add an adapter.
    own_language_model = Path(folder) / "language_model"
    loads_own_language_model = (
        before.language_model == "full"
        and Path(model_args.model_name_or_path).resolve() == own_language_model.resolve()
    )
    if before.language_model in ("none", parts.language_model) or loads_own_language_model:
        return
    if before.language_model == "adapter":
        contents = "a LoRA adapter of the language model"
        advice = f"Merge it with `llava merge {folder} --output MERGED`, and start from MERGED."
    else:
        contents = "a language model whose weights are all trained"
        advice = f"Pass --model_name_or_path {own_language_model} to start from that model."
    raise ValueError(
        f"--init_from {folder}: the checkpoint contains {contents}, but this run would not load it. {advice}"
    )


@torch.no_grad()
def _scale_projector(model: Llava, train_set: CaptionDataset) -> None:
    """Scale a new projector so that image tokens have the scale of the token embeddings.

    The scale is measured on images that are evenly spread over the records, so that every run on the
    same data uses the same images.
    """
    num_images = _SCALING_IMAGES if train_set.features is None else _SCALING_CACHED_IMAGES
    interval = max(len(train_set.records) // num_images, 1)
    device = next(model.vision_tower.parameters()).device
    features = []
    for index in range(0, len(train_set.records), interval):
        try:
            pixels, cached = train_set.load_images(train_set.records[index])
        except ImageError:
            continue  # training will report and count this image
        if cached is not None:
            features.append(cached.cpu())
        elif pixels is not None:
            features.append(model.vision_tower(pixels.to(device)).cpu())
    if not features:
        return
    embedding = model.language_model.get_input_embeddings()
    # Call the module instead of reading its weight, because Gemma multiplies the embeddings by a constant.
    # Every seventh token is sufficient to measure the scale.
    some_tokens = torch.arange(0, embedding.num_embeddings, 7, device=embedding.weight.device)
    embeddings = embedding(some_tokens)
    init_projector_scale(model.projector, torch.cat(features).to(embeddings.device), embeddings)


def dummy_image_batch(model: Llava, train_set: CaptionDataset) -> dict[str, torch.Tensor]:
    """Return one blank image, as pixels or features like the images of this run's batches.

    It is added to batches without images, since all processes must run the same layers.

    Returns:
        `pixel_values` (1, 3, height, width) or `image_features` (1, tokens, hidden size).
    """
    if train_set.features is None:
        height, width = model.vision_tower.transform.crop
        return {"pixel_values": torch.zeros(1, 3, height, width, dtype=torch.uint8)}
    blank = train_set.features.dummy_image[None]
    # A cache contains either uint8 pixels or features (see `FeatureCache`).
    key = "pixel_values" if blank.dtype == torch.uint8 else "image_features"
    return {key: blank}
