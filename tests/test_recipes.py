"""Packaged training recipes: `--config` finds them by name, by the documented path, or as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_simplified.arguments import parse_arguments
from llava_simplified.recipes import RECIPES_FOLDER, resolve_recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml"])
def test_resolve_recipe_finds_packaged_recipes_outside_a_checkout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_recipe(name) == RECIPES_FOLDER / "demo.yaml"


def test_resolve_recipe_prefers_an_existing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/demo.yaml").write_text("lora_r: 3\n")
    assert resolve_recipe("configs/demo.yaml") == Path("configs/demo.yaml")
    assert parse_arguments(["--config", "configs/demo.yaml"])[0].lora_r == 3


@pytest.mark.parametrize("name", ["demos", "elsewhere/demo.yaml", "demo.json", ""])
def test_resolve_recipe_lists_the_recipes_for_an_unknown_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--config .*demo, .*demo_projector"):
        resolve_recipe(name)


def test_parse_arguments_reads_a_packaged_recipe() -> None:
    model, _, training = parse_arguments(["--config", "cc3m_mistral7b_clip_b16_lora"])
    assert model.model_name_or_path == "mistralai/Mistral-7B-Instruct-v0.1"
    assert training.model_max_length == 64


def test_configs_in_the_checkout_is_the_packaged_folder() -> None:
    assert (ROOT / "configs").resolve() == RECIPES_FOLDER.resolve()


def test_the_tutorials_deepspeed_configuration_is_zero2() -> None:
    alias = ROOT / "ds_configs" / "config_zero2.json"
    assert alias.read_text() == (ROOT / "ds_configs" / "zero2.json").read_text()
