"""Optional dependencies: check that they are installed, and suggest the pip command that installs them."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

_PROJECT = "llava-simplified"


class MissingExtraError(ValueError):
    """An optional dependency is not installed; the message contains the pip command."""


def require_extra(extra: str, *modules: str, purpose: str) -> None:
    """Check that the modules of an optional dependency group can be imported.

    Args:
        extra: The name of the group in `pyproject.toml`, for example "serve".
        modules: Top-level names of the required modules.
        purpose: The command or option that requires them, for example "llava serve" or "--engine ray".

    Raises:
        MissingExtraError: One of the modules is not installed.
    """
    # Only look for the modules, without importing them: imports may take seconds.
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise MissingExtraError(f"{purpose} requires {names}; run {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return the pip command that installs an optional dependency group.

    In a source checkout, the command is an editable install. Otherwise, it names the packages of the group. It does
    not name this package, because that may be missing on the package index, and its source folder may have been deleted.

    Args:
        extra: The name of the group in `pyproject.toml`.
    """
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {_quote(f'{checkout}[{extra}]')}"
    return f"pip install {' '.join(_requirements_of(extra))}"


def cpp_compiler() -> str:
    """Return the name of the C++ compiler that torch.compile uses for the CPU."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return os.environ.get("CXX") or default


def _quote(argument: str) -> str:
    """Quote an argument that contains `>` or `[` for the shell of this machine."""
    # cmd.exe supports only double quotes.
    mark = '"' if sys.platform == "win32" else "'"
    return f"{mark}{argument}{mark}"


def _requirements_of(extra: str) -> list[str]:
    """Return the requirements of an optional dependency group, quoted for a shell."""
    from packaging.requirements import Requirement

    quoted: list[str] = []
    for line in metadata.requires(_PROJECT) or []:
        requirement = Requirement(line)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        # "all" consists of other groups of this project.
        if requirement.name == _PROJECT:
            for other in sorted(requirement.extras):
                quoted += _requirements_of(other)
        else:
            quoted.append(_quote(f"{requirement.name}{requirement.specifier}"))
    return quoted
