"""`llava plan --cluster`: the arithmetic by hand, and one small run of all steps."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from training_runs import training_options

from llava_simplified.model.build import build_vision_tower
from llava_simplified.model.config import LlavaConfig
from llava_simplified.training import cluster_rates
from llava_simplified.training.cluster_command import count_tower_flops
from llava_simplified.training.cluster_plan import (
    Cluster,
    Rates,
    Work,
    compute_bounds,
    describe_cluster_plan,
    read_rates,
)
from llava_simplified.training.plan_command import main

RATES = Rates(
    download_core_seconds=0.002,
    request_seconds=0.5,
    bytes_per_url=100_000,
    downloaded_share=0.8,
    largest_host_share=0.1,
    clean_core_seconds=0.001,
    usable_share=0.5,
    encode_flops_per_second=1e9,
    train_flops_per_second=2e9,
    tokens_per_caption=12,
    caption_tokens_per_second=60,
)
CLUSTER = Cluster(machines=2, cores=4, devices=1, egress=1e6, endpoints=3)
WORK = Work(urls=1000, encode_flops=2e9, train_flops=4e9, epochs=2)


def test_cluster_plan_equals_the_arithmetic_by_hand() -> None:
    seconds = {}
    for bound in compute_bounds(WORK, RATES, CLUSTER):
        seconds[bound.step, bound.resource] = bound.seconds
    assert seconds == pytest.approx(
        {
            ("download", "egress"): 50,  # 1,000 x 0.1 MB through two links of 1 MB/s
            ("download", "cores"): 0.25,  # 2 core seconds on eight cores
            ("download", "largest host"): 6.25,  # 100 x 0.5 s over two times four connections
            ("clean", "cores"): 0.1,  # 800 images, 0.8 core seconds
            ("encode", "FLOP/s"): 400,  # 400 images x 2 s on two devices
            ("train", "FLOP/s"): 800,  # 400 images x 2 epochs x 2 s on two devices
            ("caption", "endpoints"): 400 * 12 / 180,
        }
    )
    text = describe_cluster_plan([WORK], RATES, CLUSTER)
    assert "* download  egress        1,000 URLs x 100 kB / (2 machines x 1 MB/s) = 50 s" in text
    assert "  download  largest host  1,000 URLs x 10.000% at one host x 500 ms" in text
    # 50 + 0.1 + 400 + 800 + 26.67 seconds
    assert "= 21.3 min" in text
    assert "800 images, 100 MB received" in text


def test_cluster_plan_uses_the_given_devices_for_encoding_and_training_only() -> None:
    faster = replace(CLUSTER, device_flops_per_second=4e9)
    before = compute_bounds(WORK, RATES, CLUSTER)
    after = compute_bounds(WORK, RATES, faster)
    changed = {
        old.step: old.seconds / new.seconds
        for old, new in zip(before, after)
        if old.seconds != new.seconds
    }
    assert changed == pytest.approx({"encode": 4, "train": 2})


def test_cluster_plan_says_that_captions_were_not_measured() -> None:
    rates = replace(RATES, tokens_per_caption=0.0, caption_tokens_per_second=0.0)
    text = describe_cluster_plan([WORK], rates, CLUSTER)
    assert "Captioning was not measured" in text
    assert "endpoints x" not in text


@pytest.mark.parametrize(
    "change", [{"usable_share": -1}, {"usable_share": True}, {"usable_share": "1"}, {"more": 1}]
)
def test_read_rates_refuses_a_file_with_wrong_entries(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "rates.json"
    RATES.save(path)
    assert read_rates(path) == RATES
    path.write_text(json.dumps(asdict(RATES) | change))
    with pytest.raises(ValueError, match=f"--rates {path}.*{next(iter(change))}|expected"):
        read_rates(path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--measure", "urls.tsv"], "--cluster"),
        (["--cluster", "2", "--egress", "0"], "--egress"),
        (["--cluster", "-1"], "--cluster"),
        (["--cluster", "2", "--tune_vision_tower", "lora"], "--tune_vision_tower"),
        (["--cluster", "2", "--urls", "5", "0"], "--urls"),
        (["--cluster", "2", "--measure", "urls.tsv", "--measure-rows", "2"], "--measure-rows"),
        (["--cluster", "2", "--measure", "urls.tsv", "--endpoint", "http://x/v1"], "--model"),
        (["--cluster", "2", "--endpoint", "http://x/v1", "--model", "m"], "--measure"),
    ],
)
def test_plan_refuses_invalid_cluster_options(options: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        main(options)


@pytest.mark.medium
def test_plan_of_a_cluster_reads_rates_and_counts_flops(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = tmp_path / "rates.json"
    options = training_options(models_folder, data_folder, tmp_path / "out")
    options += ["--cluster", "2", "--urls", "1000", "--cores", "4", "--rates", str(rates)]
    with pytest.raises(ValueError, match="--rates"):
        main(options)
    RATES.save(rates)
    assert main([*options, "--tflops", "100", "--mfu", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "400 images x " in printed
    assert "50 TFLOP/s" in printed
    assert "2 machines x 4 cores" in printed


@pytest.mark.medium
def test_tower_flops_are_those_of_its_matrices(models_folder: Path) -> None:
    config = LlavaConfig("", str(models_folder / "clip"), dtype="float32")
    tower = build_vision_tower(config, device="meta")
    # 16 patches and the class token. The tower skips the last of its three layers, which the features do not need.
    positions, width, inner, layers = 17, 24, 48, 2
    patch_filter = 16 * (3 * 8 * 8 * width)
    matrices = positions * (4 * width * width + 2 * width * inner)
    attention = 2 * positions * positions * width
    expected = 2 * (patch_filter + layers * (matrices + attention))
    assert count_tower_flops(tower) == expected


def run_module(module: str, argv: Sequence[str]) -> None:
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__")


def run_in_child(command: Sequence[str], **_: object) -> CompletedProcess:
    """Run `python -m MODULE ...` without importing libraries again. It takes the place of `subprocess.run`.

    The process is a child of this one, and not of a server as in `cli_process`, because its CPU time is measured.
    """
    _, option, module, *argv = command
    assert option == "-m"
    process = multiprocessing.get_context("fork").Process(target=run_module, args=(module, argv))
    process.start()
    process.join()
    return CompletedProcess(command, process.exitcode, "", "")


@pytest.mark.slow
def test_plan_measures_every_step_from_download_to_caption(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.syspath_prepend(str(root / "tests" / "captioning"))
    import loopback
    from faulty_endpoint import faulty_endpoint

    monkeypatch.setattr(cluster_rates.subprocess, "run", run_in_child)
    rates_file = tmp_path / "rates.json"
    # As most recipes do, evaluate and save every few hundred steps.
    options = training_options(
        models_folder,
        data_folder,
        tmp_path / "out",
        eval_strategy="steps",
        eval_steps=500,
        save_strategy="steps",
        save_steps=500,
        load_best_model_at_end=True,
    )
    # The plan itself needs no records.
    position = options.index("--train_data_path")
    del options[position : position + 4]  # with --train_image_folder
    with loopback.running(0.01, encode_first=False) as port, faulty_endpoint() as endpoint:
        urls = loopback.urls(64, port, mix={"ok": 3, "missing": 1})
        source = tmp_path / "urls.tsv"
        source.write_text("".join(f"caption {number}\t{url}\n" for url, _, number in urls))
        options += ["--cluster", "2", "--urls", "1000", "--rates", str(rates_file)]
        options += ["--measure", str(source), "--measure-rows", "64", "--allow-private"]
        options += ["--endpoint", endpoint.url, "--model", "any"]
        assert main(options) == 0
    rates = read_rates(rates_file)
    num_images = sum(kind == "ok" for _, kind, _ in urls)
    assert rates.downloaded_share == num_images / 64
    assert rates.usable_share == 1
    sizes = [len(loopback.body_of(kind, number)) for _, kind, number in urls if kind == "ok"]
    # The measured bytes include the bodies of errors, which are small.
    assert rates.bytes_per_url == pytest.approx(sum(sizes) / 64, rel=0.05)
    assert all(value > 0 for value in asdict(rates).values())
    # There are at least as many captions as images.
    assert len(endpoint.captioned()) >= num_images
    printed = capsys.readouterr().out
    for step in ("download", "clean", "encode", "train", "caption"):
        assert f"* {step}" in printed
