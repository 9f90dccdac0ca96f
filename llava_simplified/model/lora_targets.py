"""Select the linear layers of the language model that `--lora_options` names.

The rules are those of PEFT. An entry of a list matches the layers with this name, and those whose name ends with
it ("q_proj"). A string is a regular expression for the complete name. "all-linear" means all layers. Unlike in
PEFT, it is an error if an entry matches no layer, or anything other than a linear layer. Checkpoints store the
full names of the layers, because a pattern could match other layers in another version of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_simplified.options import suggest


def select_layers(
    linear: Sequence[str], others: Sequence[str], options: Mapping[str, Any]
) -> list[str]:
    """Return the names of the layers that get an adapter, in the order of the model.

    Args:
        linear: Full names of the linear layers that can have an adapter.
        others: Full names of all other modules of the language model, including the lm_head.
        options: The result of `parse_lora_options`.

    Raises:
        ValueError: An entry matches no layer, or a module that cannot have an adapter; or no layer is left.
    """
    # Start with the layers of target_modules, and then apply the two options that remove some of them.
    targets = options.get("target_modules", "all-linear")
    chosen = list(linear)
    if targets != "all-linear":
        chosen = _match("target_modules", targets, linear, others)
    if "exclude_modules" in options:
        # Excluding a module that has no adapter anyway does no harm, so do not check `others` here.
        excluded = set(_match("exclude_modules", options["exclude_modules"], chosen, others=()))
        chosen = [name for name in chosen if name not in excluded]
    if "layers_to_transform" in options:
        chosen = _select_numbers(chosen, options["layers_to_transform"])
    if not chosen:
        raise ValueError(
            "--lora_options: exclude_modules leaves no layer to train; name fewer modules in it"
        )
    return chosen


def expand_pattern(name: str, pattern: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Return the value for each layer that a `rank_pattern` or `alpha_pattern` matches.

    Args:
        name: The field ("rank_pattern" or "alpha_pattern"), for messages.
        pattern: Values by name or regular expression. If several of them match a layer, the first one applies, as
            in PEFT.
        layers: Full names of the adapted layers.

    Raises:
        ValueError: An entry matches no layer, or is not a regular expression.
    """
    expanded: dict[str, Any] = {}
    for key, value in pattern.items():
        expression = _compile(name, rf"(.*\.)?({key})")
        matched = [layer for layer in layers if expression.fullmatch(layer)]
        if not matched:
            raise ValueError(_no_match(name, key, layers))
        for layer in matched:
            expanded.setdefault(layer, value)  # an earlier entry takes precedence
    return expanded


def _match(
    field: str, entries: str | Sequence[str], layers: Sequence[str], others: Sequence[str]
) -> list[str]:
    """Return the layers that match a regular expression, or one of several names.

    Args:
        field: The field, for messages.
        entries: A regular expression for complete names, or a list of (endings of) names.
        layers: Full names of the layers that may be matched.
        others: Full names of modules that must not be matched.

    Raises:
        ValueError: An entry matches none of the layers, or one of the other modules.
    """
    expressions: dict[str, re.Pattern[str]] = {}
    if isinstance(entries, str):
        expressions[entries] = _compile(field, entries)
    else:
        for entry in entries:
            expressions[entry] = _compile(field, rf"(.*\.)?{re.escape(entry)}")
    matched: set[str] = set()
    for entry, expression in expressions.items():
        # Refuse an entry that also matches other kinds of modules, because PEFT would adapt some of them, such as
        # embeddings.
        wrong = [name for name in others if expression.fullmatch(name)]
        if wrong:
            raise ValueError(
                f"--lora_options: {field} {entry!r} matches {wrong[0]}, which cannot have an adapter. Name only "
                "linear layers of the language model, and not its output layer."
            )
        found = [name for name in layers if expression.fullmatch(name)]
        if not found:
            raise ValueError(_no_match(field, entry, layers))
        matched.update(found)
    return [name for name in layers if name in matched]


def _no_match(field: str, entry: str, layers: Sequence[str]) -> str:
    """Return the message for an entry that matches no layer. It lists the last parts of the layers' names."""
    endings = sorted({layer.rpartition(".")[2] for layer in layers})
    return (
        f"--lora_options: {field} {entry!r} matches no linear layer of the language model"
        f"{suggest(entry, endings)} (its layers: {', '.join(endings)})"
    )


def _compile(field: str, expression: str) -> re.Pattern[str]:
    """Compile a regular expression; raise ValueError if it is not one."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"--lora_options: {field} {expression!r} is not a regular expression: {error}"
        ) from error


def _select_numbers(layers: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return the layers in the blocks with these numbers; the layer "layers.3.mlp" is in block 3."""
    blocks: dict[str, int] = {}
    for layer in layers:
        # Use the first number in the name. A later number may be the index of an expert inside the block.
        match = re.search(r"(?<=\.)\d+(?=\.)", layer)
        if match:
            blocks[layer] = int(match[0])
    missing = sorted(set(numbers) - set(blocks.values()))
    if missing:
        last = max(blocks.values(), default=0)
        raise ValueError(
            f"--lora_options: layers_to_transform {missing[0]}: no selected layer is in a block with this number; the "
            f"last block is {last}"
        )
    return [layer for layer in layers if blocks.get(layer) in numbers]
