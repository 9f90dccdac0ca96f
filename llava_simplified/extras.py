"""Optional dependencies: check that they are installed, and suggest the pip command that installs them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


class MissingExtraError(ValueError):
    """An optional dependency is not installed; the message contains the pip command."""


def require_extra(extra: str, *modules: str, purpose: str) -> None:
    """Check that the modules of an optional dependency group can be imported.

    Args:
        extra: The name of the group in `pyproject.toml`, for example "serve".
        modules: Top-level names of the required modules.
        purpose: The command or option that requires them: "llava serve", "--engine ray".

    Raises:
        MissingExtraError: One of the modules is not installed.
    """
    # Only look for the modules, without importing them: imports may take seconds.
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise MissingExtraError(f"{purpose} needs {names}: run {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return the pip command that installs an optional dependency group.

    In a source checkout this is an editable install: the package may not be on an index yet.
    """
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install 'llava-simplified[{extra}]'"
