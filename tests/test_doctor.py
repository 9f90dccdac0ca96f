"""`llava doctor` on a complete installation, and on one with missing parts."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from llava_simplified import doctor_command

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def extras_in_pyproject() -> list[str]:
    """Return the names of all extras, in the order of the file."""
    text = PYPROJECT.read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("[project.")[0]
    return re.findall(r"^([a-z-]+) = \[", table, re.MULTILINE)


def test_doctor_reports_a_complete_installation_and_exits_with_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor_command.main([]) == 0
    output = capsys.readouterr().out
    assert "transformers" in output
    assert "HF_HUB_OFFLINE is set" in output
    assert "GB free" in output
    installed_extras = importlib.metadata.metadata("llava-simplified").get_all("Provides-Extra")
    for name in [*installed_extras, "flash-attn"]:
        line = re.search(rf"^  {name} .*$", output, re.MULTILINE)
        assert line, f"no line for {name}"
        assert "; for " in line[0], f"no purpose of {name}"


def test_doctor_ignores_version_limits_of_extras_when_it_checks_the_core(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = ["torch>=2", "torch<1; extra == 'quant'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requirements)
    assert doctor_command.main([]) == 0
    assert re.search(r"^  quant +missing: torch", capsys.readouterr().out, re.MULTILINE)


def test_every_extra_has_a_purpose() -> None:
    assert extras_in_pyproject() == list(doctor_command.EXTRA_PURPOSES)


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = ["no-such-package>=2", "torch<1", "also-gone; extra == 'quant'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requirements)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert doctor_command.main([]) == 1
    output = capsys.readouterr().out
    assert "MISSING: pip install 'no-such-package>=2'" in output
    assert "but <1 is required" in output
    assert re.search(r"quant +missing: also-gone; run pip install .*; for `--bits 4`", output)
    assert "cannot be reached" in output
    assert "local folder" in output


def test_doctor_resolves_extras_of_extras(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra "all" consists of other extras of this project."""
    requirements = [
        "gone; extra == 'serve'",
        "also-gone; extra == 'quant'",
        "llava-simplified[serve,quant]; extra == 'all'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requirements)
    requirements = doctor_command.Requirements().of_extra("all")
    assert [requirement.name for requirement in requirements] == ["also-gone", "gone"]
