"""Training on preference pairs: its loss, and what it improves, resumes, logs and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import CAPTIONS
from torch.nn.functional import logsigmoid
from training_runs import (
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

from llava_simplified.arguments import parse_arguments
from llava_simplified.data.packing import PackedDataset
from llava_simplified.training.build_trainer import build_trainer
from llava_simplified.training.dry_run import dry_run
from llava_simplified.training.plan import make_plan
from llava_simplified.training.preference_trainer import PreferenceTrainer

MakeOptions = Callable[..., list[str]]


@pytest.fixture(scope="module")
def pairs_folder(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a checkpoint to start from, and 12 pairs, one of them without an image."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = json.loads((data_folder / "train.json").read_text())
    for index, row in enumerate(rows):
        row["chosen"] = row.pop("response")
        row["rejected"] = CAPTIONS[(index + 1) % len(CAPTIONS)]
    del rows[2]["image"]
    (folder / "train.json").write_text(json.dumps(rows))
    options = training_options(models_folder, data_folder, folder / "start", max_steps=3)
    run_training(options)
    return folder


@pytest.fixture
def dpo_options(
    models_folder: Path, data_folder: Path, pairs_folder: Path, tmp_path: Path
) -> MakeOptions:
    """Return a function that makes the command line of a run on pairs."""

    def make(output: str = "out", **changes: object) -> list[str]:
        values: dict[str, object] = {
            "init_from": pairs_folder / "start",
            "objective": "dpo",
            "train_data_path": pairs_folder / "train.json",
            "max_steps": 2,
            "cache_vision_features": "off",
            **changes,
        }
        return training_options(models_folder, data_folder, tmp_path / output, **values)

    return make


def prepare_trainer(options: list[str]) -> tuple[PreferenceTrainer, dict[str, torch.Tensor]]:
    """Return a trainer whose adapter differs from the reference, and the batch of the first records."""
    trainer, _ = build_trainer(*parse_arguments(options))
    assert isinstance(trainer, PreferenceTrainer)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.unwrapped_model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise
    packs = trainer.train_dataset
    is_packed = isinstance(packs, PackedDataset)
    dataset = packs.dataset if is_packed else packs
    examples = [dataset[index] for index in range(3)]
    batch = dict(trainer.data_collator([examples] if is_packed else examples))
    del batch["metadata"]
    return trainer, batch


def test_loss_equals_a_loop_over_separate_sequences(dpo_options: MakeOptions) -> None:
    """The loop calls the model's `forward` for one sequence at a time. Label smoothing and supervised loss are on."""
    options = {"dpo_beta": 0.3, "dpo_label_smoothing": 0.1, "sft_weight": 0.5}
    trainer, batch = prepare_trainer(dpo_options(**options))
    loss, _ = trainer.summed_loss(trainer.unwrapped_model, batch)

    model = trainer.unwrapped_model
    dataset = trainer.train_dataset
    expected = 0.0
    for index in range(3):
        record = dataset.records[index]
        sums: list[float] = []
        for text in (record.responses[0], record.rejected):
            sample = model.prompt.render(record.turns, text)
            example = dataset[index]
            example.input_ids, example.labels, example.branches = *sample, None
            example.answer_lengths = ()
            row = dict(trainer.data_collator([example]))
            del row["metadata"]
            current = model(**row).log_probs
            with trainer._reference.in_place_of_current(model):
                before = model(**row).log_probs
            sums.append(float((current - before).sum().detach()))
            if len(sums) == 1:
                expected -= 0.5 * float(current.mean().detach())
        margin = torch.tensor(0.3 * (sums[0] - sums[1]))
        assert abs(margin) > 0.01
        expected -= float(0.9 * logsigmoid(margin) + 0.1 * logsigmoid(-margin))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{"share_prefix": False}, {"packing": True}])
def test_separate_and_packed_pairs_have_the_same_gradient(
    dpo_options: MakeOptions, changes: dict[str, object]
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []
    rows: list[int] = []
    for options in (dpo_options(), dpo_options(**changes)):
        trainer, batch = prepare_trainer(options)
        rows.append(len(batch["input_ids"]))
        loss, _ = trainer.summed_loss(trainer.unwrapped_model, batch)
        loss.backward()
        named = trainer.unwrapped_model.named_parameters()
        gradients.append({name: weight.grad for name, weight in named if weight.requires_grad})
    assert rows == [3, 1 if "packing" in changes else 6]
    first, second = gradients
    assert max(gradient.abs().max() for gradient in first.values()) > 1e-3
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.medium
def test_chosen_answers_become_likelier_than_rejected_ones(dpo_options: MakeOptions) -> None:
    """The first margin is zero, because the model is its own reference.

    The run uses packs, cached features and bfloat16.
    """
    changes = {"packing": True, "pack_length": 128, "cache_vision_features": "memory"}
    output = run_training(dpo_options(max_steps=12, learning_rate=1e-2, bf16=True, **changes))
    # On a CPU, attention without gradients has another kernel, which rounds differently in bfloat16.
    assert read_log(output)[0] == pytest.approx(0.6931, abs=0.01)
    assert read_log(output)[-1] < 0.5
    assert read_log(output, "accuracy")[-1] > 0.9
    chosen, rejected = (read_log(output, f"reward_{name}") for name in ("chosen", "rejected"))
    margins = read_log(output, "margin")
    for values in zip(chosen, rejected, margins):
        assert values[0] - values[1] == pytest.approx(values[2], abs=1e-5)


@pytest.mark.medium
def test_resumed_run_and_accumulation_give_the_same_weights(dpo_options: MakeOptions) -> None:
    changes: dict[str, object] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "sft_weight": 0.1,
        "train_sampling_strategy": "sequential",
    }
    output = run_training(dpo_options("whole", **changes))
    options = dpo_options("resumed", **changes)
    again = run_training([*options, "--resume_from_checkpoint", str(output / "checkpoint-2")])
    assert_equal_weights(trained_weights(output), trained_weights(again))
    # Margin and loss are equal too: the reference is not the checkpoint that was resumed.
    for key in ("margin", "loss"):
        assert read_log(again, key) == read_log(output, key)[-2:]

    changes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    at_once = run_training(dpo_options("at_once", **changes))
    assert read_log(at_once) == pytest.approx(read_log(output), rel=1e-5)
    assert read_log(at_once, "margin") == pytest.approx(read_log(output, "margin"), abs=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("starts_from_adapter", [True, False])
def test_resumed_run_with_pissa_gives_the_same_weights(
    dpo_options: MakeOptions,
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    starts_from_adapter: bool,
) -> None:
    """The frozen weights are changed at the start, and a reference must not change them again."""
    lora_options = '{"init_lora_weights": "pissa"}'
    start = run_training(
        training_options(
            models_folder,
            data_folder,
            tmp_path / "start",
            max_steps=1,
            **{"lora_options": lora_options}
            if starts_from_adapter
            else {"tune_mm_mlp_adapter": True},
        )
    )
    changes: dict[str, object] = {
        "init_from": start,
        "lora_options": lora_options,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    output = run_training(dpo_options("whole", **changes))
    # In the first step, the model is its own reference.
    assert read_log(output, "margin")[0] == pytest.approx(0, abs=1e-5)
    options = dpo_options("resumed", **changes)
    again = run_training([*options, "--resume_from_checkpoint", str(output / "checkpoint-1")])
    assert_equal_weights(trained_weights(output), trained_weights(again))
    assert read_log(again, "margin") == read_log(output, "margin")[-1:]


def test_dry_run_of_the_preflight_trains_on_pairs(dpo_options: MakeOptions, tmp_path: Path) -> None:
    dry_run(dpo_options(max_steps=1))
    assert (tmp_path / "report.json").is_file()


def test_records_without_a_usable_pair_are_set_aside(
    dpo_options: MakeOptions,
    pairs_folder: Path,
    tmp_path: Path,
    package_log: pytest.LogCaptureFixture,
) -> None:
    rows = json.loads((pairs_folder / "train.json").read_text())
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["chosen"] = " "
    rows[3] = {"image": "3.jpg", "instruction": "What?", "response": "no pair"}
    (tmp_path / "train.json").write_text(json.dumps(rows))
    changes = {"train_data_path": tmp_path / "train.json", "max_steps": 1}
    run_training(dpo_options(max_bad_records=0.5, **changes))
    [message] = [text for text in package_log.messages if "left out" in text]
    assert message.startswith("3 of 12 records")
    assert "row 1: both answers of the pair are equal" in message
    assert "row 2: an answer of the pair is empty" in message
    with pytest.raises(ValueError, match="equal"):
        run_training(dpo_options(max_bad_records=0, **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_from": ""}, "--init_from"),
        ({"dpo_beta": 0}, "--dpo_beta"),
        ({"dpo_label_smoothing": 0.5}, "--dpo_label_smoothing"),
        ({"label_smoothing_factor": 0.1}, "--dpo_label_smoothing"),
        ({"sft_weight": -1}, "--sft_weight"),
        ({"objective": "sft", "sft_weight": 1}, "--sft_weight"),
        ({"kl_coef": 0.1}, "--dpo_beta"),
        ({"packing": True, "share_prefix": False}, "--packing False"),
    ],
)
def test_invalid_options_are_errors(
    dpo_options: MakeOptions, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        run_training(dpo_options(**changes))


def test_engines_that_shard_the_weights_are_refused(
    dpo_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = property(lambda _: True)
    name = "llava_simplified.training.trainer.LlavaTrainer.weights_are_sharded"
    monkeypatch.setattr(name, sharded)
    with pytest.raises(ValueError, match="ZeRO-2"):
        run_training(dpo_options())


def test_plan_counts_both_answers_and_the_reference(dpo_options: MakeOptions) -> None:
    pairs = make_plan(*parse_arguments(dpo_options()))
    chosen = make_plan(*parse_arguments(dpo_options(objective="sft")))
    assert pairs.steps == chosen.steps
    assert 1.5 * chosen.trained < pairs.trained < 2.5 * chosen.trained
    assert pairs.memory["reference"] == pairs.memory["gradients"]
    assert pairs.flops > 1.3 * chosen.flops
    assert pairs.sampling is None
