"""`llava doctor` on a whole installation, and on one with a part missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_simplified import doctor


def test_a_whole_installation_is_reported_and_exits_with_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "transformers" in said and "HF_HUB_OFFLINE is set" in said and "GB free" in said
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = re.findall(
        r"^([a-z]+) = \[",
        project.partition("[project.optional-dependencies]")[2].partition("[project.")[0],
        re.M,
    )
    assert extras == list(doctor.EXTRAS)
    assert all(
        re.search(rf"^  {name} .*; gives ", said, re.MULTILINE) for name in (*extras, "flash-attn")
    )


def test_what_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["no-such-package>=2", "torch<1", "also-gone; extra == 'quant'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: needs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "MISSING: pip install 'no-such-package>=2'" in said and "but <1 is needed" in said
    assert "quant             lacks also-gone; gives `--bits 4`" in said
    assert "can't be reached" in said and "local folder" in said
