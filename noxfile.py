"""The oldest and the newest libraries that pyproject.toml allows: `nox`, or `nox -s oldest -- tests/model`.

Each session makes an environment of its own: several gigabytes, since torch comes with CUDA's libraries from PyPI.
"""

import re

import nox

nox.options.sessions = ["oldest", "newest"]
TESTS = ("-m", "not slow", "-n", "2")


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Every lower bound of the dependencies, in its last patch."""
    needs = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    pinned = [re.sub(r"^([^<>=,]+)>=([^,]+).*", r"\1==\2.*", need) for need in needs]
    session.install(*pinned, "-e", ".[dev,docs,serve]")
    session.run("pytest", *TESTS, *session.posargs)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The latest releases below the upper bounds."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[dev,docs,serve]")
    session.run("pytest", *TESTS, *session.posargs)
