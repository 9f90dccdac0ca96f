"""Select the trained parameters (LoRA adapters, the projector, full models), and check the selection.

freeze(model, parts)                  1. freeze everything except the projector and the models trained in full
add_lora(...), add_tower_lora(...)    2. add trainable adapters to frozen models
check_trainable(model, parts)         3. raise an error unless the expected number of parameters is trainable
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from llava_simplified.model.config import TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.lora_options import pissa_method
from llava_simplified.model.lora_targets import expand_pattern, select_layers
from llava_simplified.model.peft_names import LoraConfig, PeftModel, get_peft_model
from llava_simplified.model.protocols import CausalLM, VisionModel


class PartCount(NamedTuple):
    """The number of parameters of one part of the model.

    Attributes:
        name: Name of the part ("vision tower", "LoRA adapter", ...).
        parameters: Number of parameters (scalars).
        trained: Number of trained parameters.
        dtypes: Data types of the parameters, separated by commas.
    """

    name: str
    parameters: int
    trained: int
    dtypes: str


def freeze(model: Llava, parts: TrainedParts) -> None:
    """Freeze everything except the projector and the models whose own weights are trained.

    Trained weights are converted to float32, whatever the dtype of the frozen weights: bfloat16 has only 8 bits
    of precision, so small updates would be lost to rounding.

    Adapters are added afterward, by `add_lora` and `add_tower_lora`.
    """
    tower = model.vision_tower
    tower.requires_grad_(False)
    if parts.vision_tower == "full":
        tower.float()
        for name, parameter in tower.model.named_parameters():
            parameter.requires_grad_(name in tower.used_parameters)
    # Set the mode after `requires_grad`, because `VisionTower.train` depends on it.
    tower.eval()

    # The projector is always trained, since a new model starts with a random one.
    model.projector.requires_grad_(True).float()

    if parts.language_model == "full":
        model.language_model.requires_grad_(True).float()
    else:
        model.language_model.requires_grad_(False)


def add_lora(
    model: Llava,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    bias: str = "none",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Wrap the language model in a PEFT LoRA adapter (Hu et al., 2021). The adapter is float32.

    Args:
        model: Modified in place.
        rank: Rank r of the low-rank matrices.
        alpha: Scale of the adapter: its output is multiplied by alpha / r.
        dropout: Dropout probability at the input of the adapter.
        bias: Which biases of the linear layers are trained as well: "none", "all" or "lora_only".
        options: More fields of `LoraConfig`, as `parse_lora_options` returns them. If they request PiSSA, it is
            only stored in the adapter's config. `pissa.initialize` changes the weights later, unless a checkpoint
            is loaded.

    Raises:
        ValueError: The options name a layer that the model does not have or that is not linear, or the model has no
            linear layers.
    """
    lm = model.language_model
    layers = find_linear_modules(lm)
    fields = dict(options or {})
    if layers:
        others = [name for name, _ in lm.named_modules() if name and name not in set(layers)]
        layers = select_layers(layers, others, fields)
    # The config of the adapter contains the full names of the selected layers, so these fields are no longer
    # needed. For the same reason, expand patterns to one value per layer.
    for name in ("target_modules", "exclude_modules", "layers_to_transform"):
        fields.pop(name, None)
    for name in ("rank_pattern", "alpha_pattern"):
        if name in fields:
            fields[name] = expand_pattern(name, fields[name], layers)
    method = pissa_method(fields)
    if method:
        del fields["init_lora_weights"]
    adapted = _adapt(
        lm, layers, rank, alpha, dropout, bias=bias, task_type="CAUSAL_LM", fields=fields
    )
    # PEFT would initialize the adapter by PiSSA at once, so set the method only now.
    if method:
        config: Any = adapted.peft_config["default"]
        config.init_lora_weights = method
    model.language_model = cast(CausalLM, adapted)


def add_tower_lora(
    model: Llava,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
) -> None:
    """Wrap the vision tower in a LoRA adapter for the linear layers that its features depend on.

    For the arguments, see `add_lora`.
    """
    tower = model.vision_tower
    layers: list[str] = []
    for name, module in tower.model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in tower.used_parameters:
            layers.append(name)
    adapted = _adapt(tower.model, layers, rank, alpha, dropout, bias="none", task_type=None)
    tower.model = cast(VisionModel, adapted)


def find_linear_modules(language_model: CausalLM) -> list[str]:
    """Return the full names of all linear layers except the lm_head.

    Dettmers et al. (QLoRA, 2023) recommend adapting all linear layers. Full names are necessary, because
    "q_proj" or "all-linear" would also match layers of the vision tower when another tool loads the adapter.
    """
    lm_head = language_model.get_output_embeddings()
    names: list[str] = []
    for name, module in language_model.named_modules():
        # GPT-2 uses Conv1D for its linear layers.
        if isinstance(module, (nn.Linear, Conv1D)) and module is not lm_head:
            names.append(name)
    return names


def count_parameters(model: Llava) -> list[PartCount]:
    """Count the parameters of the vision tower, the projector, the language model and their adapters.

    Returns:
        One entry per part. There is no entry for an adapter that does not exist. The projector always has an entry,
        even if it has no parameters.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "vision tower": [],
        "vision adapter": [],
        "projector": list(model.projector.parameters()),
        "language model": [],
        "LoRA adapter": [],
    }
    # The names of an adapter's parameters contain "lora_A", "lora_B" or "lora_magnitude_vector" (DoRA).
    for name, parameter in model.vision_tower.named_parameters():
        groups["vision adapter" if "lora_" in name else "vision tower"].append(parameter)
    for name, parameter in model.language_model.named_parameters():
        groups["LoRA adapter" if "lora_" in name else "language model"].append(parameter)

    rows: list[PartCount] = []
    for name, group in groups.items():
        if not group and name != "projector":
            continue
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in group}
        rows.append(
            PartCount(
                name=name,
                parameters=sum(parameter.numel() for parameter in group),
                trained=sum(parameter.numel() for parameter in group if parameter.requires_grad),
                dtypes=", ".join(sorted(dtypes)),
            )
        )
    return rows


def check_trainable(model: Llava, parts: TrainedParts) -> str:
    """Check the number of trained parameters of each part, and return a table for the log.

    Args:
        model: The model, after `freeze`, `add_lora` and `add_tower_lora`.
        parts: The parts that should be trained. The projector and all adapters should be trained in any case.

    Raises:
        RuntimeError: The number of trained parameters of a part differs from the expected number.
    """
    rows = count_parameters(model)
    # Compute the expected number of trained parameters. All parameters of the adapters and the projector are trained.
    # In a vision tower that is trained in full, only the parameters that its features depend on are trained.
    expected = {row.name: row.parameters for row in rows}
    expected["vision tower"] = 0
    if parts.vision_tower == "full":
        tower = model.vision_tower
        used = [p for name, p in tower.model.named_parameters() if name in tower.used_parameters]
        expected["vision tower"] = sum(parameter.numel() for parameter in used)
    if parts.language_model != "full":
        expected["language model"] = 0

    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}  dtype"]
    for row in rows:
        # With --lora_bias, LoRA also trains biases that belong to the language model, not the adapter.
        is_exempt = row.name == "language model" and _trains_biases(model.language_model)
        if row.trained != expected[row.name] and not is_exempt:
            raise RuntimeError(
                f"{row.name}: {row.trained:,} parameters are trainable, expected {expected[row.name]:,}; "
                "call `freeze` before adding adapters, and do not change `requires_grad` afterward"
            )
        lines.append(f"{row.name:<16}{row.parameters:>16,}{row.trained:>16,}  {row.dtypes}")
    total = sum(row.parameters for row in rows)
    trained = sum(row.trained for row in rows)
    lines.append(f"{'total':<16}{total:>16,}{trained:>16,}  ({trained / total:.2%})")
    return "\n".join(lines)


def _adapt(
    model: CausalLM | VisionModel,
    layers: list[str],
    rank: int,
    alpha: float,
    dropout: float,
    bias: str,
    task_type: str | None,
    fields: Mapping[str, Any] | None = None,
) -> PeftModel:
    """Add LoRA adapters to the layers with these names.

    Raises:
        ValueError: There are no layers.
    """
    if not layers:
        raise ValueError(
            f"LoRA does not support {type(model).__name__}, which has no linear layers; train all its "
            "weights, or freeze it"
        )
    # Store full names: PEFT also matches names by their endings, and other tools load the adapter into a
    # model that contains both the language model and the vision tower.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        bias=bias,  # type: ignore[arg-type]
        target_modules=layers,
        task_type=task_type,
        **(fields or {}),
    )
    return get_peft_model(cast(Any, model), config)


def _trains_biases(language_model: CausalLM) -> bool:
    """Return whether the adapter of the language model also trains biases (--lora_bias)."""
    if not isinstance(language_model, PeftModel):
        return False
    config: Any = language_model.peft_config["default"]
    return config.bias != "none"
