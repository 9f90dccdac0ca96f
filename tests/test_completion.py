"""Tests of shell completion: the scripts are valid, and bash completes with them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from llava_simplified.cli import COMMANDS
from llava_simplified.completion_command import main


@pytest.fixture
def bash_script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["bash"]) == 0
    return capsys.readouterr().out


def complete_in_bash(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last word of a command line."""
    program = f"""
{script}
COMP_WORDS=("$@")
COMP_CWORD=$(( $# - 1 ))
function_name=$(complete -p llava | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function_name" llava "${{COMP_WORDS[COMP_CWORD]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_completion_writes_a_valid_bash_script(bash_script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=bash_script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in bash_script
    for option in ("--model-path", "--shards", "--train_data_path", "--lora_r"):
        assert option in bash_script


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["llava", "capt"], ["caption"]),
        (["llava", "ca"], ["caption"]),
        (["llava", "caption", "--model-p"], ["--model-path"]),
        (["llava", "caption", "--eng"], ["--engine"]),
        (["llava", "caption", "--engine", ""], ["local", "ray"]),
        (["llava", "train", "--lora_"], None),
        (["llava", "completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes_commands_options_and_choices(
    bash_script: str, words: list[str], expected: list[str] | None
) -> None:
    offered = complete_in_bash(bash_script, *words)
    if expected is None:
        expected = ["--lora_enable", "--lora_r", "--lora_alpha", "--lora_dropout", "--lora_bias"]
    assert sorted(offered) == sorted(expected)


def test_completion_writes_a_zsh_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef llava")
    for word in ("caption", "--model-path", "--train_data_path"):
        assert word in script
    if shutil.which("zsh"):
        done = subprocess.run(["zsh", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
