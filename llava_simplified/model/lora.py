"""What trains: LoRA on the language model, the projector beside it, and a table to see it."""

from __future__ import annotations

from typing import NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from llava_simplified.model.llava import Llava


class Part(NamedTuple):
    """One row of the table: `trained` of `parameters` numbers of a part of the model."""

    name: str
    parameters: int
    trained: int
    dtypes: str


def adapted_layers(language_model: nn.Module) -> list[str]:
    """Full paths of all linear layers of a language model but its head (Dettmers et al., QLoRA: adapt them all).

    Full paths, since a bare "all-linear" or "q_proj" would also match the layers of a vision tower.
    """
    head = language_model.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in language_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def add_lora(model: Llava, rank: int, alpha: float, dropout: float = 0.0, bias: str = "none") -> None:
    """Wrap the language model in a PEFT LoRA adapter; its own weights are frozen, the adapter is float32.

    Args:
        bias: "none", "all" or "lora_only": which of the linear layers' biases are trained as well.
    """
    layers = adapted_layers(model.language_model)
    if not layers:
        raise ValueError(f"{type(model.language_model).__name__} has no linear layer for LoRA: use --lora_enable False")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        bias=bias,  # type: ignore[arg-type]
        target_modules=layers,
        task_type="CAUSAL_LM",
    )
    model.language_model = get_peft_model(model.language_model, config)  # type: ignore[assignment]


def freeze(model: Llava, *, language_model: bool) -> None:
    """Freeze the vision tower, train the projector, and freeze the language model where asked.

    What is trained is float32, whatever the frozen weights are: bfloat16 would round small updates away.
    """
    model.vision_tower.requires_grad_(False).eval()
    model.projector.requires_grad_(True).float()
    if language_model:
        model.language_model.requires_grad_(False)
    else:
        model.language_model.requires_grad_(True).float()


def parts(model: Llava) -> list[Part]:
    """Count the parameters: vision tower, projector, language model, LoRA adapter."""
    groups: dict[str, list[nn.Parameter]] = {
        "vision tower": list(model.vision_tower.parameters()),
        "projector": list(model.projector.parameters()),
        "language model": [p for n, p in model.language_model.named_parameters() if "lora_" not in n],
        "LoRA adapter": [p for n, p in model.language_model.named_parameters() if "lora_" in n],
    }
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


def check_trainable(model: Llava, *, language_model: bool = False) -> str:
    """Assert that exactly what should train does, and return the table as text.

    Args:
        language_model: the language model's own weights are meant to be trained (full fine-tuning).

    Raises:
        RuntimeError: a part trains that should not, or does not train whole.
    """
    biases = isinstance(model.language_model, PeftModel) and model.language_model.peft_config["default"].bias != "none"
    whole = {"vision tower": False, "projector": True, "language model": language_model, "LoRA adapter": True}
    rows = parts(model)
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}  dtype"]
    for part in rows:
        expected = part.parameters if whole[part.name] else 0
        if part.trained != expected and not (biases and part.name == "language model"):
            raise RuntimeError(f"{part.name}: {part.trained:,} parameters train, should be {expected:,}")
        lines.append(f"{part.name:<16}{part.parameters:>16,}{part.trained:>16,}  {part.dtypes}")
    total, trained = sum(p.parameters for p in rows), sum(p.trained for p in rows)
    lines.append(f"{'together':<16}{total:>16,}{trained:>16,}  ({trained / total:.2%})")
    return "\n".join(lines)
