"""The fields of PEFT's `LoraConfig` that `--lora_options` accepts, and why it refuses the others.

A field is accepted only if three conditions are met with it: a saved and loaded model has the same logits;
merging and exporting do not change the logits; and a resumed run has the same result as an uninterrupted one. This
module imports neither torch nor PEFT, so that a misspelled name is reported within a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from llava_simplified.options import suggest

# The accepted fields, and the types of their values.
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "use_dora": (bool,),
    "use_rslora": (bool,),
    "init_lora_weights": (bool, str),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
}
# Fields that have an option of their own. They are refused here, so that there is only one way to set them.
_OWN_OPTIONS = {
    "r": "--lora_r",
    "lora_alpha": "--lora_alpha",
    "lora_dropout": "--lora_dropout",
    "bias": "--lora_bias",
}
_SET_HERE = "LLaVA Simplified sets it"
_NOT_MERGED = "it cannot be merged exactly, so the model could not be exported"
_NOT_LINEAR = "only linear layers of the language model have adapters here"
_NO_DATA = "initializations from data or gradients are not supported; pass init_lora_weights pissa"
# All other fields of `LoraConfig`, with the reason why they are refused.
_REFUSED = {
    "task_type": _SET_HERE,
    "peft_type": _SET_HERE,
    "auto_mapping": _SET_HERE,
    "peft_version": _SET_HERE,
    "base_model_name_or_path": _SET_HERE,
    "revision": _SET_HERE,
    "inference_mode": _SET_HERE,
    "fan_in_fan_out": _SET_HERE,
    "runtime_config": "it would not be part of the checkpoint",
    "modules_to_save": _NOT_LINEAR,
    "trainable_token_indices": _NOT_LINEAR,
    "target_parameters": _NOT_LINEAR,
    "ensure_weight_tying": _NOT_LINEAR,
    "layers_pattern": "name the layers in target_modules, or number them in layers_to_transform",
    "layer_replication": "the model would have more layers than its language model",
    "alora_invocation_tokens": _NOT_MERGED,
    "arrow_config": _NOT_MERGED,
    "monteclora_config": _NOT_MERGED,
    "lora_bias": _NOT_MERGED,
    "kasa_config": "it changes the frozen weights, which checkpoints do not contain",
    "velora_config": "its gradients are approximations",
    "use_bdlora": "it is not tested here",
    "use_qalora": "it is for GPTQ weights only, which are not supported",
    "qalora_group_size": "it is for GPTQ weights only, which are not supported",
    "eva_config": _NO_DATA,
    "corda_config": _NO_DATA,
    "lora_ga_config": _NO_DATA,
    "loftq_config": "it changes the frozen weights, which checkpoints do not contain",
    "megatron_config": "models of Megatron are not supported",
    "megatron_core": "models of Megatron are not supported",
}
# Values of `init_lora_weights` that change the frozen weights. A checkpoint contains only the adapter and not this
# change, so they are refused, except for PiSSA: its adapters are converted when they are saved (see pissa.py).
CHANGES_FROZEN_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_INIT_FORMAT = re.compile(r"gaussian|pissa|pissa_niter_[1-9][0-9]*")
# Our YAML loader reads booleans as strings, because `off` is a value of options that are not boolean.
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse_lora_options(text: str) -> dict[str, Any]:
    """Parse and check the value of `--lora_options`. Entries with the value `null` are ignored.

    Args:
        text: A JSON mapping from fields of `LoraConfig` to values. An empty string means no fields.

    Raises:
        ValueError: The text is not a JSON mapping; a name is unknown or refused; or a value is invalid.
    """
    if not text:
        return {}
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--lora_options {text}: not valid JSON ({error}); expected a JSON mapping such as '{{\"use_dora\": true}}'"
        ) from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"--lora_options {text}: expected a JSON mapping such as '{{\"use_dora\": true}}'"
        )
    options: dict[str, Any] = {}
    for name, value in entries.items():
        _check_name(name)
        if value is not None:
            options[name] = _check_value(name, value)
    return options


def pissa_method(options: dict[str, Any]) -> str | None:
    """Return the initialization, "pissa" or "pissa_niter_N", if the options request PiSSA; else None."""
    method = options.get("init_lora_weights")
    if isinstance(method, str) and method.startswith("pissa"):
        return method
    return None


def _check_name(name: str) -> None:
    """Raise ValueError unless `--lora_options` accepts the field."""
    if name in _ACCEPTED:
        return
    if name in _OWN_OPTIONS:
        raise ValueError(f"--lora_options: {name} has its own option; pass {_OWN_OPTIONS[name]}")
    if name in _REFUSED:
        raise ValueError(f"--lora_options: {name} is not supported: {_REFUSED[name]}")
    hint = suggest(name, [*_ACCEPTED, *_OWN_OPTIONS, *_REFUSED])
    accepted = ", ".join(_ACCEPTED)
    raise ValueError(
        f"--lora_options: LoraConfig has no field {name!r}{hint}. Accepted fields: {accepted}"
    )


def _check_value(name: str, value: Any) -> Any:
    """Convert a value to the type of its field; raise ValueError if it is invalid."""
    types = _ACCEPTED[name]
    # Booleans from YAML files are strings here; see `_BOOLEANS`.
    if bool in types and isinstance(value, str):
        value = _BOOLEANS.get(value.lower(), value)
    if not _has_type(value, types):
        expected = " or ".join(_TYPE_NAMES[kind] for kind in types)
        raise ValueError(f"--lora_options: {name} must be {expected}, not {json.dumps(value)}")
    if name == "init_lora_weights":
        _check_initialization(value)
    elif name == "layers_to_transform":
        # A single number means a list with one number, as in PEFT.
        value = _as_list(value)
        _check_all(name, value, "layer numbers from 0", lambda v: _is_number(v, int) and v >= 0)
    elif name == "rank_pattern":
        _check_all(
            name, value.values(), "positive integers", lambda v: _is_number(v, int) and v > 0
        )
    elif name == "alpha_pattern":
        _check_all(
            name, value.values(), "positive numbers", lambda v: _is_number(v, float) and v > 0
        )
    elif isinstance(value, list):
        _check_all(name, value, "names of layers", lambda v: isinstance(v, str) and v)
    return value


# Names of the types, for messages.
_TYPE_NAMES = {
    bool: "true or false",
    str: "a string",
    list: "a list",
    int: "an integer",
    dict: "a mapping",
}


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    # `isinstance(True, int)` is true in Python, so check booleans separately.
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any, kind: type) -> bool:
    """Return whether a value is an int, or (if `kind` is float) an int or a float. A boolean is not a number."""
    accepted = (int, float) if kind is float else (int,)
    return isinstance(value, accepted) and not isinstance(value, bool)


def _check_all(name: str, values: Iterable[Any], expected: str, is_valid: Any) -> None:
    """Raise ValueError if `values` is empty or contains an invalid value.

    Args:
        name: The field, for the message.
        values: The elements of a list, or the values of a mapping.
        expected: Description of valid values in the plural, for the message.
        is_valid: Function that returns whether one value is valid.
    """
    found = list(values)
    if not found or not all(is_valid(value) for value in found):
        raise ValueError(f"--lora_options: {name} must contain {expected}, not {json.dumps(found)}")


def _check_initialization(value: bool | str) -> None:
    """Raise ValueError unless the initialization is supported."""
    if value is True or (isinstance(value, str) and _INIT_FORMAT.fullmatch(value)):
        return
    reason = ""
    if isinstance(value, str) and value.startswith(CHANGES_FROZEN_WEIGHTS):
        reason = ": it changes the frozen weights, which checkpoints do not contain"
    raise ValueError(
        f"--lora_options: init_lora_weights {json.dumps(value)} is not supported{reason}. Expected true, gaussian, "
        "pissa, or pissa_niter_N (a faster, approximate decomposition, for example pissa_niter_16)"
    )
