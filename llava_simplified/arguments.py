"""Parse the options of a training run: command line, YAML file, and LLaVA's own option names.

    argv
        -> (name, values) pairs, with the pairs of the YAML file in front
        -> the same pairs, with LLaVA's old option names replaced by the current ones
        -> HfArgumentParser
        -> ModelArguments, DataArguments, TrainingArguments

`training_options.py` defines the options of this package. Importing this module imports
transformers.
"""

from __future__ import annotations

import json
import logging
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
import yaml
from transformers.hf_argparser import string_to_bool
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

# Import this before transformers' Trainer, which imports PEFT.
import llava_simplified.model.peft_names  # noqa: F401
from llava_simplified.data_option import options_from_data
from llava_simplified.options import configure_logging, describe_unknown
from llava_simplified.recipes import resolve_recipe
from llava_simplified.training_options import (
    DataArguments,
    ModelArguments,
    TrainingDefaults,
)

logger = logging.getLogger(__name__)


@dataclass
class TrainingArguments(TrainingDefaults, transformers.TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` with LLaVA's defaults and a few more options."""

    def __post_init__(self) -> None:
        """Check the options, and adapt them to this machine."""
        _check_launcher(self.deepspeed is not None)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            self._check_bf16()
            if accelerator.type == "mps" and not self.use_cpu:
                self._use_mps()
        else:
            self._use_cpu()
        # Convert "true" and "false", which come from YAML and the command line: transformers would interpret any
        # string as the name of a sharding strategy.
        if str(self.fsdp).lower() in ("true", "false"):
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        self.output_dir = self.output_dir or "output"
        # Keep all entries of a batch. Trainer would remove those that are not arguments of `forward`.
        self.remove_unused_columns = False
        # Divide the loss by the number of trained tokens on all devices.
        self.average_tokens_across_devices = True
        # Disable this filter: `LlavaTrainer` ends the run if a loss is not finite, and the filter would copy every
        # loss from the GPU.
        self.logging_nan_inf_filter = False
        if self.early_stopping_patience:
            self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
            # Restore the number of evaluations without improvement in a resumed run.
            self.restore_callback_states_from_checkpoint = True
        # Transformers assumes that a metric is better if it is greater, unless its name ends with "loss".
        is_perplexity = (self.metric_for_best_model or "").endswith("perplexity")
        if is_perplexity and self.greater_is_better is None:
            self.greater_is_better = False
        # Load the full model in every process: `training.sharding` distributes the weights itself.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        super().__post_init__()
        # Undo the registration of the DeepSpeed config by `super().__post_init__`. With a registered config of ZeRO-3,
        # `from_pretrained` would partition the model while loading it.
        unset_hf_deepspeed_config()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world_size:
            raise ValueError(
                f"{started} processes were started (WORLD_SIZE), but each would train separately; start them with "
                "torchrun."
            )

    def _check_bf16(self) -> None:
        if self.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise ValueError(
                "--bf16 True: this GPU does not support bfloat16; pass --bf16 False --fp16 True."
            )

    def _use_mps(self) -> None:
        """Raise ValueError for options that Apple GPUs do not support, and turn off pinned memory."""
        refused = {
            "--deepspeed": self.deepspeed is not None,
            "--fsdp": str(self.fsdp or "").lower() not in ("", "false"),
            "--tf32": bool(self.tf32),
            "--compile_layers": bool(self.compile_layers),
            f"--optim {self.optim}": any(
                word in str(self.optim) for word in ("bnb", "8bit", "4bit")
            ),
            "several processes": int(os.environ.get("WORLD_SIZE", "1")) > 1,
        }
        names = [name for name, is_set in refused.items() if is_set]
        if names:
            raise ValueError(
                f"{', '.join(names)}: not supported on Apple GPUs (MPS). Train without this, or pass --use_cpu True to "
                "train on the CPU."
            )
        # CPU and Apple GPU share their memory, so pinning is useless; torch would warn about it in every worker.
        self.dataloader_pin_memory = False

    def _use_cpu(self) -> None:
        """Adapt the options to a machine without an accelerator."""
        # Set this explicitly. Otherwise, transformers would let each of several processes train separately.
        self.use_cpu = True
        if self.tf32:
            logger.warning("--tf32 has no effect: this machine has no NVIDIA GPU.")
        self.tf32 = None
        if self.deepspeed:
            from deepspeed import ops

            # Disable this shared-memory operator, because DeepSpeed would compile it, which takes a minute.
            ops.__compatible_ops__["deepspeed_shm_comm"] = False

    @property
    def frozen_dtype(self) -> str:
        """The dtype of the frozen weights."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.fp16 else "float32"


def _check_launcher(deepspeed: bool) -> None:
    """Raise ValueError if the processes were not started in a way that works.

    This is the case if the launcher started too few processes, if DeepSpeed has no launcher, or if the launcher
    has its own DeepSpeed configuration.

    Args:
        deepspeed: Whether `--deepspeed` is given.
    """
    distributed = "LOCAL_RANK" in os.environ
    accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerate and "MASTER_ADDR" in os.environ and not distributed:
        raise ValueError(
            "accelerate launch started one process although several were requested, because of its option --cpu. "
            "Use `accelerate launch --multi_gpu --num_processes 2`, which also works on CPUs, or torchrun."
        )
    if deepspeed and not distributed:
        raise ValueError(
            "--deepspeed requires a launcher: run `deepspeed train.py ...`, or use torchrun."
        )
    if deepspeed and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            "--deepspeed: accelerate launch has a DeepSpeed configuration already. Remove it there, or leave out "
            "--deepspeed."
        )


# Option names of LLaVA's scripts and of older transformers versions. These scripts must keep working, so
# old names are translated (`RENAMED`) or ignored with a warning (`NO_EFFECT`). If the feature behind an option
# is not supported, the option is accepted only with the value False (`MUST_BE_OFF`), since ignoring it would
# change the result.
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
    "lazy_preprocess": "samples are always read on demand",
    "save_safetensors": "weights are always saved as safetensors",
    "overwrite_output_dir": "the model in the output folder is always replaced, and checkpoint-N folders never",
    "is_multimodal": "each record states whether it has images",
    "version": "the chat template of the tokenizer is used; pass --template for another format",
}
MUST_BE_OFF = {
    "mm_use_im_start_end": "image start and end tokens are",
    "mm_use_im_patch_token": "an image patch token in the vocabulary is",
}
# Both options mean the same here, because lengths always include the image tokens.
GROUP_BY_LENGTH = ("group_by_length", "group_by_modality_length")

Option = tuple[str, list[str]]
"""An option with its values as strings, for example ("lora_r", ["8"])."""


class _Parser(transformers.HfArgumentParser):
    """HfArgumentParser with short error messages, without the usage of a hundred options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n`llava train --help` lists the options.\n")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line and its `--config` file. The command line takes precedence.

    Options may be spelled with dashes or underscores. `--verbose` and `--quiet` set the log level.

    Raises:
        ValueError: An option does not exist, requests an unsupported feature, or does not work on this machine; or
            `--config` or `--data` cannot be read.
    """
    options = split_options(argv)
    given = dict(options)
    if "config" in given:
        config = given["config"][0] if given["config"] else ""
        # Put the command line last: argparse uses the last value of an option.
        options = split_options(to_argv(read_config(config))) + options
        given = dict(options)
    configure_logging(verbose=_is_on(given, "verbose"), quiet=_is_on(given, "quiet"))
    options = [(name, values) for name, values in options if name not in ("verbose", "quiet")]
    given = dict(options)
    from_data = options_from_data(given)
    options += [(name, [value]) for name, value in from_data.options.items()]
    if from_data.recipe:
        options = split_options(to_argv(read_config(from_data.recipe))) + options
    given = dict(options)
    if "output_dir" not in given:
        options.append(("output_dir", [_default_output_dir(given)]))

    # Translate old names before parsing, so that an option overrides the same option under its other name.
    translated: list[str] = []
    for name, values in options:
        translated += translate_option(name, values)
    argument_classes: Any = (ModelArguments, DataArguments, TrainingArguments)
    # Do not allow abbreviations: the code above would not recognize an abbreviated --config.
    parser = _Parser(argument_classes, allow_abbrev=False)
    model, data, training, unknown = parser.parse_args_into_dataclasses(
        translated, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        names = [option.name for group in argument_classes for option in fields(group)]
        known = [f"--{name}" for name in (*names, *RENAMED)]
        raise ValueError(
            f"{describe_unknown(unknown[:1], known)}\n`llava train --help` lists the options."
        )
    return model, data, training


def _is_on(given: Mapping[str, list[str]], name: str) -> bool:
    return name in given and _is_true(name, given[name])


def _is_true(name: str, values: list[str]) -> bool:
    """Return whether a boolean option is on. An option without a value is on.

    Raises:
        ValueError: The option has another value than those that `HfArgumentParser` accepts.
    """
    if not values:
        return True
    try:
        (value,) = values
        return bool(string_to_bool(value))
    except (ValueError, ArgumentTypeError):
        raise ValueError(f"--{name} {' '.join(values)}: expected True or False") from None


def _default_output_dir(given: Mapping[str, list[str]]) -> str:
    """Return output/<name of the language model>-<name of the vision tower>."""
    names = []
    for option in ("model_name_or_path", "vision_tower"):
        values = given.get(option) or [getattr(ModelArguments, option)]
        if values[0]:
            names.append(Path(values[0]).name.lower())
    return str(Path("output") / "-".join(names))


def split_options(argv: list[str]) -> list[Option]:
    """Split a command line into options with their values; dashes in names become underscores.

        ["--lora-r", "8", "--weight_decay=0"] -> [("lora_r", ["8"]), ("weight_decay", ["0"])]

    Raises:
        ValueError: The first argument is not an option.
    """
    options: list[Option] = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            options.append((name.replace("-", "_"), [value] if equals else []))
        elif options:
            options[-1][1].append(argument)
        else:
            raise ValueError(
                f"unexpected argument {argument!r}; expected options only (--name value)."
            )
    return options


class _YamlLoader(yaml.SafeLoader):
    """A YAML loader that loads `off` and `no` as strings, because they are values of options that are not boolean."""

    # Leave out the rules that recognize boolean values.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_config(config: str) -> dict[str, Any]:
    """Return the values in a YAML file of options, by option name.

    Args:
        config: The value of `--config`: the path of the file, or the name of a recipe of the package.

    Raises:
        ValueError: The file does not exist, is not YAML, is not a mapping, or names another file.
    """
    path = resolve_recipe(config)
    try:
        # This is safe, because the loader is derived from SafeLoader.
        values = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not a YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {path}: expected a mapping of option names to values, such as `lora_r: 64`"
        )
    if values.get("config") is not None:
        raise ValueError(
            f"--config {path}: a file cannot name another one (config: {values['config']}). Copy its options into the file."
        )
    return values


def to_argv(values: Mapping[str, Any]) -> list[str]:
    """Convert options to command-line arguments.

    argparse then converts the values of a file, such as 1e-3 (a string in YAML), in the same way as
    values of the command line.

    Args:
        values: Values by option name. None means that the option is not given.
    """
    argv: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        argv.append(f"--{name}")
        if isinstance(value, dict):
            argv.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            argv += map(str, value)
        else:
            argv.append(str(value))
    return argv


def translate_option(name: str, values: list[str]) -> list[str]:
    """Return the command-line arguments of one option, under its current name.

    An option that no longer has an effect is dropped with a warning.

    Raises:
        ValueError: The option requests an unsupported feature of older LLaVA models.
    """
    if name in MUST_BE_OFF:
        if _is_true(name, values):
            raise ValueError(
                f"--{name} True: {MUST_BE_OFF[name]} not supported; pass --{name} False."
            )
        return []
    if name in NO_EFFECT:
        logger.warning("--%s has no effect: %s.", name, NO_EFFECT[name])
        return []
    if name in GROUP_BY_LENGTH:
        strategy = "group_by_length" if _is_true(name, values) else "random"
        return ["--train_sampling_strategy", strategy]
    if name == "image_aspect_ratio" and values == ["square"]:
        # "square" is LLaVA's name for `crop`: the processing that the vision tower's image processor does.
        return ["--image_aspect_ratio", "crop"]
    if name == "local_rank":
        # DeepSpeed's launcher passes it as an option; torch.distributed reads the environment.
        os.environ.setdefault("LOCAL_RANK", values[0])
        return []
    return [f"--{RENAMED.get(name, name)}", *values]


def non_default_options(*arguments: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults, for the log and the checkpoint.

    Access tokens are excluded.

    Args:
        arguments: Dataclass instances.
    """
    changed: dict[str, Any] = {}
    for group in arguments:
        for option in fields(group):
            value = getattr(group, option.name)
            is_secret = option.name.endswith("_token")
            # Skip fields that are not options (`init=False`): transformers computes them.
            if option.init and not is_secret and value != _default(option):
                changed[option.name] = value
    return changed


def _default(option: Any) -> Any:
    """Return the default of a dataclass field."""
    if callable(option.default_factory):
        return option.default_factory()
    return option.default
