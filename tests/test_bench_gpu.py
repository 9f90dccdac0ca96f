"""Run `benchmarks/bench_gpu.py` with tiny shapes on a CPU, to find its errors before it runs on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def failures(results: dict[str, Any]) -> list[str]:
    """Return the measurements that failed."""
    found = []
    for section, result in results.items():
        for measurement in result["measurements"]:
            if "failed" in measurement:
                found.append(f"{section}: {measurement['name']}: {measurement['failed']}")
    return found


def test_bench_gpu_runs_the_next_section_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu

    for section in bench_gpu.SECTIONS:
        assert callable(bench_gpu.import_section(section).run)
    output = tmp_path / "gpu.json"
    argv = ["--tiny", "--in-process", "--sections", "exactness", "machine", "--fail", "exactness"]
    assert bench_gpu.main([*argv, "--output", str(output)]) == 1
    results = json.loads(output.read_text())
    assert results["exactness"]["state"].startswith("failed: RuntimeError: failed on purpose")
    assert results["machine"]["state"] == "done"
    measurements = results["machine"]["measurements"]
    assert [row["name"] for row in measurements] == ["versions", "device", "limits"]
    assert "matmul TFLOP/s" in capsys.readouterr().out


@pytest.mark.medium
def test_bench_gpu_measures_all_other_sections_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu

    output = tmp_path / "gpu.json"
    argv = ["--tiny", "--in-process", "--fail", "machine", "--output", str(output)]
    assert bench_gpu.main(argv) == 1
    results = json.loads(output.read_text())
    assert list(results) == list(bench_gpu.SECTIONS)
    assert results.pop("machine") == {
        "state": "failed: RuntimeError: failed on purpose (--fail)",
        "seconds": pytest.approx(0, abs=60),
        "measurements": [],
    }
    assert failures(results) == []
    assert {result["state"] for result in results.values()} == {"done"}

    measured = {}
    for result in results.values():
        for measurement in result["measurements"]:
            measured[measurement["name"]] = measurement
    for precision, limit in (("float64", 1e-10), ("float32", 1e-4)):
        assert measured[f"shared == separate, {precision}"]["difference"] <= limit
        assert measured[f"packed == unpacked, {precision}"]["difference"] <= limit
    assert measured["batched == single, greedy, float32"]["tokens"] > 20
    assert measured["ours / stock, 5 captions"]["ratio"] > 0
    assert measured["ours, 5 captions"]["captions/s"] > 0
    assert measured["ours / stock, batch 2, 3 sample(s)"]["ratio"] > 0
    assert measured["decode, batch 2"]["share of bandwidth"] > 0
    assert measured["3 clients"]["first token, median s"] > 0
    assert measured["save, load and resume"]["difference of weights"] == 0
    assert measured["forecast of `llava plan`"]["forecast, 5 captions, checkpointing"] > 0


@pytest.mark.slow
def test_bench_gpu_kills_a_section_that_hangs_and_runs_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike in the tests above, each section runs in a separate process. This one needs few imports."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_gpu

    monkeypatch.setitem(bench_gpu.SECTIONS, "exactness", 1)
    output = tmp_path / "gpu.json"
    argv = ["--tiny", "--sections", "exactness", "machine", "--hang", "exactness"]
    assert bench_gpu.main([*argv, "--output", str(output)]) == 1
    results = json.loads(output.read_text())
    assert results["exactness"]["state"] == "killed after 1 s"
    assert results["machine"]["state"] == "done"
    assert failures(results) == []
    measurements = results["machine"]["measurements"]
    assert [row["name"] for row in measurements] == ["versions", "device", "limits"]
    assert "== machine" in output.with_suffix(".log").read_text()
