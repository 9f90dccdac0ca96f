"""What trains: LoRA on the language model, the projector beside it, the tower where asked; and a table to see it."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from llava_simplified.model.config import TrainedParts
from llava_simplified.model.llava import Llava
from llava_simplified.model.protocols import CausalLM


class Part(NamedTuple):
    """One row of the table: `trained` of `parameters` numbers of a part of the model."""

    name: str
    parameters: int
    trained: int
    dtypes: str


def find_linear_modules(language_model: CausalLM) -> list[str]:
    """Full paths of all linear layers of a language model but its head (Dettmers et al., QLoRA: adapt them all).

    Full paths, since a bare "all-linear" or "q_proj" would also match the layers of a vision tower.
    """
    head = language_model.get_output_embeddings()
    return [
        name
        for name, module in language_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def add_lora(
    model: Llava, rank: int, alpha: float, dropout: float = 0.0, bias: str = "none"
) -> None:
    """Wrap the language model in a PEFT LoRA adapter; its own weights are frozen, the adapter is float32.

    Args:
        bias: "none", "all" or "lora_only": which of the linear layers' biases are trained as well.
    """
    text = model.language_model
    model.language_model = _adapt(
        text, find_linear_modules(text), rank, alpha, dropout, bias, "CAUSAL_LM"
    )


def add_tower_lora(model: Llava, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Wrap the vision tower in an adapter of its own, on the linear layers that its features come through."""
    tower = model.vision_tower
    layers = [
        n
        for n, m in tower.model.named_modules()
        if isinstance(m, nn.Linear) and f"{n}.weight" in tower.used_parameters
    ]
    tower.model = _adapt(tower.model, layers, rank, alpha, dropout, "none", None)


def _adapt(
    model: Any,
    layers: list[str],
    rank: int,
    alpha: float,
    dropout: float,
    bias: str,
    task: str | None,
) -> Any:
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no linear layer for LoRA: train it whole, or not at all"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        bias=bias,  # type: ignore[arg-type]
        target_modules=layers,
        task_type=task,
    )
    return get_peft_model(model, config)


def freeze(model: Llava, parts: TrainedParts) -> None:
    """Freeze everything except the projector and the models whose own weights are trained.

    Adapters come afterward: `add_lora` and `add_tower_lora` freeze the model that they adapt.

    What is trained becomes float32, whatever the frozen weights are: bfloat16 would round small updates away.
    """
    tower = model.vision_tower.requires_grad_(False)
    if parts.vision_tower == "full":
        for name, parameter in tower.float().model.named_parameters():
            parameter.requires_grad_(name in tower.used_parameters)
    tower.eval()
    model.projector.requires_grad_(True).float()
    if parts.language_model == "full":
        model.language_model.requires_grad_(True).float()
    else:
        model.language_model.requires_grad_(False)


def count_parameters(model: Llava) -> list[Part]:
    """Count the parameters: vision tower and its adapter, projector, language model and its adapter."""
    tower, text = model.vision_tower.named_parameters(), model.language_model.named_parameters()
    groups: dict[str, list[nn.Parameter]] = {"vision tower": [], "vision adapter": []}
    groups |= {
        "projector": list(model.projector.parameters()),
        "language model": [],
        "LoRA adapter": [],
    }
    for whole, adapter, named in (
        ("vision tower", "vision adapter", tower),
        ("language model", "LoRA adapter", text),
    ):
        for name, parameter in named:
            groups[adapter if "lora_" in name else whole].append(parameter)
    return [
        Part(
            name,
            sum(p.numel() for p in group),
            sum(p.numel() for p in group if p.requires_grad),
            ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in group})),
        )
        for name, group in groups.items()
        if group or name == "projector"
    ]


def check_trainable(model: Llava, parts: TrainedParts) -> str:
    """Assert that exactly what should train does, and return the table as text.

    Raises:
        RuntimeError: a part trains that should not, or does not train whole.
    """
    text, tower = model.language_model, model.vision_tower
    biases = False
    if isinstance(text, PeftModel):
        lora_config: Any = text.peft_config["default"]
        biases = lora_config.bias != "none"
    used_parameters = sum(
        p.numel() for n, p in tower.model.named_parameters() if n in tower.used_parameters
    )
    rows = count_parameters(model)
    should = {row.name: row.parameters for row in rows}
    should |= {"vision tower": used_parameters if parts.vision_tower == "full" else 0}
    should |= {} if parts.language_model == "full" else {"language model": 0}
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}  dtype"]
    for part in rows:
        if part.trained != should[part.name] and not (biases and part.name == "language model"):
            raise RuntimeError(
                f"{part.name}: {part.trained:,} parameters train, should be {should[part.name]:,}"
            )
        lines.append(f"{part.name:<16}{part.parameters:>16,}{part.trained:>16,}  {part.dtypes}")
    total, trained = sum(p.parameters for p in rows), sum(p.trained for p in rows)
    lines.append(f"{'together':<16}{total:>16,}{trained:>16,}  ({trained / total:.2%})")
    return "\n".join(lines)
