"""The options of `llava train`, `encode` and `plan`: their defaults, help texts and groups.

`arguments.py` parses the options. For that, it must import transformers, which takes seconds. This module
imports neither torch nor transformers, so that `llava train --help` is fast. `--help` lists the options
that are named in `HELP_GROUPS`; `--help-all` also lists the hundred other options of
`transformers.TrainingArguments`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NamedTuple

from llava_simplified.model.lora_options import parse_lora_options
from llava_simplified.options import normalize_spelling

# The fields of the next three dataclasses are the options of this package: the field name is the option
# name, and "help" in the metadata is the help text. HfArgumentParser converts values to the annotated type.
# To add an option, add a field, and list it in `HELP_GROUPS`.


@dataclass
class ModelArguments:
    """Options for the parts of the model, and for which of them are trained."""

    # Do not name a model as the default: a forgotten option should not start a download of 14 GB.
    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "Causal language model: a folder or a name on the Hugging Face Hub (required, "
            "unless --config names it)"
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run the Python code that comes with the language model or its tokenizer; its author can then "
            "do whatever you can do on this machine"
        },
    )
    # The vision tower, its features, the projector that converts them to token embeddings, and the format of the input.
    vision_tower: str = field(
        default="openai/clip-vit-base-patch16",
        metadata={"help": "Vision tower: CLIP, SigLIP, DINOv2, ViT, EfficientNet, and others"},
    )
    mm_vision_select_layer: list[int] = field(
        default_factory=lambda: [-2],
        metadata={
            "help": "Hidden states of the vision tower to use as image features (-1 is the last one); "
            "several are concatenated"
        },
    )
    mm_vision_select_feature: str = field(
        default="patch",
        metadata={"help": "Image features: patch, or cls_patch to keep the CLS token"},
    )
    mm_projector_type: str = field(
        default="linear",
        metadata={"help": "Projector: linear, identity, or an MLP such as mlp2x_gelu"},
    )
    mm_token_pool: int = field(
        default=0,
        metadata={
            "help": "Average the patch features to a grid with this number of rows and columns; 0 keeps all patches"
        },
    )
    image_aspect_ratio: str = field(
        default="crop",
        metadata={
            "help": "What to do with images that are not square: crop (as the vision tower's image processor "
            "does), or pad to a square with the processor's mean color, as LLaVA-1.5 does"
        },
    )
    template: str = field(
        default="auto",
        metadata={
            "help": "Prompt format: chat (the tokenizer's chat template), plain, bare (no roles), or "
            "auto (chat if the tokenizer has a template, else plain)"
        },
    )
    # Keep LLaVA's names (mm_ and tune_mm_), so that its scripts work unchanged. Three options load weights:
    # `pretrain_mm_mlp_adapter` loads only the projector, `init_from` loads all trained parts, and
    # `resume_from_checkpoint` (of transformers) continues the same run, with its optimizer and its step.
    pretrain_mm_mlp_adapter: str | None = field(
        default=None,
        metadata={"help": "Checkpoint folder to load the projector from"},
    )
    tune_mm_mlp_adapter: bool = field(
        default=False,
        metadata={"help": "Train only the projector, as in LLaVA's first stage"},
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder to load all trained parts from, for a new training run"
        },
    )
    # The parts to train: by default the projector, and LoRA adapters of the language model.
    freeze_backbone: bool = field(
        default=True,
        metadata={
            "help": "Freeze the weights of the language model; False with --lora_enable False "
            "trains all of them"
        },
    )
    lora_enable: bool = field(
        default=True,
        metadata={"help": "Train the language model with LoRA"},
    )
    lora_r: int = field(default=64, metadata={"help": "LoRA rank"})
    lora_alpha: float = field(
        default=16,
        metadata={"help": "LoRA scale: the adapter's output is multiplied by alpha / r"},
    )
    lora_dropout: float = field(
        default=0.05,
        metadata={"help": "Dropout of the adapter's input"},
    )
    lora_bias: str = field(
        default="none",
        metadata={"help": "Biases to train: none, all or lora_only"},
    )
    lora_options: str = field(
        default="",
        metadata={
            "help": "More fields of PEFT's LoraConfig for the language model, as JSON (in a YAML file, a mapping): use_dora, "
            "use_rslora, init_lora_weights (pissa), target_modules, exclude_modules, layers_to_transform, "
            "rank_pattern, alpha_pattern"
        },
    )
    tune_vision_tower: str = field(
        default="off",
        metadata={
            "help": "Training of the vision tower: off, full, or lora (with the LoRA options above)"
        },
    )
    # How the language model is stored and computed.
    bits: int = field(
        default=16,
        metadata={
            "help": "Bits per weight of the frozen language model: 16, 8, or 4 (QLoRA); 8 and 4 "
            "need bitsandbytes"
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the language model: sdpa, eager, or on CUDA also "
            "flash_attention_2 and flex_attention (default: the fastest that the model supports)"
        },
    )

    def __post_init__(self) -> None:
        # Normalize the text (for example, the order of its keys), because a resumed run compares it with the stored
        # text.
        options = parse_lora_options(self.lora_options)
        self.lora_options = json.dumps(options, sort_keys=True) if options else ""


@dataclass
class DataArguments:
    """Options for records, images and batches."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Training data in any form that `llava convert` reads, such as a folder of images with captions in text "
            "files; it is converted once, into ~/.cache/llava-simplified/data. If no model is named, the small models of "
            "`llava demo` are trained, with the recipe small_folder"
        },
    )
    sidecar: str = field(
        default="",
        metadata={
            "help": "Suffix of the caption files beside the images of --data: txt or caption (default: both). Add `lines` if "
            "each line is a separate caption, for example caption,lines"
        },
    )
    # Files of records and their image folders. If `data` is given, it sets both options for the training data.
    train_data_path: str | None = field(
        default=None,
        metadata={"help": "Training records: a .json, .jsonl or .parquet file"},
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={"help": "Validation records"},
    )
    train_image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of the training images (default: the folder of the records)"},
    )
    val_image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of the validation images (default: the folder of the records)"},
    )
    # How examples are arranged in a batch. These options do not change the loss of an example.
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Train several captions of one image as one sequence that contains the image "
            "once. The batch size then counts images; with False, it counts captions"
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Fill each sequence of a batch with several examples, which do not attend to "
            "each other"
        },
    )
    pack_length: int = field(
        default=4096,
        metadata={
            "help": "Maximum number of positions of a packed sequence, image tokens included"
        },
    )
    # A frozen vision tower computes the same features in every epoch, so they can be cached.
    cache_vision_features: str = field(
        default="auto",
        metadata={
            "help": "Where to cache what is computed once per image. memory or disk: the features of the frozen vision tower; "
            "pixels: the preprocessed images, on disk; off: no cache; auto: disk, or else pixels, if images are used more "
            "than once and the cache fits into --feature_cache_gb"
        },
    )
    feature_cache_dir: str = field(
        default="~/.cache/llava-simplified/features",
        metadata={"help": "Folder of the cached features; later runs reuse them"},
    )
    feature_cache_gb: float = field(
        default=8.0,
        metadata={"help": "Maximum size of the cache in GB with --cache_vision_features auto"},
    )
    # Tolerate a few bad images or records. If there are many, something is wrong with the data or the options.
    max_bad_images: float = field(
        default=0.01,
        metadata={"help": "Maximum share of unreadable images; above it, training stops"},
    )
    max_bad_records: float = field(
        default=0.01,
        metadata={
            "help": "Maximum share of records that cannot be used, because they are malformed or their prompt is longer "
            "than --model_max_length; they are left out before the first step. Above it, training does not start"
        },
    )


def bf16_is_supported() -> bool:
    """Return whether this machine has a GPU that computes in bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@dataclass
class TrainingDefaults:
    """Options that this package adds to `transformers.TrainingArguments`, or whose default it changes."""

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the trained model (default: output/<language model>-<vision tower>)"
        },
    )
    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with any of these options, or a recipe of the package, such as demo; "
            "the command line takes precedence"
        },
    )
    # Learning rates: each part can have its own.
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate"})
    mm_projector_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projector (default: --learning_rate)"},
    )
    vision_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision tower (default: --learning_rate)"},
    )
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={"help": "Learning rate schedule: cosine, linear, constant, and others"},
    )
    warmup_steps: float = field(
        default=0.03,
        metadata={"help": "Number of warm-up steps; below 1, a fraction of all steps"},
    )
    # Precision, and the maximum length of a sample.
    bf16: bool = field(
        default_factory=bf16_is_supported,
        metadata={
            "help": "Keep frozen weights and activations in bfloat16 (default: True if the GPU "
            "supports it)"
        },
    )
    model_max_length: int = field(
        default=2048,
        metadata={
            "help": "Maximum number of text tokens per sample (an image counts as one)",
        },
    )
    # Reinforcement learning and preference pairs, see `training.policy_trainer` and `training.preference_trainer`.
    objective: str = field(
        default="sft",
        metadata={
            "help": "Training objective: sft (supervised training on the responses); or, for a model that --init_from names: "
            "scst, rloo or grpo (reinforcement learning with rewards for sampled captions), or dpo (preference pairs, in "
            "the keys chosen and rejected of the records)"
        },
    )
    reward: str = field(
        default="cider",
        metadata={
            "help": "Rewards of captions with their weights, for example cider=1.0,length=0.1. Rewards: cider, bleu4, rouge_l, "
            "word_f1, length, clipscore, qa, or a function of your own as module:function"
        },
    )
    reward_workers: int = field(
        default=1,
        metadata={
            "help": "Number of processes that compute a custom reward (module:function); 0 computes it in the main process, "
            "without a timeout"
        },
    )
    reward_timeout: float = field(
        default=60.0,
        metadata={
            "help": "Maximum time in seconds for a custom reward to score a batch of captions, and for one request of qa"
        },
    )
    reward_clip: str = field(
        default="", metadata={"help": "Folder of a CLIP model, for the reward clipscore"}
    )
    reward_endpoint: str = field(
        default="",
        metadata={
            "help": "Base URL of a server with OpenAI's API, such as http://127.0.0.1:8000/v1, for the reward qa"
        },
    )
    reward_endpoint_model: str = field(
        default="", metadata={"help": "Name of the model on --reward_endpoint"}
    )
    reward_tries: int = field(
        default=1,
        metadata={
            "help": "Number of times that qa asks each question, each time with the choices in a new random order"
        },
    )
    num_samples: int = field(
        default=5, metadata={"help": "Number of captions to sample for each image"}
    )
    sample_temperature: float = field(
        default=1.0, metadata={"help": "Temperature for sampling the captions of --num_samples"}
    )
    sample_max_tokens: int = field(
        default=64,
        metadata={
            "help": "Maximum number of tokens of a sampled caption; a caption that reaches it counts as a failure"
        },
    )
    kl_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the KL divergence from the model at the start of the run (default: 0.04 with grpo, else 0)"
        },
    )
    dpo_beta: float = field(
        default=0.1,
        metadata={
            "help": "Beta of --objective dpo: with a smaller value, the model may differ more from the model at the start of "
            "the run"
        },
    )
    dpo_label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Assumed share of pairs whose chosen and rejected answers are swapped, below 0.5"
        },
    )
    sft_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a supervised loss that is added to the objective: on the responses, or on the chosen answers "
            "with dpo"
        },
    )
    # Checks before and during the run.
    preflight: str = field(
        default="auto",
        metadata={
            "help": "Before training, check memory and disk space, and test two steps, saving and loading in a "
            "separate process: true, false, or auto (true for new runs of 2000 steps or more)"
        },
    )
    eval_captions: int = field(
        default=32,
        metadata={
            "help": "Number of validation images to caption at every evaluation; their score is logged as "
            "eval_cider; 0 means none"
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": "Stop after this number of evaluations without a better "
            "--metric_for_best_model; 0 means never"
        },
    )
    # Logging and performance.
    report_to: str = field(
        default="none",
        metadata={"help": "Experiment tracker: wandb, tensorboard or none"},
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Number of steps between two log entries"},
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Hide the progress bar"})
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile each layer of the language model with torch.compile; needs a C++ "
            "compiler, or Triton on GPUs"
        },
    )
    ddp_find_unused_parameters: bool = field(
        default=False,
        metadata={
            "help": "Search for unused parameters in distributed training; not needed, because all trained "
            "parameters are used"
        },
    )


class InheritedOption(NamedTuple):
    """A frequently used option of `transformers.TrainingArguments`, with the same default as there."""

    default: Any
    help: str


# The defaults are repeated here, because importing transformers for `--help` would take seconds. A test
# compares them with those of transformers.
INHERITED = {
    "num_train_epochs": InheritedOption(3.0, "Number of passes over the training records"),
    "max_steps": InheritedOption(-1, "Number of optimizer steps; above 0, it replaces the epochs"),
    "per_device_train_batch_size": InheritedOption(8, "Training batch size per device"),
    "gradient_accumulation_steps": InheritedOption(
        1, "Number of batches whose gradients are added up for one optimizer step"
    ),
    "weight_decay": InheritedOption(0.0, "Weight decay of AdamW"),
    "max_grad_norm": InheritedOption(1.0, "Maximum norm of the gradient, for clipping"),
    "fp16": InheritedOption(False, "Keep frozen weights and activations in float16"),
    "seed": InheritedOption(42, "Random seed"),
    "resume_from_checkpoint": InheritedOption(
        None, "Continue an interrupted run: True for its last checkpoint, or a checkpoint folder"
    ),
    "eval_strategy": InheritedOption("no", "When to evaluate: no, steps or epoch"),
    "eval_steps": InheritedOption(
        None, "Number of steps between two evaluations (default: --logging_steps)"
    ),
    "per_device_eval_batch_size": InheritedOption(8, "Validation batch size per device"),
    "save_strategy": InheritedOption("steps", "When to save checkpoints: no, steps, epoch or best"),
    "save_steps": InheritedOption(500, "Number of steps between two checkpoints"),
    "save_total_limit": InheritedOption(None, "Maximum number of checkpoints (default: all)"),
    "load_best_model_at_end": InheritedOption(
        False,
        "Copy the checkpoint with the best --metric_for_best_model to the output folder, instead of the last weights",
    ),
    "metric_for_best_model": InheritedOption(
        None, "Metric for selecting the best checkpoint, for example eval_loss or eval_cider"
    ),
    "run_name": InheritedOption(None, "Name of the run in the experiment tracker"),
    "gradient_checkpointing": InheritedOption(
        None, "Recompute activations in the backward pass to save memory"
    ),
    "dataloader_num_workers": InheritedOption(0, "Number of processes that load images"),
    "tf32": InheritedOption(None, "Allow TF32 matrix products on NVIDIA GPUs"),
    "deepspeed": InheritedOption(None, "DeepSpeed configuration file"),
    "fsdp": InheritedOption(
        None, "Shard the model with FSDP, as --fsdp_config specifies: True or False"
    ),
    "fsdp_config": InheritedOption(None, "FSDP configuration file"),
}

# Boolean options whose default is None or depends on the machine. `_add_option` cannot recognize them by
# the type of the default.
BOOLEANS_WITHOUT_DEFAULT = {"bf16", "gradient_checkpointing", "tf32"}

# The sections of `--help`, in the order in which options are listed: frequently used options first.
HELP_GROUPS = {
    "Model": (
        "model_name_or_path",
        "vision_tower",
        "mm_projector_type",
        "mm_vision_select_layer",
        "mm_vision_select_feature",
        "mm_token_pool",
        "image_aspect_ratio",
        "template",
        "pretrain_mm_mlp_adapter",
        "tune_mm_mlp_adapter",
        "init_from",
        "trust_remote_code",
        "freeze_backbone",
    ),
    "Data": (
        "data",
        "sidecar",
        "train_data_path",
        "train_image_folder",
        "eval_data_path",
        "val_image_folder",
        "model_max_length",
        "share_prefix",
        "packing",
        "pack_length",
        "max_bad_images",
        "max_bad_records",
    ),
    "LoRA": (
        "lora_enable",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_bias",
        "lora_options",
        "tune_vision_tower",
        "bits",
    ),
    "Training": (
        "output_dir",
        "config",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "mm_projector_lr",
        "vision_lr",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "bf16",
        "fp16",
        "seed",
        "preflight",
        "resume_from_checkpoint",
    ),
    "Rewards and preferences": (
        "objective",
        "reward",
        "reward_workers",
        "reward_timeout",
        "reward_clip",
        "reward_endpoint",
        "reward_endpoint_model",
        "reward_tries",
        "num_samples",
        "sample_temperature",
        "sample_max_tokens",
        "kl_coef",
        "dpo_beta",
        "dpo_label_smoothing",
        "sft_weight",
    ),
    "Evaluation and checkpoints": (
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "eval_captions",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "metric_for_best_model",
        "early_stopping_patience",
    ),
    "Logging": ("report_to", "run_name", "logging_steps", "disable_tqdm"),
    "Performance": (
        "gradient_checkpointing",
        "compile_layers",
        "attn_implementation",
        "cache_vision_features",
        "feature_cache_dir",
        "feature_cache_gb",
        "dataloader_num_workers",
        "tf32",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "ddp_find_unused_parameters",
    ),
}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `HELP_GROUPS` and `--help-all` to a parser, for help and completion.

    This parser does not convert or check values; `arguments.parse_arguments` does.
    """
    parser.add_argument(
        "--help-all",
        action="store_true",
        help="Show the other options of transformers.TrainingArguments too, and exit",
    )
    own: dict[str, Field[Any]] = {}
    for arguments in (ModelArguments, DataArguments, TrainingDefaults):
        for option in fields(arguments):
            own[option.name] = option
    for heading, names in HELP_GROUPS.items():
        group = parser.add_argument_group(heading)
        for name in names:
            if name in own:
                _add_option(group, name, _default_of(own[name]), own[name].metadata["help"])
            else:
                # All other options are defined by transformers.
                _add_option(group, name, INHERITED[name].default, INHERITED[name].help)


def _default_of(option: Field[Any]) -> Any:
    """Return the default of a dataclass field, or None if it depends on the machine (`bf16`)."""
    if option.default_factory is bf16_is_supported:
        return None
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


def _add_option(group: Any, name: str, default: Any, help_text: str) -> None:
    """Add one option to a group of the help text, with its default and a metavar."""
    # Escape %, because argparse formats help texts with %, as in "%(default)s".
    text = help_text.replace("%", "%%")
    if default not in (None, ""):
        shown = default
        if isinstance(default, list):
            shown = " ".join(map(str, default))
        text += f" (default: {shown})"
    # Dataclass fields have no metavar. Use the last part of the option's name, for example STEPS for save_steps.
    metavar = name.rpartition("_")[2].upper()
    nargs: Any = None
    if isinstance(default, bool) or name in BOOLEANS_WITHOUT_DEFAULT:
        metavar = "BOOL"
        nargs = "?"  # `--packing` alone means True
    elif isinstance(default, list):
        nargs = "+"
    group.add_argument(f"--{name}", default=default, metavar=metavar, nargs=nargs, help=text)


def exit_with_help(argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print the help text of a training command and exit, if `argv` contains a help option.

    Call this before transformers is imported, because only `--help-all` needs it.
    """
    normalized = normalize_spelling(argv, ["--help", "--help-all"])
    if "--help-all" in normalized:
        _add_inherited_options(parser)
    elif "--help" not in normalized and "-h" not in normalized:
        return
    parser.print_help()
    parser.exit()


def _add_inherited_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `transformers.TrainingArguments` that the parser does not have yet."""
    import transformers

    group = parser.add_argument_group("Other options of transformers.TrainingArguments")
    inherited = transformers.HfArgumentParser(transformers.TrainingArguments)  # type: ignore[arg-type]
    for action in inherited._actions:
        # Skip options that the parser has already, and those of `INHERITED`, which `add_training_options` adds.
        known = [name for name in action.option_strings if name in parser._option_string_actions]
        if not known and action.dest not in INHERITED:
            group._add_action(action)
