"""Loss and gradients of preference pairs equal those of TRL's DPOTrainer, with a model that both can load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS
from training_runs import run_training, training_options

from llava_simplified.arguments import parse_arguments
from llava_simplified.export.stock import export_stock
from llava_simplified.training.build_trainer import build_trainer

pytest.importorskip("trl", reason="TRL is not installed (extra: bench)")

# Number of pairs (their answers differ in length), our options, TRL's options. TRL's loss "aot" of a single pair is that
# of conservative DPO, and its "sft" is the mean over the tokens of the chosen answer.
CASES: list[tuple[int, dict[str, float], dict[str, Any]]] = [
    (3, {}, {"loss_type": ["sigmoid"]}),
    (1, {"sft_weight": 0.4}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}),
    (1, {"dpo_label_smoothing": 0.2}, {"loss_type": ["aot"], "label_smoothing": 0.2}),
]


@pytest.fixture(scope="module")
def pairs(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three pairs, and a checkpoint whose language model was trained in full."""
    folder = tmp_path_factory.mktemp("trl")
    random = np.random.default_rng(0)
    rows = []
    for index in range(3):
        # The images are as large as the tower's input, so neither library resizes them.
        pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        row = {"image": f"{index}.png", "instruction": "What is this?"}
        rows.append({**row, "chosen": CAPTIONS[index], "rejected": CAPTIONS[index + 2]})
    (folder / "train.json").write_text(json.dumps(rows))
    run_training(options_of(models_folder, folder, "start", max_steps=1))
    return folder


def options_of(models_folder: Path, folder: Path, output: str, **changes: object) -> list[str]:
    values = {
        "model_name_or_path": models_folder / "llama",
        "train_data_path": folder / "train.json",
        "train_image_folder": folder,
        "mm_projector_type": "mlp2x_gelu",
        "lora_enable": False,
        "freeze_backbone": False,
        "cache_vision_features": "off",
        **changes,
    }
    return training_options(models_folder, folder, folder / output, **values)


def trl_batch(trainer: Any, folder: Path, count: int) -> Any:
    """Return a batch of TRL with the first pairs."""
    examples = []
    for row in json.loads((folder / "train.json").read_text())[:count]:
        examples.append(
            {
                "images": [Image.open(folder / row["image"])],
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
        )
    return trainer.data_collator(examples)


def stock_name(name: str) -> str:
    """Return the name of a weight in transformers' model."""
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^projector\.0\.", "model.multi_modal_projector.linear_1.", name)
    return re.sub(r"^projector\.2\.", "model.multi_modal_projector.linear_2.", name)


@pytest.mark.medium
@pytest.mark.parametrize(("count", "options", "trl_options"), CASES)
def test_loss_and_gradients_of_dpo_equal_those_of_trl(
    models_folder: Path,
    pairs: Path,
    tmp_path: Path,
    count: int,
    options: dict[str, float],
    trl_options: dict[str, Any],
) -> None:
    from datasets import Dataset
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import DPOConfig, DPOTrainer

    changes = {"objective": "dpo", "init_from": pairs / "start", "dpo_beta": 0.2, **options}
    trainer, _ = build_trainer(*parse_arguments(options_of(models_folder, pairs, "run", **changes)))
    model = trainer.unwrapped_model
    trainer.save_model(str(tmp_path / "reference"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    trainer.save_model(str(tmp_path / "current"))
    examples = trainer.train_dataset
    batch = dict(trainer.data_collator([examples[index] for index in range(count)]))
    del batch["metadata"]
    loss, _ = trainer.summed_loss(model, batch)
    loss = loss / count
    loss.backward()

    folders = {}
    for name in ("reference", "current"):
        folders[name] = tmp_path / f"stock-{name}"
        export_stock(tmp_path / name, folders[name], dtype="float32")
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.2,
        bf16=False,
        use_cpu=True,
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
        **trl_options,
    )

    def load(name: str) -> LlavaForConditionalGeneration:
        stock = LlavaForConditionalGeneration.from_pretrained(folders[name], dtype=torch.float32)
        # The exported vocabulary has one more token, for images, which ours cannot predict.
        vocabulary = model.language_model.get_output_embeddings().weight.shape[0]
        stock.lm_head.weight.data = stock.lm_head.weight.data[:vocabulary]
        return stock

    rows = [{"images": [], "prompt": [], "chosen": [], "rejected": []}]
    peer = DPOTrainer(
        model=load("current"),
        ref_model=load("reference"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folders["current"]),
    )
    peer_batch = trl_batch(peer, pairs, count)
    # Both sides train the same tokens.
    mask = peer_batch["completion_mask"].bool()
    found = torch.cat([peer_batch["input_ids"][index][mask[index]] for index in range(2 * count)])
    assert sorted(found.tolist()) == sorted(batch["labels"].tolist())
    peer_loss = peer.compute_loss(peer.model, peer_batch)
    peer_loss.backward()
    assert abs(peer_loss.item() - 0.6931) > 0.01  # the model is no longer its reference
    torch.testing.assert_close(loss, peer_loss, rtol=1e-5, atol=1e-5)

    gradients = dict(peer.model.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = gradients[stock_name(name)].grad[: len(parameter)]
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                parameter.grad, expected, rtol=1e-5, atol=1e-5 * max(scale, 1), msg=name
            )
            assert expected.abs().max() > 1e-4 or "bias" in name
            compared += 1
    assert compared > 20
