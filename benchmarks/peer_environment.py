"""Where the programs that we compare with are installed: virtual environments in the user's cache.

An environment is made under a temporary name and renamed when it is complete, so that an interrupted
installation is not taken for a finished one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def peer_cache() -> Path:
    """Return the folder of all peers."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "llava_simplified"


@contextmanager
def published_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` when the block ends without an error."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def create_peer_python(
    folder: Path,
    requirements: Sequence[str],
    constraints: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Path:
    """Return the Python of a peer's virtual environment, which is created if it is missing.

    Args:
        folder: Folder of the environment.
        requirements: What pip installs into it.
        constraints: Versions of what the requirements depend on, as in a constraints file of pip.
        optional: Packages that are installed with the peer, but that it can do without. They are removed if they
            cannot be imported.

    Raises:
        subprocess.CalledProcessError: The installation failed.
    """
    python = folder / "bin" / "python"
    if python.exists():
        return python
    with published_folder(folder) as partial:
        # The scripts of an environment contain its path and break when it is renamed, but
        # `python -m MODULE`, which all peers use, does not.
        venv.create(partial, with_pip=True)
        constraints_file = partial / "constraints.txt"
        constraints_file.write_text("".join(f"{line}\n" for line in constraints))
        partial_python = partial / "bin" / "python"
        install = [str(partial_python), "-m", "pip", "install", "-q"]
        subprocess.run([*install, "-c", str(constraints_file), *requirements], check=True)
        remove_broken_packages(partial_python, optional)
    return python


def remove_broken_packages(python: Path, packages: Sequence[str]) -> None:
    """Uninstall the packages that cannot be imported, so that others do not try to use them.

    Args:
        python: Python of the environment.
        packages: Names of packages. Each must also be the name of the module that the package provides.

    Raises:
        subprocess.CalledProcessError: A package could not be removed.
    """
    for package in packages:
        imported = subprocess.run([str(python), "-c", f"import {package}"], capture_output=True)
        if imported.returncode:
            uninstall = [str(python), "-m", "pip", "uninstall", "-q", "-y", package]
            subprocess.run(uninstall, check=True)
