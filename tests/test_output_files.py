"""Commands check their output files at the start, so that hours of work are not lost at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from llava_simplified.cli import main

# Commands that work for a while and then write one file. OUTPUT is replaced by its path.
COMMANDS = [
    "convert records.jsonl --output OUTPUT.json",
    "clean records.jsonl --output OUTPUT.jsonl",
    "reduce records.jsonl --count 1 --output OUTPUT.json",
    "pairs samples.jsonl --data-path records.jsonl --reward word_f1 --output OUTPUT.jsonl",
    "evaluate samples.jsonl --no-java --output OUTPUT.json",
    "evaluate samples.jsonl --no-java --report OUTPUT.html",
    "plan --cluster 2 --measure urls.tsv --rates OUTPUT.json",
]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file of records and a file of predictions, and make their folder the current one."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    record = {"image": "a.png", "instruction": "Describe it.", "response": "a cat"}
    rows = []
    for caption in ("a cat", "a dog"):
        rows.append({"index": 0, "image": "a.png", "gt_caption": "a cat", "pred_output": caption})
    for name, content in (("records.jsonl", [record]), ("samples.jsonl", rows)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return tmp_path


def split(command: str, output: str) -> Sequence[str]:
    return command.replace("OUTPUT", output).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_is_a_folder_is_an_error_before_the_work(
    inputs: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, name = split(command, "result")
    (inputs / name).mkdir()
    before = sorted(inputs.iterdir())
    assert main(split(command, "result")) == 2
    output = capsys.readouterr()
    assert name in output.err
    assert "folder" in output.err
    assert not output.out, "nothing was computed"
    assert sorted(inputs.iterdir()) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_below_a_file_is_an_error_before_the_work(
    inputs: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(split(command, "records.jsonl/result")) == 2
    output = capsys.readouterr()
    assert "records.jsonl/result" in output.err
    assert "Errno" not in output.err
    assert not output.out, "nothing was computed"


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("plan", "clean"))])
def test_the_folder_of_an_output_is_created(inputs: Path, command: str) -> None:
    assert main(split(command, "new/folder/result")) == 0
    *_, name = split(command, "new/folder/result")
    assert (inputs / name).stat().st_size
