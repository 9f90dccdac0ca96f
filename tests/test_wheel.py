"""The built wheel contains the whole package, and works outside a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_process import run_code

pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_simplified"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip would build, built by calling setuptools directly, without build isolation."""
    pytest.importorskip("setuptools", minversion="77")
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, sources / PACKAGE.name, ignore=ignored)
    target = tmp_path_factory.mktemp("dist")
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(target)], cwd=sources, check=True, capture_output=True
    )
    [built] = target.glob("*.whl")
    return built


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    """Run code in another folder, with the unpacked wheel as the only copy of the package."""
    site = folder / "site-packages"
    if not site.is_dir():
        zipfile.ZipFile(wheel).extractall(site)
    check = f"import llava_simplified\nassert llava_simplified.__file__.startswith({str(site)!r})\n"
    return run_code(check + code, site=site, folder=folder)


@pytest.mark.medium
def test_wheel_contains_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names


@pytest.mark.medium
def test_installed_package_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    code = (
        "from llava_simplified.arguments import parse_arguments\n"
        "for name in ('demo', 'demo_projector', 'configs/cc3m_mistral7b_clip_b16_lora.yaml'):\n"
        "    print(parse_arguments(['--config', name])[2].config)\n"
    )
    assert len(run_installed(wheel, tmp_path, code).splitlines()) == 3


@pytest.mark.medium
def test_install_hint_of_an_installed_package_names_the_packages(
    wheel: Path, tmp_path: Path
) -> None:
    """Before a release, no package index has `llava-simplified`, so the hint must not name it."""
    code = (
        "from llava_simplified.extras import install_command\n"
        "for name in ('serve', 'all'): print(install_command(name))\n"
    )
    serve, everything = run_installed(wheel, tmp_path, code).splitlines()
    assert serve.startswith("pip install 'starlette>=")
    assert "uvicorn" in serve
    for part in ("uvicorn", "aiohttp", "matplotlib"):
        assert part in everything
    assert "llava-simplified" not in serve + everything
