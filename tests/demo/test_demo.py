"""`llava demo`: every one of its commands, on tiny models in place of the real ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from llava_simplified.arguments import parse_arguments
from llava_simplified.demo import demo_command as run
from llava_simplified.demo.assets import DemoAssets
from llava_simplified.model.llava import Llava

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_whole_way_ends_with_a_model_and_a_report(
    models_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipes = tmp_path / "configs"
    recipes.mkdir()
    for recipe in (
        "demo_projector.yaml",
        "demo.yaml",
    ):  # but for the layers: the tiny tower has no eleventh
        text = (run.CONFIGS / recipe).read_text().replace("[-1, 11, 5, 1]", "[-1, 1]")
        (recipes / recipe).write_text(text.replace("compile_layers: true", "compile_layers: false"))
    data = data_folder / "images"
    tiny = DemoAssets(
        models_folder / "llama",
        models_folder / "efficientnet",
        data,
        data_folder / "train.json",
        data_folder / "val.json",
    )
    monkeypatch.setattr(run, "CONFIGS", recipes)
    monkeypatch.setattr(run, "fetch", lambda _: tiny)
    monkeypatch.setenv("HOME", str(tmp_path))  # where features are cached
    output = tmp_path / "it's here"
    assert run.main(["--output", str(output), "--max-steps", "2", "--limit", "3"]) == 0
    said = capsys.readouterr().out
    assert said.count("$ llava ") == 5 and "word F1" in said and "report.html" in said
    assert len(json.loads((output / "predictions.json").read_text())) == 3
    assert (output / "report.html").stat().st_size > 10_000
    assert isinstance(
        Llava.from_pretrained(output / "model", device="cpu").caption(data / "0.jpg"), str
    )

    # `make docs`: the tutorial and the README's picture, of this model
    monkeypatch.syspath_prepend(DOCS)
    import make_picture
    import make_tutorial

    for script, words in (
        (make_tutorial, ["--checkpoint", str(output / "model"), "--image", "12.jpg"]),
        (
            make_picture,
            [
                "--predictions",
                str(output / "predictions.json"),
                "--output",
                str(tmp_path / "demo.png"),
            ],
        ),
    ):
        monkeypatch.setattr(script, "fetch", lambda _: tiny)
        monkeypatch.setattr(sys, "argv", [script.__name__, *words])
        monkeypatch.setattr(script, "HERE", tmp_path, raising=False)
        monkeypatch.setattr(script, "PICTURES", tmp_path / "img", raising=False)
        script.main()
    page = (tmp_path / "tutorial.md").read_text()
    headings = [
        line for line in (DOCS / "tutorial.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert [line for line in page.splitlines() if line.startswith("## ")] == headings
    assert {path.name for path in (tmp_path / "img").iterdir()} >= set(
        re.findall(r"\(img/([^)]+)\)", page)
    )
    assert (tmp_path / "demo.png").is_file()


@pytest.mark.parametrize("fast", [True, False])
def test_the_demo_trains_in_the_numbers_that_this_machine_is_fast_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(run, "fast_bf16", lambda: fast)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    lines = [words for _, words in run.commands(DemoAssets(*[tmp_path] * 5), tmp_path, None, None)]
    trains = [words for words in lines if words[0] == "train"]
    assert len(trains) == 2
    for words in trains:
        assert parse_arguments(words[1:])[2].frozen_dtype == ("bfloat16" if fast else "float32")


def test_a_command_that_fails_ends_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "fetch", lambda _: DemoAssets(*[tmp_path] * 5))
    ran = []
    monkeypatch.setattr(run.cli, "main", lambda words: ran.append(words[0]) or len(ran) // 2)
    assert run.main(["--output", str(tmp_path)]) == 1
    assert ran == ["inspect", "train"]


def test_an_installation_without_recipes_says_where_the_demo_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CONFIGS", tmp_path / "gone")
    with pytest.raises(ValueError, match="runs from a checkout"):
        run.main([])
