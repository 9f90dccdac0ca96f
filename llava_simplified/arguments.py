"""Every option of a training run, in three groups; the command line, a YAML file and old names are read here."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava_simplified.recipes import resolve_recipe


@dataclass
class ModelArguments:
    """Which parts make the model, and how they are joined."""

    model_name_or_path: str = field(
        default="mistralai/Mistral-7B-Instruct-v0.1",
        metadata={"help": "Language model: any causal one."},
    )
    vision_tower: str = field(
        default="openai/clip-vit-base-patch16",
        metadata={"help": "Vision model: CLIP, SigLIP, DINOv2, ViT, EfficientNet..."},
    )
    mm_vision_select_layer: list[int] = field(
        default_factory=lambda: [-2],
        metadata={
            "help": "Hidden states shown to the language model: -1 the last; several are concatenated."
        },
    )
    mm_vision_select_feature: str = field(
        default="patch", metadata={"help": "patch, or cls_patch to keep CLS."}
    )
    mm_projector_type: str = field(
        default="linear", metadata={"help": "linear, mlp2x_gelu (any depth), identity."}
    )
    mm_token_pool: int = field(
        default=0, metadata={"help": "Average the patch grid to K x K tokens; 0 keeps it."}
    )
    template: str = field(
        default="auto",
        metadata={
            "help": "auto: the tokenizer's chat template if it has one, else plain; chat; plain; bare: no roles"
        },
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "Start with the projector of this checkpoint folder."}
    )
    tune_mm_mlp_adapter: bool = field(
        default=False, metadata={"help": "Train the projector alone (first stage)."}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start a new run from all that this checkpoint trained (adapter, projector...)."
        },
    )
    freeze_backbone: bool = field(
        default=True,
        metadata={
            "help": "Keep the language model's own weights; False, without LoRA, trains them all."
        },
    )
    lora_enable: bool = field(
        default=True, metadata={"help": "Adapt the language model with LoRA."}
    )
    lora_r: int = field(default=64, metadata={"help": "LoRA rank."})
    lora_alpha: float = field(default=16, metadata={"help": "LoRA scale: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout at the adapter's input."})
    lora_bias: str = field(
        default="none", metadata={"help": "Biases trained too: none, all or lora_only."}
    )
    tune_vision_tower: str = field(
        default="off",
        metadata={
            "help": "Train the vision tower too: full, or lora: an adapter with the options above."
        },
    )
    bits: int = field(
        default=16,
        metadata={
            "help": "Keep the frozen language model in 4 (QLoRA) or 8 bits; needs bitsandbytes."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the language model: sdpa, eager; on CUDA flash_attention_2, flex_attention; default: its best, "
            "and on a CPU a faster one for texts of up to 512 tokens."
        },
    )


@dataclass
class DataArguments:
    """What it learns from."""

    train_data_path: str | None = field(
        default=None, metadata={"help": "Records: .json, .jsonl or .parquet."}
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Records for the validation loss."}
    )
    train_image_folder: str | None = field(
        default=None,
        metadata={"help": "Where the training images are; the data file's folder where not given."},
    )
    val_image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Where the validation images are; the eval data file's folder where not given."
        },
    )
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Train several captions of one image as one sequence, image and prompt computed once. "
            "A batch then counts images; False: captions."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Fill each sequence of a batch with several examples, which do not see each other."
        },
    )
    pack_length: int = field(
        default=4096, metadata={"help": "Most positions of a pack, image tokens included."}
    )
    cache_vision_features: str = field(
        default="auto",
        metadata={
            "help": "Run the frozen tower once per picture and keep the features: memory, disk, off; pixels: keep on disk the "
            "pictures as the tower takes them; auto: disk, else pixels, where a picture is seen more than once and all "
            "fit into feature_cache_gb."
        },
    )
    feature_cache_dir: str = field(
        default="~/.cache/llava-simplified/features",
        metadata={"help": "Where features on disk are kept, for later runs too."},
    )
    feature_cache_gb: float = field(default=8.0, metadata={"help": "The most that auto may store."})
    max_bad_images: float = field(
        default=0.01,
        metadata={"help": "Stop when more than this share of the images can't be read."},
    )


def _bf16_by_default() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers.TrainingArguments with LLaVA's defaults and a few options more."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Default: output/<language model>-<vision tower>."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Schedule of the learning rate."}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of warm-up; below 1: share of all steps."}
    )
    bf16: bool = field(
        default_factory=_bf16_by_default,
        metadata={
            "help": "Frozen weights and activations in bfloat16 (default: where a GPU has it)."
        },
    )
    report_to: str = field(default="none", metadata={"help": "wandb, tensorboard or none."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector."}
    )
    vision_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "torch.compile each layer of the language model (needs a C++ compiler, or Triton on GPUs)."
        },
    )
    model_max_length: int = field(
        default=2048, metadata={"help": "Most text tokens of a sample; an image is one."}
    )
    eval_captions: int = field(
        default=32,
        metadata={
            "help": "Validation pictures captioned at every evaluation: eval_cider in the log; 0: none."
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": "Stop after so many evaluations without a better metric_for_best_model; 0: never."
        },
    )
    preflight: str = field(
        default="auto",
        metadata={
            "help": "Try two steps, a save and a load ahead of the run, in a process of its own: true, false; auto: where "
            "2000 steps or more are to come."
        },
    )
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "What trains here is always used."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress line."})
    config: str | None = field(
        default=None,
        metadata={"help": "YAML file with any of these options, or the name of a recipe: demo."},
    )

    def __post_init__(self) -> None:
        _check_launcher(self.deepspeed is not None)
        if not torch.accelerator.is_available():
            self.use_cpu = (
                True  # otherwise several processes would each train alone, unaware of the others
            )
            if self.tf32:
                print("tf32 is an NVIDIA format: no effect on this machine", file=sys.stderr)
            self.tf32 = None
            if self.deepspeed:
                from deepspeed import ops

                # an operator for shared memory that would be compiled for a minute at every first start
                ops.__compatible_ops__["deepspeed_shm_comm"] = False
        elif self.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise ValueError("this GPU has no bfloat16: pass --bf16 False --fp16 True")
        if str(self.fsdp).lower() in (
            "true",
            "false",
        ):  # from YAML; the parser takes any word for a kind of sharding
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        self.output_dir = self.output_dir or "output"
        self.remove_unused_columns = (
            False  # a batch here is more than the arguments of a text model
        )
        self.average_tokens_across_devices = True
        if self.early_stopping_patience:
            self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
            self.restore_callback_states_from_checkpoint = (
                True  # a resumed run is as patient as the straight one
            )
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = (
            "false"  # every process needs a whole model to start from
        )
        super().__post_init__()
        unset_hf_deepspeed_config()  # or `from_pretrained` would load, under ZeRO-3, models cut up already
        if (count := int(os.environ.get("WORLD_SIZE", 1))) != self.world_size:
            raise ValueError(
                f"{count} processes were started, and each would train alone: start them with torchrun"
            )

    @property
    def frozen_dtype(self) -> str:
        """Of the weights that are not trained."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


def _check_launcher(deepspeed: bool) -> None:
    """Raise ValueError where the way this process was started would not do what it looks like."""
    several = "LOCAL_RANK" in os.environ
    accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerate and "MASTER_ADDR" in os.environ and not several:
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; "
            "`accelerate launch --multi_gpu --num_processes 2` starts two on CPUs too, and so does torchrun"
        )
    if deepspeed and not several:
        raise ValueError("--deepspeed needs its launcher: deepspeed train.py ... (or torchrun)")
    if deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            "--deepspeed, under an accelerate launch that has a DeepSpeed configuration itself: give one"
        )


# What LLaVA's scripts pass, under the names of their time.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "mm_projector_learning_rate": "mm_projector_lr",
    "mm_vision_tower_lr": "vision_lr",
    "torch_compile": "compile_layers",
    "data_path": "train_data_path",
    "image_folder": "train_image_folder",
}
NO_EFFECT = {
    "lazy_preprocess": "samples are always read lazily",
    "save_safetensors": "weights are always saved as safetensors",
    "overwrite_output_dir": "files of the output folder are replaced, never merged with",
    "image_aspect_ratio": "the vision tower's own preprocessor decides",
    "is_multimodal": "every row says itself whether it has images",
    "version": "the tokenizer's chat template is used; choose with --template",
}
MUST_BE_OFF = {
    "mm_use_im_start_end": "image start and end tokens",
    "mm_use_im_patch_token": "an image patch token in the vocabulary",
}


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read the command line, after the options of `--config` if there is one: the command line wins.

    Raises:
        ValueError: an option that does not exist, or one that asks for what this project does not do.
    """
    options = _options(argv)
    for config in [values for name, values in options if name == "config"][-1:]:
        options = _options(_from_yaml(Path(config[0] if config else ""))) + options
    given = dict(options)
    if "output_dir" not in given:
        parts = (
            given.get(f, [getattr(ModelArguments, f)])
            for f in ("model_name_or_path", "vision_tower")
        )
        options.append(
            ("output_dir", [str(Path("output") / "-".join(Path(p[0]).name.lower() for p in parts))])
        )
    kinds: Any = (ModelArguments, DataArguments, TrainingArguments)
    parser = transformers.HfArgumentParser(
        kinds, allow_abbrev=False
    )  # a shortened --config would be read by nobody
    parser.usage = (
        "llava train (or python train.py, llava encode) [options]"  # whole, it would bury an error
    )
    words = [word for option in options for word in _current_names(*option)]
    *groups, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; --help lists them")
    model, data, training = groups
    return model, data, training


def _options(argv: list[str]) -> list[tuple[str, list[str]]]:
    """`--a 1 2 --b=3` -> [("a", ["1", "2"]), ("b", ["3"])]; dashes in names become underscores."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else []))
        elif word == "-h":
            options.append(("help", []))
        elif options:
            options[-1][1].append(word)
        else:
            raise ValueError(f"{word!r} belongs to no option")
    return options


class _Yaml(yaml.SafeLoader):
    """`off` and `no` are values of options, and not all of them mean False."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if not tag.endswith(":bool")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _from_yaml(path: Path) -> list[str]:
    """A YAML mapping as words of a command line: argparse then converts `1e-3` or `true` as it does there."""
    path = resolve_recipe(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: must be a mapping of options")
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            words += [f"--{key}", json.dumps(value)]
        elif value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _current_names(name: str, values: list[str]) -> list[str]:
    """One option as words for the parser; old names translated, names without effect said and dropped."""
    on = values not in (["False"], ["false"], ["0"])
    if name in MUST_BE_OFF:
        if on:
            raise ValueError(
                f"--{name}: {MUST_BE_OFF[name]} is not part of stock LLaVA; leave it False"
            )
        return []
    if name in NO_EFFECT:
        print(f"--{name} has no effect: {NO_EFFECT[name]}", file=sys.stderr)
        return []
    if name in (
        "group_by_length",
        "group_by_modality_length",
    ):  # a picture counts as its tokens: one is the other
        return ["--train_sampling_strategy", "group_by_length" if on else "random"]
    if (
        name == "local_rank"
    ):  # DeepSpeed's launcher passes it; torch.distributed reads the environment
        os.environ.setdefault("LOCAL_RANK", values[0])
        return []
    return [f"--{RENAMED.get(name, name)}", *values]


def describe(*groups: Any) -> dict[str, Any]:
    """The options that differ from their defaults, for the log and the checkpoint; a token is nobody's to read."""
    return {
        f.name: getattr(group, f.name)
        for group in groups
        for f in fields(group)
        if f.init and not f.name.endswith("_token") and getattr(group, f.name) != _default(f)
    }


def _default(option: Any) -> Any:
    return option.default_factory() if callable(option.default_factory) else option.default
