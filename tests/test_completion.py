"""Tests of shell completion: the scripts are valid, and bash and zsh complete with them."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

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
        expected = [
            "--lora_enable",
            "--lora_options",
            "--lora_r",
            "--lora_alpha",
            "--lora_dropout",
            "--lora_bias",
        ]
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


# An interactive shell with the completion system of zsh. The widget on Ctrl-X writes the command line to a file.
ZSH_SETUP = """
PS1='' PS2='' LISTMAX=10000
unsetopt beep
fpath=({folder} $fpath)
autoload -Uz compinit && compinit -u -D
write-buffer() {{ print -r -- "$BUFFER" >> {folder}/lines; BUFFER= }}
zle -N write-buffer
bindkey '^X' write-buffer
"""


def complete_in_zsh(script: str, folder: Path, *lines: str) -> list[str]:
    """Type each line and Tab into an interactive zsh; return what the lines become."""
    import pty  # only POSIX has it, like zsh

    (folder / "_llava").write_text(script)
    (folder / ".zshrc").write_text(ZSH_SETUP.format(folder=folder))
    written = folder / "lines"
    environment = {**os.environ, "ZDOTDIR": str(folder), "TERM": "dumb"}
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("zsh", ["zsh", "-d", "-i"], environment)
    completed: list[str] = []
    deadline = time.monotonic() + 60
    try:
        for line in lines:
            os.write(terminal, f"{line}\t\x18".encode())
            while len(completed) < lines.index(line) + 1:
                assert time.monotonic() < deadline, f"zsh does not answer: {completed}"
                # Read the screen, so that the shell is not blocked.
                if select.select([terminal], [], [], 0.05)[0]:
                    os.read(terminal, 65536)
                if written.exists():
                    completed = written.read_text().splitlines()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)
    return completed


@pytest.mark.medium
@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_completes_commands_options_and_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["zsh"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "photos").mkdir()
    expected = {
        "llava capt": "llava caption ",
        "llava caption --model-p": "llava caption --model-path ",
        "llava caption --eng": "llava caption --engine ",
        "llava caption --engine l": "llava caption --engine local ",
        "llava train --lora_al": "llava train --lora_alpha ",
        "llava completion z": "llava completion zsh ",
        "llava predict --limit 3 --mod": "llava predict --limit 3 --model-",
        f"llava caption --image-folder {tmp_path}/ph": f"llava caption --image-folder {tmp_path}/photos/",
        "llava nothing --": "llava nothing --",
    }
    for name in COMMANDS:
        expected[f"llava {name} --verb"] = f"llava {name} --verbose "
    completed = complete_in_zsh(script, tmp_path, *expected)
    assert completed == list(expected.values())
