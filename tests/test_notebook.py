"""The notebook runs unchanged, with models that it creates, and the assertions in its cells hold."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(
    towers_are_traced_once: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run the cells in this process, which has imported everything. They have no magics, so they need no kernel."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "clear the outputs: nothing checks that they are those of the current code"
    )
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict[str, Any] = {"__name__": "__main__"}
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            for number, source in enumerate(cells):
                exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    finally:
        logging.disable(disabled)
    printed = capsys.readouterr().out
    assert "correct captions" in printed and "broken labels" in printed
