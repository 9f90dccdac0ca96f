"""What is said of a run's cost before it, against what the run takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import options, run
from tiny import make_tokenizer

from llava_simplified.arguments import parse_arguments
from llava_simplified.training.plan import make_plan
from llava_simplified.training.plan_command import main

MEASURE = """
import resource, sys
from pathlib import Path
from llava_simplified.arguments import parse_arguments
from llava_simplified.training.build_trainer import build_trainer
from llava_simplified.training.train_command import train

def now(key):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)) * 1024

small, large = sys.argv[1].split(" "), sys.argv[2].split(" ")
train(*parse_arguments(small))  # libraries, thread pools, code
before = now("RssAnon") + now("RssFile")  # frozen weights stay where the file is mapped
trainer, _ = build_trainer(*parse_arguments(large))
Path("/proc/self/clear_refs").write_text("5")  # the peak of the loading is none of the step's
trainer.train()
print("PEAK", now("VmHWM") - now("RssShmem") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that is large enough to be seen, and a tower of 256 tokens."""
    import transformers as t
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("large")
    make_tokenizer().save_pretrained(folder / "text")
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "vocab_size": 32000,
    }
    t.LlamaForCausalLM(
        t.LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=4)
    ).save_pretrained(folder / "text")
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tower = t.CLIPVisionConfig(**shape, image_size=128, patch_size=8)
    t.CLIPVisionModel(tower).save_pretrained(folder / "tower")
    size = {"height": 128, "width": 128}
    CLIPImageProcessorPil(size={"shortest_edge": 128}, crop_size=size).save_pretrained(
        folder / "tower"
    )
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux counts it"
)
@pytest.mark.parametrize(
    "more",
    [{}, {"lora_enable": False, "freeze_backbone": False}, {"gradient_checkpointing": True}],
    ids=["LoRA", "full", "checkpointing"],
)
def test_memory_is_foreseen_within_a_fifth(
    models_folder: Path, data_folder: Path, large: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    same = {
        "max_steps": 2,
        "cache_vision_features": "off",
        "train_sampling_strategy": "sequential",
        **more,
    }
    words = options(models_folder, data_folder, tmp_path / "small", **same)
    parts = {"model_name_or_path": large / "text", "vision_tower": large / "tower", "lora_r": 16}
    larger = options(models_folder, data_folder, tmp_path / "large", **{**same, **parts})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, " ".join(words), " ".join(larger)],
        capture_output=True,
        text=True,
        # glibc otherwise keeps what is freed: a quarter more, which no plan can know
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.split("PEAK")[1])
    assert make_plan(*parse_arguments(larger)).peak == pytest.approx(measured, rel=0.2)


def test_a_plan_needs_no_weights(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(models_folder, data_folder, tmp_path / "out", gradient_accumulation_steps=2)
    whole = make_plan(*parse_arguments(words))
    for part in ("mistral", "clip"):
        (tmp_path / part).mkdir()
        for file in (models_folder / part).iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / part / file.name).write_bytes(file.read_bytes())
    bare = [
        *words,
        "--model_name_or_path",
        str(tmp_path / "mistral"),
        "--vision_tower",
        str(tmp_path / "clip"),
    ]
    assert make_plan(*parse_arguments(bare)) == whole
    assert whole.steps == 2  # 12 records in batches of 4, two to a step
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    own = [
        "--devices",
        "2",
        "--mfu",
        "0.5",
        "--tflops",
        "100",
        "--deepspeed",
        str(tmp_path / "zero.json"),
    ]
    assert main([*bare, *own]) == 0
    printed = capsys.readouterr().out
    assert "on 2 device(s) of 100 TFLOP/s at 50% of that" in printed
    assert "LoRA adapter" in printed
    assert "the run           1 steps, 16 samples" in printed
    at = bare.index("--train_data_path")
    assert (
        main([*bare[:at], *bare[at + 2 :], "--tflops", "100"]) == 0
    )  # nothing says how much there is to do
    printed = capsys.readouterr().out
    assert "one step          (--train_data_path says how many) 8 samples" in printed
    assert "the run" not in printed
    assert "kept" not in printed


def test_what_costs_more_is_said_to_cost_more(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    def plan(**more: object):  # type: ignore[no-untyped-def]
        return make_plan(
            *parse_arguments(options(models_folder, data_folder, tmp_path / "out", **more))
        )

    one, two = plan(), plan(per_device_train_batch_size=8)
    assert two.memory["activations"] / one.memory["activations"] == pytest.approx(2, rel=0.1)
    assert two.memory["weights"] == one.memory["weights"]
    assert two.flops == pytest.approx(one.flops, rel=0.01)
    assert plan(gradient_checkpointing=True).memory["activations"] < one.memory["activations"]
    assert plan(bf16=True).memory["weights"] < one.memory["weights"]
    assert plan(tune_mm_mlp_adapter=True).flops < one.flops
    assert plan(packing=True, pack_length=128).memory["activations"] > one.memory["activations"]


def test_flops_are_those_of_the_matrices(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Frozen weights twice (forward, and backward to their input), an adapter's thrice, attention by its length."""
    words = options(
        models_folder,
        data_folder,
        tmp_path / "out",
        tune_mm_mlp_adapter=True,
        cache_vision_features="memory",
    )
    plan = make_plan(*parse_arguments(words))
    body = 2 * sum(
        a * b for a, b in ((32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32))
    )
    projector, vocabulary = 16 * 24 * 32, 400
    attention = 2 * 2 * 32 * plan.longest
    per_position = 4 * body + 7 * attention  # whose backward computes the scores anew
    expected = (
        per_position * plan.positions + 2 * 2 * projector + 4 * plan.trained * 32 * vocabulary
    )
    assert plan.flops == pytest.approx(expected, rel=0.1)
    assert torch.is_grad_enabled()


def test_checkpoints_are_counted_as_the_run_saves_them(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    for more, kept in (
        ({"save_steps": 0.3, "max_steps": 10}, 4),  # after 3, 6, 9, and at the end
        ({"save_steps": 4, "max_steps": 10}, 3),
        ({"save_steps": 4, "max_steps": 10, "save_total_limit": 1}, 1),
        ({"save_strategy": "no"}, 0),
    ):
        argv = options(
            models_folder, data_folder, tmp_path / str(kept), **{"save_strategy": "steps", **more}
        )
        groups = parse_arguments(argv)
        assert make_plan(*groups).count_checkpoints(groups[2]) == kept
        if kept == 4:
            run(argv)
            assert len(list((tmp_path / "4").glob("checkpoint-*"))) == 4
