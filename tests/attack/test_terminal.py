"""Attacks on the terminal: names of files, captions, answers and messages that contain control sequences.

A terminal that prints such a text executes them: they change the title or the clipboard, or overwrite other lines. The
rule for every command: it prints no control characters except line breaks and tabs.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

import llava_simplified
from llava_simplified import jobs
from llava_simplified.cli import COMMANDS, main
from llava_simplified.demo import demo_command
from llava_simplified.model.llava import Llava
from llava_simplified.options import configure_logging
from llava_simplified.serve import serve_command

# The title of the window, a C1 sequence for a colour, backspaces and a mark that reverses the direction of writing.
HOSTILE = "\x1b]0;x\x07\x9b31m\x08\u202e"
ESCAPED = r"\x1b]0;x\x07\x9b31m\x08\u202e"

Commands = list[list[object]]


class Workplace:
    """A folder with a hostile name, in which everything has hostile names.

    Args:
        folder: The folder.
        models: Folder of tiny models.
        checkpoint: A checkpoint.
    """

    def __init__(self, folder: Path, models: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.language_model = self._link("lm", models / "mistral")
        self.vision_tower = self._link("tower", models / "clip")
        self.checkpoint = self._link("checkpoint", checkpoint)
        self.images = folder / f"images{HOSTILE}"
        self.images.mkdir()
        self.image = self.images / f"1{HOSTILE}.png"
        Image.new("RGB", (40, 32), "red").save(self.image)
        # This file is not an image, so each command that reads it prints an error with its name.
        (self.images / f"2{HOSTILE}.png").write_bytes(b"\x1b[2J no image")
        rows = []
        for number in (1, 2, 3):  # the third file does not exist
            row = {"id": f"id{number}{HOSTILE}", "image": f"{number}{HOSTILE}.png"}
            rows.append({**row, "instruction": f"What?{HOSTILE}", "response": f"cat{HOSTILE}"})
        self.records = self._write("records.json", rows)
        self.unreadable_records = self._write("unreadable.json", [{**rows[0], HOSTILE: 1}, HOSTILE])
        predictions = []
        for number, row in enumerate(rows):
            answers = {"gt_caption": row["response"], "pred_output": f"cat {HOSTILE} sat"}
            predictions.append({"index": number, "image": row["image"], **answers})
        self.predictions = self._write("predictions.json", predictions)
        self.other_predictions = self._write("other.json", predictions)
        self.table = folder / f"captions{HOSTILE}.tsv"
        self.table.write_text(
            f"caption{HOSTILE}\thttp://127.0.0.1:9/{HOSTILE}.png\na\nb\thttp://[{HOSTILE}]/\n"
        )
        self.missing = folder / f"missing{HOSTILE}.json"

    def _link(self, name: str, target: Path) -> Path:
        path = self.folder / f"{name}{HOSTILE}"
        path.symlink_to(target)
        return path

    def _write(self, name: str, rows: list[Any]) -> Path:
        path = self.folder / f"{HOSTILE}{name}"
        path.write_text(json.dumps(rows))
        return path

    def new(self, name: str) -> Path:
        """Return a path for an output."""
        return self.folder / f"new{HOSTILE}{name}"

    # ---- the command lines of each command: some that work, some with a mistake ----

    def download(self) -> Commands:
        options = ["--allow-private", "--retries", 0, "--workers", 1]
        return [
            [self.table, "--output", self.new("download"), *options],
            [self.missing, "--output", self.new("download")],
            [self.table, "--output", self.new("download"), f"--{HOSTILE}"],
            [self.table, "--output", self.new("download"), HOSTILE],
        ]

    def convert(self) -> Commands:
        output = ("--output", self.new("converted.json"))
        return [[self.table, *output], [self.missing, *output], [self.predictions, *output]]

    def clean(self) -> Commands:
        output = ("--image-folder", self.images, "--output", self.new("cleaned.json"))
        return [
            [self.records, *output, "--workers", 1],
            [self.unreadable_records, *output, "--workers", 1],
            [self.missing, *output],
        ]

    def reduce(self) -> Commands:
        return [[path, "--count", 1] for path in (self.records, self.missing)]

    def merge_manifests(self) -> Commands:
        return [[self.missing], [self.folder]]

    def inspect(self) -> Commands:
        model = ("--model_name_or_path", self.language_model, "--image-folder", self.images)
        commands: Commands = []
        for path in (self.records, self.unreadable_records, self.missing):
            commands.append(["--data", path, *model])
        return commands

    def training(self, records: Path, *more: object) -> list[object]:
        """Return the options of a training run."""
        return [
            *("--model_name_or_path", self.language_model, "--vision_tower", self.vision_tower),
            *("--train_data_path", records, "--train_image_folder", self.images),
            *("--max_steps", 1, "--max_bad_records", 1, "--max_bad_images", 1),
            *("--per_device_train_batch_size", 3, "--feature_cache_dir", self.new("features")),
            *("--output_dir", self.new("model"), *more),
        ]

    def encode(self) -> Commands:
        options = ("--cache_vision_features", "disk")
        return [self.training(path, *options) for path in (self.records, self.missing)]

    def plan(self) -> Commands:
        return [self.training(path, "--tflops", 1) for path in (self.records, self.missing)]

    def train(self) -> Commands:
        return [
            self.training(self.records),
            self.training(self.unreadable_records, "--max_bad_records", 0),
            self.training(self.records, "--config", self.missing),
            self.training(self.records, "--model_name_or_path", self.missing),
        ]

    def pairs(self) -> Commands:
        options = ("--output", self.new("pairs.json"), "--image-folder", self.images)
        return [
            [self.predictions, "--data-path", self.records, *options],
            [self.records, "--data-path", self.records, *options],
            [self.missing, "--data-path", self.records, *options],
            [self.predictions, "--data-path", self.missing, *options],
            [self.predictions, "--data-path", self.records, *options, "--reward", HOSTILE],
        ]

    def caption(self) -> Commands:
        model = ("--model-path", self.checkpoint, "--max-new-tokens", 2)
        output = ("--output", self.new("captions.jsonl"))
        return [
            [self.image, *model],
            [self.image, *model, "--trials", 2, "--temperature", 1],
            [self.images, *model, *output],
            [self.records, *model, "--image-folder", self.images, *output],
            [self.missing, *model, *output],
            [self.image, "--model-path", self.missing],
        ]

    def chat(self) -> Commands:
        return [[path, "--model-path", self.checkpoint] for path in (self.image, self.missing)]

    def predict(self) -> Commands:
        options = ("--model-path", self.checkpoint, "--max-new-tokens", 2)
        output = ("--output", self.new("predicted.json"), "--image-folder", self.images)
        return [
            ["--data-path", self.records, *options, *output],
            ["--data-path", self.missing, *options, *output],
            ["--image", self.image, *options],
        ]

    def evaluate(self) -> Commands:
        options = ("--no-java", "--resamples", 0)
        return [
            [self.predictions, self.other_predictions, *options, "--output", self.new("scores")],
            [self.predictions, *options, "--references", self.records],
            [self.predictions, *options, "--train-captions", self.missing],
            [self.unreadable_records, *options],
        ]

    def benchmark(self) -> Commands:
        options = ("--model-path", self.checkpoint, "--output", self.new("benchmark"))
        return [["coco", path, *options] for path in (self.images, self.missing)]

    def serve(self) -> Commands:
        return [[self.missing], [self.checkpoint, "--examples", self.missing]]

    def export(self) -> Commands:
        output = ("--output", self.new("exported"))
        return [[self.checkpoint, *output], [self.checkpoint, *output], [self.missing, *output]]

    def merge(self) -> Commands:
        output = ("--output", self.new("merged"))
        return [[self.checkpoint, *output], [self.missing, *output]]

    def import_(self) -> Commands:
        output = ("--output", self.new("imported"))
        return [[self.missing, *output], [self.language_model, *output]]

    def push(self) -> Commands:
        return [
            [self.images, "me/model", "--dry-run"],
            [self.missing, "me/m"],
            [self.images, HOSTILE],
        ]

    def demo(self) -> Commands:
        return [["--download-only", "--cache-dir", self.new("cache")]]

    def doctor(self) -> Commands:
        return [["--cache-dir", self.missing]]

    def completion(self) -> Commands:
        return [[HOSTILE]]


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, models_folder: Path, checkpoint: Path
) -> Workplace:
    folder = tmp_path_factory.mktemp("terminal") / f"folder{HOSTILE}"
    folder.mkdir()
    return Workplace(folder, models_folder, checkpoint)


@pytest.fixture(autouse=True)
def output_of_process() -> Iterator[None]:
    """Hide the progress bars of Transformers, which use carriage returns; undo the changes of `llava serve` to the log."""
    configure_logging()
    handlers = logging.getLogger("llava_simplified").handlers
    formatters = [handler.formatter for handler in handlers]
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    for handler, formatter in zip(handlers, formatters):
        handler.setFormatter(formatter)


def control_characters(printed: str) -> set[str]:
    """Return the control characters of a text."""
    found = set()
    for character in printed:
        is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        if is_control or character == "\u202e":
            found.add(character)
    return found


def hostile_answer(*_: object, **__: object) -> Sequence[str]:
    return ["a cat", HOSTILE]


def fail_to_fetch(_: Path) -> object:
    raise OSError(f"no space on {HOSTILE}")


@pytest.mark.medium
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_lets_data_control_the_terminal(
    workplace: Workplace,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n"))
    monkeypatch.setattr(Llava, "stream", hostile_answer)
    monkeypatch.setattr(demo_command, "fetch", fail_to_fetch)
    method = name.replace("-", "_")
    commands: Callable[[], Commands] = getattr(
        workplace, f"{method}_" if name == "import" else method
    )
    all_printed = ""
    for arguments in commands():
        argv = [name, *map(str, arguments)]
        try:
            status = main(argv)
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
        assert status in (0, 1, 2), argv
        printed = capfd.readouterr()
        for text in printed:
            assert not control_characters(text), (name, ascii(text))
            all_printed += text
    assert ESCAPED in all_printed, "the commands must print the names in escaped form"


def test_logs_and_progress_do_not_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve_command._log_with_time()
    logging.getLogger("llava_simplified.test").warning("image %s", HOSTILE)
    monkeypatch.setattr(jobs.Progress, "LOG_INTERVAL", 0)
    with jobs.Progress(2, "images") as progress:
        progress.update(1, f"the last is {HOSTILE}")
    printed = capsys.readouterr().err
    assert not control_characters(printed)
    assert printed.count(ESCAPED) == 2


def is_print(function: ast.expr) -> bool:
    """Return whether a called function is `print`, or the method `write` of a standard stream."""
    if isinstance(function, ast.Attribute) and function.attr == "write":
        return ast.unparse(function.value) in ("sys.stdout", "sys.stderr")
    return isinstance(function, ast.Name) and function.id == "print"


@pytest.mark.medium
def test_everything_is_printed_by_one_function() -> None:
    """`print_text` escapes control characters.

    Two other places print without it: the progress line, which moves the cursor, and a script for the shell.
    """
    exceptions = {"options.py", "jobs.py", "completion_command.py"}
    package = Path(llava_simplified.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.name in exceptions:
            continue
        code = path.read_text(encoding="utf-8")
        if "print" not in code and "write" not in code:
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and is_print(node.func):
                found.append(f"{path.name}:{node.lineno}")
    assert not found, "use options.print_text"
