"""`llava doctor` on a whole installation, and on one with a part missing."""

from __future__ import annotations

import pytest

from llava_simplified import doctor


def test_a_whole_installation_is_reported_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "transformers" in said and "HF_HUB_OFFLINE is set" in said and "GB free" in said


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("no-such-package",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "MISSING: pip install no-such-package" in said
    assert "can't be reached" in said and "local folder" in said
