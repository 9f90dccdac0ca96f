"""Tests of `benchmarks/bench_train.py` and the scripts of its peers. The peers are neither installed nor run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def make_run(folder: Path) -> Any:
    from training_peers import PeerRun

    return PeerRun(
        model=str(folder / "model"),
        data=str(folder / "messages.json"),
        output=str(folder / "output"),
        prompt="<user>CONTENT<assistant>",
        answer_end="<end>",
        batch=3,
        steps=7,
        dtype="bfloat16",
        learning_rate=1e-3,
        lora_r=5,
        lora_alpha=11,
    )


def make_result(loss: float, seconds: float, **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "loss": loss, "memory": 1e9, "limit": 1e11, **more}


# ---- command line ----


@pytest.mark.parametrize("argv", [["--peer", "megatron"], ["--peer"]])
def test_unknown_peer_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from bench_train import build_parser

    with pytest.raises(SystemExit):
        build_parser().parse_args(argv)
    assert "--peer" in capsys.readouterr().err


def test_every_peer_can_be_named() -> None:
    from bench_train import build_parser, choose_ours, choose_peers
    from training_peers import TRAINING_PEERS

    names = list(TRAINING_PEERS)
    args = build_parser().parse_args(["--peer", *names, "--output", "runs.json"])
    assert args.peer == names
    # The loss of every side is compared with that of the stock model under the Trainer.
    assert list(choose_peers(args.peer)) == ["transformers + PEFT", *names]
    assert choose_ours(args.peer)[-1] == choose_ours(None)[-1]
    assert not set(choose_peers(None)) & set(names)


@pytest.mark.parametrize("name", ["llama-factory", "ms-swift"])
def test_peer_has_a_version_and_a_script(name: str) -> None:
    from training_peers import TRAINING_PEERS

    peer = TRAINING_PEERS[name]
    assert "==" in peer.requirement
    assert (BENCHMARKS / peer.script).is_file()


def test_only_packages_that_cannot_be_imported_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peer_environment

    commands = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command[1:])
        return SimpleNamespace(returncode=int("import broken" in command))

    monkeypatch.setattr(peer_environment.subprocess, "run", run)
    peer_environment.remove_broken_packages(tmp_path / "python", ["sound", "broken"])
    removals = [command for command in commands if "uninstall" in command]
    assert [command[-1] for command in removals] == ["broken"]


# ---- what a peer reads ----


def test_each_caption_is_one_conversation_with_its_image(tmp_path: Path) -> None:
    from training_peers import write_messages

    records = [
        {"image": "0.png", "instruction": "Describe it:", "responses": ["a dog", "a red dog"]},
        {"image": "1.png", "instruction": "Describe it:", "responses": ["a cat", "one cat"]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    write_messages(tmp_path, tmp_path / "messages.json", "<image>\n")
    samples = json.loads((tmp_path / "messages.json").read_text())
    answers = [sample["messages"][1]["content"] for sample in samples]
    assert answers == ["a dog", "a red dog", "a cat", "one cat"]
    question = {"role": "user", "content": "<image>\nDescribe it:"}
    assert all(sample["messages"][0] == question for sample in samples)
    assert samples[2]["images"] == [str(tmp_path / "1.png")]


def test_split_prompt_uses_the_chat_template_of_the_tokenizer() -> None:
    from training_peers import split_prompt

    def render(turns: list[dict[str, str]], **options: bool) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return f"<system>be brief<user>{turns[0]['content']}<assistant>"

    tokenizer = SimpleNamespace(apply_chat_template=render, eos_token="<end>")
    assert split_prompt(tokenizer) == ("<system>be brief<user>CONTENT<assistant>", "<end>")


@pytest.mark.parametrize("script", ["peer_llama_factory", "peer_ms_swift"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peer_trains_with_the_settings_of_all_sides(
    script: str, dtype: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    module = __import__(script)
    run = replace(make_run(tmp_path), dtype=dtype)
    arguments = module.training_arguments(run)
    expected = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "max_steps": 7,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "lora_rank": 5,
        "lora_alpha": 11,
        "lora_dropout": 0,
        "bf16": dtype == "bfloat16",
        "use_cpu": True,
        "template": "benchmark",
        "output_dir": run.output,
    }
    assert arguments | expected == arguments
    assert run.model in arguments.values()
    assert "multi_modal_projector" in str(arguments)  # LoRA alone would leave it frozen


def test_llama_factory_arguments_name_the_data_and_turn_checkpointing_off(tmp_path: Path) -> None:
    import peer_llama_factory

    run = make_run(tmp_path)
    arguments = peer_llama_factory.training_arguments(run)
    info = peer_llama_factory.dataset_info(Path(run.data))[arguments["dataset"]]
    assert Path(arguments["dataset_dir"]) / info["file_name"] == Path(run.data)
    assert info["columns"] == {"messages": "messages", "images": "images"}
    assert arguments["disable_gradient_checkpointing"]


def test_ms_swift_arguments_name_the_data_and_turn_checkpointing_and_shuffling_off(
    tmp_path: Path,
) -> None:
    import peer_ms_swift

    run = make_run(tmp_path)
    arguments = peer_ms_swift.training_arguments(run)
    assert arguments["dataset"] == [run.data]
    assert not arguments["gradient_checkpointing"]
    assert not arguments["dataset_shuffle"] and not arguments["train_dataloader_shuffle"]


# ---- what is measured ----


def test_warm_up_steps_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import step_times

    monkeypatch.setattr(step_times, "measure_matmul", lambda dtype: 1e11)
    # The first two steps take 50 seconds each, the next ones 2 and 4. The start of the last step ends the fourth one.
    summary = step_times.summarize(
        [(0, 6.5), (50, 6.0), (100, 5.0), (102, 4.0), (106, 3.0)], "float32"
    )
    assert summary["seconds"] == 3
    assert summary["loss"] == 6.5
    assert summary["memory"] > 0


def write_script(folder: Path, body: str) -> Path:
    path = folder / "peer.py"
    path.write_text(f"import json, os, sys\nfrom pathlib import Path\n{body}\n")
    return path


@pytest.mark.medium
def test_run_peer_returns_the_result_of_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training_peers

    body = """
run = json.loads(Path(sys.argv[1]).read_text())
seen = {"batch": run["batch"], "dtype": run["dtype"], "path": os.environ.get("PYTHONPATH")}
Path(sys.argv[2]).write_text(json.dumps(seen))
"""
    monkeypatch.setattr(training_peers, "create_environment", lambda peer: sys.executable)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    peer = training_peers.TrainingPeer("Peer", "peer==1", str(write_script(tmp_path, body)))
    result = training_peers.run_peer(peer, make_run(tmp_path), tmp_path)
    assert result == {"batch": 3, "dtype": "bfloat16", "path": None}


@pytest.mark.medium
def test_failure_of_a_peer_names_it_and_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training_peers

    monkeypatch.setattr(training_peers, "create_environment", lambda peer: sys.executable)
    script = write_script(tmp_path, "raise ValueError('no such template')")
    peer = training_peers.TrainingPeer("Peer", "peer==1", str(script))
    with pytest.raises(SystemExit) as failure:
        training_peers.run_peer(peer, make_run(tmp_path), tmp_path)
    assert "Peer" in str(failure.value) and "no such template" in str(failure.value)


# ---- the table ----


def test_table_shows_ratios_to_every_peer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_train

    monkeypatch.setenv("BENCH_DTYPE", "bfloat16")
    versions = {"ms-swift": "9.8.7", "torch": "1.2.3"}
    results = {
        "transformers + PEFT": [make_result(6.0, 4.0)],
        "ms-swift": [make_result(6.01, 9.0), make_result(6.01, 3.0, versions=versions)],
        "ours": [make_result(6.02, 1.0)],
    }
    results["ms-swift"][0]["versions"] = versions
    bench_train.print_versions(results)
    peers = bench_train.choose_peers(["ms-swift"])
    bench_train.print_table(results, peers, captions=1, samples=4, flops=5e10)
    printed = capsys.readouterr().out
    assert "ms-swift 9.8.7" in printed and "llava-simplified" in printed
    heads, *rows = printed.splitlines()[-4:]
    assert "x ms-swift" in heads
    assert rows[-1].split() == ["ours", "4.00", "4.00", "3.00", "1.00", "6.0200", "50%"]


def test_comparison_is_refused_if_the_first_losses_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_train

    monkeypatch.setenv("BENCH_DTYPE", "bfloat16")
    results = {
        "transformers + PEFT": [make_result(6.0, 4.0)],
        "ms-swift": [make_result(6.2, 3.0)],
    }
    peers = bench_train.choose_peers(["ms-swift"])
    with pytest.raises(SystemExit) as refusal:
        bench_train.print_table(results, peers, captions=1, samples=4, flops=5e10)
    assert "ms-swift" in str(refusal.value)


def test_results_of_every_benchmark_are_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = __import__("all")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "RESULTS.md")
    sections = {}
    for name, command in runner.BENCHMARKS.items():
        script, *_ = command.split()
        assert (BENCHMARKS / script).is_file()
        sections[name] = f"\n    python benchmarks/{command}\n"
    runner.write_sections(sections)
    assert runner.read_sections() == sections
