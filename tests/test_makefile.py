"""The Makefile: the Python that it requires, the environment that it creates, and the browser that it looks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(
        shutil.which("make") is None or sys.platform == "win32", reason="needs make and a shell"
    ),
]
# A replacement for Python that prints its version instead of running code, and only logs how it is called.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$2" in *base_prefix*) echo {version};; esac
"""


def write_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make with the Makefile of this repository in another folder."""
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    command = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), *words]
    # Ignore the options of a `make` that runs these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment.pop("MFLAGS", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_setup_names_the_python_that_it_requires(tmp_path: Path) -> None:
    run = make(tmp_path, ".venv/.core", f"PYTHON={sys.executable}", "MINIMUM=3.99", "INSTALL=true")
    assert run.returncode != 0
    assert "requires Python 3.99" in run.stdout
    assert not (tmp_path / ".venv").exists()
    run = make(tmp_path, ".venv/.core", "PYTHON=no-such-python", "INSTALL=true")
    assert run.returncode != 0
    assert "requires Python 3.11" in run.stdout


@pytest.mark.parametrize("existing", ["3.11", "3.10", None])
def test_setup_replaces_an_environment_of_another_python(
    tmp_path: Path, existing: str | None
) -> None:
    log = tmp_path / "log.txt"
    python = write_program(tmp_path / "python", FAKE_PYTHON.format(log=log, version="3.11"))
    (tmp_path / ".venv").mkdir()
    if existing:
        script = FAKE_PYTHON.format(log=log, version=existing)
        write_program(tmp_path / ".venv" / "bin" / "python", script)
    run = make(tmp_path, ".venv/.core", f"PYTHON={python}", "INSTALL=true")
    assert run.returncode == 0, run.stderr
    created = [line for line in log.read_text().splitlines() if line.startswith("-m venv")]
    assert created == ["-m venv .venv" if existing == "3.11" else "-m venv --clear .venv"]


@pytest.mark.parametrize("name", ["chromium", "google-chrome"])
def test_setup_browser_finds_each_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for program in ("id", "make", "sh"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / program).symlink_to(str(shutil.which(program)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "not installed" in make(tmp_path, "setup-browser").stdout
    write_program(tmp_path / "bin" / name, "#!/bin/sh\n")
    assert make(tmp_path, "setup-browser").stdout == ""
