"""The forecast of a run, compared with what the run needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_process import fork_process
from tiny import make_tokenizer
from training_runs import run_training, training_options

from llava_simplified.arguments import parse_arguments
from llava_simplified.process_memory import return_freed_blocks
from llava_simplified.training import plan
from llava_simplified.training.build_trainer import build_trainer
from llava_simplified.training.plan import Plan, make_plan
from llava_simplified.training.plan_command import main
from llava_simplified.training.train_command import train


def measure_peak(small: list[str], large: list[str], result: Path) -> None:
    """Write the peak memory of a run's steps, in bytes. Call it in a separate process.

    Args:
        small: Options of a run before the measurement: libraries, thread pools and code are loaded then.
        large: Options of the measured run.
        result: File for the measured number.
    """
    # By default, glibc does not return all freed memory. The peak would be a quarter higher, which no plan can predict.
    return_freed_blocks(131072)
    train(*parse_arguments(small))
    before = read_memory("RssAnon") + read_memory(
        "RssFile"
    )  # frozen weights stay in the mapped file
    trainer, _ = build_trainer(*parse_arguments(large))
    # Reset the peak: loading may have needed more than the steps do.
    Path("/proc/self/clear_refs").write_text("5")
    trainer.train()
    result.write_text(str(read_memory("VmHWM") - read_memory("RssShmem") - before))


def read_memory(key: str) -> int:
    """Return an entry of this process's memory statistics, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@pytest.fixture(scope="module")
def large_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that is large enough to be measured, and a tower with 256 tokens.

    Most of the memory is that of the embeddings and of many positions, which take little time to compute.
    """
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("large")
    make_tokenizer().save_pretrained(folder / "text")
    text_config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        vocab_size=48000,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    transformers.LlamaForCausalLM(text_config).save_pretrained(folder / "text")
    tower_config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
        patch_size=8,
    )
    transformers.CLIPVisionModel(tower_config).save_pretrained(folder / "tower")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}
    )
    processor.save_pretrained(folder / "tower")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="memory is measured with a file that only Linux has",
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_enable": False, "freeze_backbone": False}, {"gradient_checkpointing": True}],
    ids=["LoRA", "full", "checkpointing"],
)
def test_plan_forecasts_peak_memory_within_a_fifth(
    models_folder: Path,
    data_folder: Path,
    large_models: Path,
    tmp_path: Path,
    changes: dict[str, object],
) -> None:
    changes = {
        "max_steps": 2,
        "cache_vision_features": "off",
        "train_sampling_strategy": "sequential",
        **changes,
    }
    small = training_options(models_folder, data_folder, tmp_path / "small", **changes)
    changes["model_name_or_path"] = large_models / "text"
    changes["vision_tower"] = large_models / "tower"
    changes["lora_r"] = 16
    large = training_options(models_folder, data_folder, tmp_path / "large", **changes)
    result = tmp_path / "peak"
    process = fork_process(measure_peak, small, large, result)
    process.join()
    assert process.exitcode == 0
    measured = int(result.read_text())
    assert make_plan(*parse_arguments(large)).peak == pytest.approx(measured, rel=0.2)


@pytest.mark.medium
def test_plan_needs_no_weights(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = training_options(
        models_folder, data_folder, tmp_path / "out", gradient_accumulation_steps=2
    )
    plan = make_plan(*parse_arguments(options))
    assert plan.steps == 2  # 12 records in batches of 4, two batches per step

    # The same models without their weights.
    for part in ("mistral", "clip"):
        (tmp_path / part).mkdir()
        for file in (models_folder / part).iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / part / file.name).write_bytes(file.read_bytes())
    options += ["--model_name_or_path", str(tmp_path / "mistral")]
    options += ["--vision_tower", str(tmp_path / "clip")]
    assert make_plan(*parse_arguments(options)) == plan

    zero_config = tmp_path / "zero.json"
    zero_config.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    own_options = ["--devices", "2", "--mfu", "0.5", "--tflops", "100"]
    own_options += ["--deepspeed", str(zero_config)]
    assert main([*options, *own_options]) == 0
    printed = capsys.readouterr().out
    assert "on 2 device(s) of 100 TFLOP/s at 50% of that" in printed
    assert "LoRA adapter" in printed
    assert "the run           1 steps, 16 samples" in printed

    # Without data, the number of steps is unknown.
    position = options.index("--train_data_path")
    del options[position : position + 2]
    assert main([*options, "--tflops", "100"]) == 0
    printed = capsys.readouterr().out
    assert "one step          (pass --train_data_path for the whole run) 8 samples" in printed
    assert "the run" not in printed
    assert "kept" not in printed


@pytest.mark.medium
@pytest.mark.parametrize("packing", [False, True])
def test_records_without_images_are_planned(
    models_folder: Path, data_folder: Path, tmp_path: Path, packing: bool
) -> None:
    rows = [{"instruction": "Name a color.", "response": f"color {number}"} for number in range(8)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        train_data_path=tmp_path / "train.json",
        packing=packing,
        pack_length=128,
        cache_vision_features="off",
    )
    plan = make_plan(*parse_arguments(options))
    assert plan.peak > 0
    assert plan.features == 0


@pytest.mark.parametrize(
    "option",
    [
        ("--devices", "0"),
        ("--tflops", "nan"),
        ("--mfu", "0"),
        ("--mfu", "40"),
        ("--bandwidth", "-1"),
    ],
)
def test_plan_refuses_impossible_machines(option: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=option[0]):
        main(list(option))


@pytest.mark.medium
@pytest.mark.parametrize("recipe", ["cc3m_mistral7b_clip_b16_lora", "coco_smollm_siglip"])
def test_recipe_is_planned_without_records(
    models_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    """As in the documentation, plan before there is any data, although the recipe evaluates during training."""
    models = ["--model_name_or_path", str(models_folder / "mistral")]
    models += ["--vision_tower", str(models_folder / "clip")]
    argv = ["--config", recipe, *models, "--tflops", "300"]
    assert main(argv) == 0
    assert "one step" in capsys.readouterr().out
    # With records, this is the plan of a run that would be refused.
    with pytest.raises(ValueError, match="--eval_data_path"):
        main([*argv, "--train_data_path", str(data_folder / "train.json")])


def test_plan_refuses_a_deepspeed_config_without_a_stage(tmp_path: Path) -> None:
    config = tmp_path / "zero.json"
    config.write_text("{}")
    with pytest.raises(ValueError, match="--deepspeed .*zero_optimization.stage"):
        main(["--deepspeed", str(config)])


@pytest.mark.medium
def test_plan_of_a_more_expensive_run_is_higher(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    def plan(**changes: object) -> Plan:
        changes = {"cache_vision_features": "memory", **changes}
        options = training_options(models_folder, data_folder, tmp_path / "out", **changes)
        return make_plan(*parse_arguments(options))

    base = plan()
    twice = plan(per_device_train_batch_size=8)
    growth = twice.memory["activations"] / base.memory["activations"]
    assert growth == pytest.approx(2, rel=0.1)
    assert twice.memory["weights"] == base.memory["weights"]
    assert twice.flops == pytest.approx(base.flops, rel=0.01)
    checkpointing = plan(gradient_checkpointing=True)
    assert checkpointing.memory["activations"] < base.memory["activations"]
    assert plan(tune_mm_mlp_adapter=True).flops < base.flops
    # Full packs need more memory, even if all numbers are half as large.
    packed = plan(packing=True, pack_length=128, bf16=True)
    assert packed.memory["weights"] < base.memory["weights"]
    assert packed.memory["activations"] > base.memory["activations"]


@pytest.mark.medium
def test_plan_counts_the_flops_of_the_matrices(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Frozen weights count twice (forward, and backward to their input), trained ones three times."""
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        tune_mm_mlp_adapter=True,
        cache_vision_features="memory",
    )
    plan = make_plan(*parse_arguments(options))
    # Query, key, value, output and MLP matrices of a layer; two layers.
    shapes = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32))
    body = 2 * sum(rows * columns for rows, columns in shapes)
    projector = 16 * 24 * 32
    vocabulary = 400
    attention = 2 * 2 * 32 * plan.longest
    # Backward of attention computes the scores again.
    per_position = 4 * body + 7 * attention
    head = 4 * plan.trained * 32 * vocabulary
    expected = per_position * plan.positions + 2 * 2 * projector + head
    assert plan.flops == pytest.approx(expected, rel=0.1)
    assert torch.is_grad_enabled()


@pytest.mark.medium
def test_plan_counts_the_checkpoints_that_are_kept(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    # Checkpoints are saved after steps 3, 6, 9, and at the end.
    changes = {"save_strategy": "steps", "save_steps": 0.3, "max_steps": 10}
    options = training_options(models_folder, data_folder, output, **changes)
    groups = parse_arguments(options)
    plan = make_plan(*groups)
    assert plan.count_checkpoints(groups[2]) == 4
    for other, count in (
        (["--save_steps", "4"], 3),
        (["--save_steps", "4", "--save_total_limit", "1"], 1),
        (["--save_strategy", "no"], 0),
        (["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "best"], 5),
    ):
        # These options change nothing else in the plan.
        assert plan.count_checkpoints(parse_arguments([*options, *other])[2]) == count
    for other, count in (
        (["--save_total_limit", "2"], 3),  # the third is written before the first is deleted
        (["--save_total_limit", "1"], 2),
        (["--save_total_limit", "5"], 4),
    ):
        args = parse_arguments([*options, *other])[2]
        assert plan.disk_peak(args) == count * plan.checkpoint + plan.final_model
    run_training(options)
    assert len(list(output.glob("checkpoint-*"))) == 4


def test_plan_shards_the_weights_with_fsdp(
    models_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[int] = []

    def keep_stage(*_: Any, zero: int, **__: Any) -> None:
        stages.append(zero)
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "make_plan", keep_stage)
    options = training_options(models_folder, data_folder, tmp_path / "out", fsdp=True)
    with pytest.raises(KeyboardInterrupt):
        main([*options, "--devices", "2"])
    assert stages == [3]
