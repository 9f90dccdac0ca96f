"""Reinforcement learning with tiny models: what it improves, resumes, logs and refuses."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_process import fork_process
from tiny import make_language_model
from training_runs import (
    assert_equal_weights,
    read_log,
    run_training,
    trained_weights,
    training_options,
)

from llava_simplified.arguments import parse_arguments
from llava_simplified.data.collate import Collator
from llava_simplified.data.dataset import CaptionDataset
from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.training import plan as plan_module
from llava_simplified.training.build_trainer import build_trainer
from llava_simplified.training.dry_run import dry_run
from llava_simplified.training.plan import Plan, make_plan
from llava_simplified.training.plan_command import main as plan_command
from llava_simplified.training.policy_trainer import disable_dropout
from llava_simplified.training.reference_weights import ReferenceWeights

REWARD_MODULE = """
def share_of_a(images, references, captions):
    assert all(image.endswith(".jpg") for image in images)
    return [caption.count("a") / (1 + len(caption)) for caption in captions]

def constant(images, references, captions):
    return [0.0] * len(captions)  # so the worst reward, which captions without an end token get, is 0 too

def broken(images, references, captions):
    return [float("nan")] * len(captions)
"""
MakeOptions = Callable[..., list[str]]


@pytest.fixture(scope="module")
def checkpoint(
    models_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A supervised checkpoint, and a module with reward functions beside it."""
    folder = tmp_path_factory.mktemp("supervised")
    options = training_options(
        models_folder, data_folder, folder / "out", max_steps=60, learning_rate=1e-2
    )
    run_training(options)
    (folder / "tiny_rewards.py").write_text(REWARD_MODULE)
    return folder / "out"


@pytest.fixture
def policy_options(
    models_folder: Path,
    data_folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> MakeOptions:
    """Return a function that makes the command line of a reinforcement learning run."""
    monkeypatch.syspath_prepend(checkpoint.parent)

    def make(output: str = "out", **changes: object) -> list[str]:
        values: dict[str, object] = {
            "init_from": checkpoint,
            "objective": "rloo",
            "reward": "word_f1",
            "num_samples": 3,
            "sample_max_tokens": 8,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "cache_vision_features": "off",
            **changes,
        }
        return training_options(models_folder, data_folder, tmp_path / output, **values)

    return make


@pytest.mark.medium
def test_reward_rises(policy_options: MakeOptions) -> None:
    options = policy_options(
        reward="tiny_rewards:share_of_a",
        num_samples=8,
        sample_max_tokens=20,
        max_steps=24,
        learning_rate=5e-3,
    )
    output = run_training(options)
    rewards = read_log(output, "reward")
    assert len(rewards) == 24
    # The samples depend on how a CPU rounds. With six seeds, the reward rose by factors of 5 to 10.
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
    for key in ("reward_std", "caption_tokens", "share_at_limit", "share_distinct", "entropy"):
        assert len(read_log(output, key)) == 24
    assert read_log(output, "share_at_limit")[-1] < 0.5


@pytest.mark.medium
@pytest.mark.parametrize("objective", ["scst", "grpo"])
def test_resumed_run_samples_the_same_captions(policy_options: MakeOptions, objective: str) -> None:
    """The runs accumulate gradients, have a KL penalty, and do not cache features."""
    changes: dict[str, object] = {
        "objective": objective,
        "kl_coef": 0.1,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    output = run_training(policy_options("whole", **changes))
    # In the first step, the model is its own reference, up to rounding.
    assert read_log(output, "kl")[0] == pytest.approx(0, abs=1e-8)
    assert read_log(output, "kl")[-1] > 1e-5
    resumed = [
        *policy_options("resumed", **changes),
        "--resume_from_checkpoint",
        str(output / "checkpoint-2"),
    ]
    again = run_training(resumed)
    assert_equal_weights(trained_weights(output), trained_weights(again))
    # Reward and KL of the last step are equal too: the reference is not the checkpoint that was resumed.
    for key in ("reward", "kl"):
        assert read_log(again, key) == read_log(output, key)[-1:]


def count_checkpoints(folder: Path) -> int:
    return len(list(folder.glob("checkpoint-*")))


@pytest.mark.slow
def test_run_that_is_killed_three_times_ends_with_the_same_weights(
    policy_options: MakeOptions, tmp_path: Path
) -> None:
    """kill -9 at random moments, for example while the model is loaded, while it samples, or while it is saved."""
    changes: dict[str, object] = {
        "objective": "grpo",
        "sft_weight": 0.1,
        "learning_rate": 5e-3,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
    }
    undisturbed = run_training(policy_options("undisturbed", **changes))
    options = policy_options("killed", **changes)
    output = tmp_path / "killed"
    generator = random.Random(0)
    for _ in range(3):
        before = count_checkpoints(output)
        resume = ["--resume_from_checkpoint", str(before > 0)]
        process = fork_process(run_training, [*options, *resume])
        # Some runs are killed before they have saved anything.
        wanted = before + generator.randint(0, 2)
        while process.is_alive() and count_checkpoints(output) < wanted:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 0 < count_checkpoints(output) < 12
    run_training([*options, "--resume_from_checkpoint", "true"])
    assert_equal_weights(trained_weights(undisturbed), trained_weights(output))
    assert read_log(output, "reward")[-1] == read_log(undisturbed, "reward")[-1]


@pytest.mark.medium
def test_separate_sequences_train_the_same_weights(policy_options: MakeOptions) -> None:
    shared = run_training(policy_options("shared", max_steps=1))
    separate = run_training(policy_options("separate", max_steps=1, share_prefix=False))
    assert read_log(shared, "reward") == read_log(separate, "reward")
    norms = [read_log(folder, "grad_norm")[0] for folder in (shared, separate)]
    assert norms[0] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.medium
def test_constant_reward_changes_nothing_and_warns(
    policy_options: MakeOptions, checkpoint: Path, package_log: pytest.LogCaptureFixture
) -> None:
    output = run_training(policy_options(reward="tiny_rewards:constant"))
    assert read_log(output, "grad_norm") == [0, 0]
    assert_equal_weights(trained_weights(checkpoint), trained_weights(output))
    assert sum("reward_std is 0" in text for text in package_log.messages) == 1


@pytest.mark.medium
def test_model_is_not_unwrapped_for_every_caption(
    policy_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Accelerator.unwrap_model` visits every module, which takes milliseconds for a large model."""
    trainer, _ = build_trainer(*parse_arguments(policy_options()))
    unwrap = trainer.accelerator.unwrap_model
    calls = []
    monkeypatch.setattr(
        trainer.accelerator, "unwrap_model", lambda model: calls.append(model) or unwrap(model)
    )
    for _ in range(5):
        assert trainer.unwrapped_model is trainer.model
    assert len(calls) <= 1


@pytest.mark.medium
def test_captions_without_an_end_are_reported(
    policy_options: MakeOptions, package_log: pytest.LogCaptureFixture
) -> None:
    output = run_training(policy_options(sample_max_tokens=1))
    assert read_log(output, "share_at_limit")[0] > 0.5
    assert sum("share_at_limit" in text for text in package_log.messages) == 1


@pytest.mark.medium
def test_reward_that_is_not_a_number_names_the_record(policy_options: MakeOptions) -> None:
    with pytest.raises(ValueError, match=r"broken.*train\.json row \d+"):
        run_training(policy_options(reward="tiny_rewards:broken"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "ppo"}, "rloo"),
        ({"init_from": ""}, "--init_from"),
        ({"packing": True}, "--packing False"),
        ({"num_samples": 1}, "--num_samples"),
        ({"sample_temperature": 0}, "--sample_temperature"),
        ({"sample_max_tokens": 0}, "--sample_max_tokens"),
        ({"kl_coef": -1}, "--kl_coef"),
        ({"reward": "cidre"}, "cider"),
    ],
)
def test_invalid_options_are_errors(
    policy_options: MakeOptions, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        run_training(policy_options(**changes))


def test_engines_that_shard_the_weights_are_refused(
    policy_options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = property(lambda _: True)
    name = "llava_simplified.training.trainer.LlavaTrainer.weights_are_sharded"
    monkeypatch.setattr(name, sharded)
    with pytest.raises(ValueError, match="ZeRO-2"):
        run_training(policy_options())


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_disable_dropout_makes_training_mode_deterministic(kind: str) -> None:
    """OPT, and attention in all families, do not use `nn.Dropout` modules."""
    model = make_language_model(kind, 40)
    for module in model.modules():
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    model.train()
    input_ids = torch.arange(4)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=input_ids).logits

    assert not torch.equal(logits(), logits())
    disable_dropout(model)
    assert torch.equal(logits(), logits())
    assert torch.equal(logits(), model.eval()(input_ids=input_ids).logits)


def test_reference_of_a_new_adapter_is_the_model_without_it(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint, device="cpu", dtype="float32", trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    reference = ReferenceWeights(model)
    ids = torch.tensor([[0, 5, 7, 9]])
    with torch.no_grad():
        expected = model.language_model(ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        changed = model.language_model(ids).logits
        with model.language_model.disable_adapter():
            disabled = model.language_model(ids).logits
    with reference.in_place_of_current(model):
        logits = model.language_model(ids).logits
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, disabled)
    # The current weights are back.
    torch.testing.assert_close(model.language_model(ids).logits, changed, rtol=0, atol=0)


@pytest.mark.medium
@pytest.mark.parametrize("changes", [{}, {"share_prefix": False}, {"objective": "grpo"}])
def test_supervised_loss_is_mixed_in(
    policy_options: MakeOptions, data_folder: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """With a constant reward, only the supervised loss remains: the mean over images, responses and tokens."""
    rows = json.loads((data_folder / "train.json").read_text())
    rows[0]["responses"] = [rows[0].pop("response"), "a man reads"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    changes = {"reward": "tiny_rewards:constant", "sft_weight": 0.5, "kl_coef": 0.1, **changes}
    options = policy_options(train_data_path=tmp_path / "train.json", **changes)
    trainer, _ = build_trainer(*parse_arguments(options))
    model, dataset = trainer.unwrapped_model, trainer.train_dataset
    loaded = trainer.data_collator([dataset[0], dataset[1]])
    [batch] = trainer.prepare_micro_batches([loaded])
    del batch["metadata"]
    summed, _ = trainer.summed_loss(model, batch)
    model.zero_grad()
    (summed / trainer.count_items(batch)).backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    supervised = CaptionDataset(
        dataset.records, model.prompt, dataset.image_folder, dataset.transform, share_prefix=False
    )
    expected = 0.0
    for index, share in ((0, 0.25), (1, 0.25), (2, 0.5)):
        row = dict(Collator(model.vision_tower.num_tokens, 1)([supervised[index]]))
        del row["metadata"]
        expected = expected + 0.5 * share * model(**row).loss / len(row["labels"])
    model.zero_grad()
    expected.backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-5, msg=name)
    # References are not samples: the model is its own reference, and only samples have an entropy.
    statistics = trainer._read_statistics()
    assert statistics["kl"] == pytest.approx(0, abs=1e-8)
    assert 0 < statistics["entropy"] < 6  # about the log of the vocabulary's size


@pytest.mark.medium
def test_dry_run_of_the_preflight_samples_captions(
    policy_options: MakeOptions, tmp_path: Path
) -> None:
    dry_run(policy_options(max_steps=1))
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0 < report["sampling_seconds"] < report["seconds"]


@pytest.mark.medium
def test_plan_counts_the_sampling(
    policy_options: MakeOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plans: list[Plan] = []

    def plan(*groups: Any, **devices: int) -> Plan:
        plans.append(make_plan(*groups, **devices))
        return plans[-1]

    def plan_with(**changes: object) -> Plan:
        return make_plan(*parse_arguments(policy_options(**changes)))

    monkeypatch.setattr(plan_module, "make_plan", plan)
    assert plan_command([*policy_options(), "--tflops", "1", "--bandwidth", "10"]) == 0
    printed = capsys.readouterr().out
    assert "sampling          192 tokens in 16 decoding steps" in printed
    assert "KV cache" in printed
    [base] = plans
    assert base.sampling is not None
    # 4 images x 3 samples, of the mean length of the responses (cut at the limit of 8), 2 steps.
    assert base.sampling.tokens == 2 * 4 * 3 * 8
    assert base.sampling.steps == 2 * 8
    # Keys and values of 2 layers, 2 heads of 8, in float32, for the prompt and the longest sample.
    positions = base.longest - 3 * 8 + 8
    assert base.memory["KV cache"] == 4 * 3 * positions * 2 * 2 * 2 * 8 * 4
    assert "reference" not in base.memory
    with_kl = plan_with(kl_coef=0.1, bf16=True)
    assert with_kl.memory["KV cache"] == base.memory["KV cache"] / 2
    assert with_kl.memory["reference"] == base.memory["gradients"]
    # Sampling costs one forward pass, the reference model another one, and training a little more than two.
    assert 1.2 < with_kl.flops / base.flops < 1.5
    scst = plan_with(objective="scst", sft_weight=0.1)
    assert scst.sampling.tokens == base.sampling.tokens * 4 / 3
    assert scst.trained > base.trained
    assert plan_with(share_prefix=False).flops > base.flops
