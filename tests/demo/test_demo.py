"""`llava demo`: every command of it, with tiny models instead of the real ones."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from llava_simplified import recipes
from llava_simplified.arguments import parse_arguments
from llava_simplified.demo import demo_command
from llava_simplified.demo.assets import DemoAssets
from llava_simplified.model.llava import Llava

DOCS = Path(__file__).parents[2] / "docs"


def headings(page: Path) -> list[str]:
    """Return the second-level headings of a Markdown file."""
    return [line for line in page.read_text().splitlines() if line.startswith("## ")]


def write_tiny_recipes(folder: Path) -> None:
    """Write the demo's recipes for the tiny vision tower, which has fewer layers."""
    folder.mkdir()
    for name in ("demo_projector.yaml", "demo.yaml"):
        text = (recipes.RECIPES_FOLDER / name).read_text()
        text = text.replace("[-1, 11, 5, 1]", "[-1, 1]")
        text = text.replace("compile_layers: true", "compile_layers: false")
        (folder / name).write_text(text)


@pytest.mark.slow
def test_demo_ends_with_a_model_and_a_report(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tiny_recipes(tmp_path / "configs")
    images = data_folder / "images"
    tiny = DemoAssets(
        language_model=models_folder / "llama",
        vision_tower=models_folder / "efficientnet",
        images=images,
        train_json=data_folder / "train.json",
        val_json=data_folder / "val.json",
    )
    monkeypatch.setattr(recipes, "RECIPES_FOLDER", tmp_path / "configs")
    monkeypatch.setattr(demo_command, "fetch", lambda _: tiny)
    monkeypatch.setenv("HOME", str(tmp_path))  # the folder of the feature cache
    monkeypatch.chdir(tmp_path)  # outside a checkout
    output = tmp_path / "it's here"  # needs quoting in a shell
    words = ["--output", str(output), "--max-steps", "2", "--limit", "3"]
    assert demo_command.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ llava ") == 5
    assert "word F1" in printed
    assert "report.html" in printed
    assert len(json.loads((output / "predictions.json").read_text())) == 3
    assert (output / "report.html").stat().st_size > 10_000
    model = Llava.from_pretrained(output / "model", device="cpu")
    assert isinstance(model.caption(images / "0.jpg"), str)

    check_documentation_scripts(tiny, output, tmp_path, monkeypatch)


def check_documentation_scripts(
    tiny: DemoAssets, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run what `make docs` runs, the tutorial and the README's image, with the demo's model."""
    monkeypatch.syspath_prepend(DOCS)
    import make_picture
    import make_tutorial

    # The scripts must write here, and not into docs/. The template stays where it is looked for.
    shutil.copy(DOCS / "tutorial.md.j2", tmp_path)
    monkeypatch.setattr(make_tutorial, "DOCS", tmp_path)
    monkeypatch.setattr(make_tutorial, "FIGURES", tmp_path / "img")
    image = tmp_path / "demo.png"
    tutorial_words = ["--checkpoint", str(output / "model"), "--image", "12.jpg"]
    image_words = ["--predictions", str(output / "predictions.json"), "--output", str(image)]
    for script, words in ((make_tutorial, tutorial_words), (make_picture, image_words)):
        monkeypatch.setattr(script, "fetch", lambda _: tiny)
        monkeypatch.setattr(sys, "argv", [script.__name__, *words])
        script.main()
    assert headings(tmp_path / "tutorial.md") == headings(DOCS / "tutorial.md")
    linked = set(re.findall(r"\(img/([^)]+)\)", (tmp_path / "tutorial.md").read_text()))
    assert {path.name for path in (tmp_path / "img").iterdir()} >= linked
    assert image.is_file()


@pytest.mark.parametrize("is_fast", [True, False])
def test_plan_steps_trains_in_the_dtype_that_is_fast_on_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fast: bool
) -> None:
    monkeypatch.setattr(demo_command, "has_fast_bfloat16", lambda: is_fast)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    steps = demo_command.plan_steps(DemoAssets(*[tmp_path] * 5), tmp_path, None, None)
    training = [step.argv for step in steps if step.argv[0] == "train"]
    assert len(training) == 2
    for words in training:
        arguments = parse_arguments(words[1:])[2]
        assert arguments.frozen_dtype == ("bfloat16" if is_fast else "float32")


def test_demo_ends_when_a_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def run(words: list[str]) -> int:
        commands.append(words[0])
        return 0 if len(commands) == 1 else 1

    monkeypatch.setattr(demo_command, "fetch", lambda _: DemoAssets(*[tmp_path] * 5))
    monkeypatch.setattr(demo_command.cli, "main", run)
    assert demo_command.main(["--output", str(tmp_path)]) == 1
    assert commands == ["inspect", "train"]


def test_demo_recipes_are_found_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = demo_command.plan_steps(DemoAssets(*[tmp_path] * 5), tmp_path, None, None)
    names = [
        step.argv[step.argv.index("--config") + 1] for step in steps if "--config" in step.argv
    ]
    assert names == ["demo_projector", "demo"]
    for name in names:
        assert recipes.resolve_recipe(name).is_file()


@pytest.mark.parametrize(
    ("max_steps", "expected"), [(None, [None, None]), (10, ["10", "10"]), (100, [None, "100"])]
)
def test_max_steps_only_shortens_the_stages(
    tmp_path: Path, max_steps: int | None, expected: list[str | None]
) -> None:
    steps = demo_command.plan_steps(DemoAssets(*[tmp_path] * 5), tmp_path, max_steps, None)
    found: list[str | None] = []
    for step in steps:
        if step.argv[0] == "train":
            option = "--max_steps"
            words = step.argv
            found.append(words[words.index(option) + 1] if option in words else None)
    assert found == expected
