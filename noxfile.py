"""Test with the oldest and the newest libraries that pyproject.toml permits.

Run `nox`, or `nox -s oldest -- tests/model`. Each session creates its own environment of several gigabytes,
because torch from PyPI comes with the CUDA libraries.
"""

import re

import nox

nox.options.sessions = ["oldest", "newest"]
QUICK_TESTS = ("-m", "not slow", "-n", "2")
EXTRAS = ".[download,report,gguf,serve,dev,docs]"


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Install the oldest permitted minor version of each core dependency, with its latest patch release."""
    requirements = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    pinned = [re.sub(r"^([^<>=,]+)>=([^,]+).*", r"\1==\2.*", line) for line in requirements]
    session.install(*pinned, "-e", EXTRAS)
    session.run("pytest", *QUICK_TESTS, *session.posargs)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Install the newest version of each dependency that pyproject.toml permits."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", EXTRAS)
    session.run("pytest", *QUICK_TESTS, *session.posargs)
