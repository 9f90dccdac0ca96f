"""The documentation site: a broken link makes the build fail, and there are no broken links."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from cli_process import ForkedProcess

ROOT = Path(__file__).parents[1]
PAGES_OF_THE_REPOSITORY = sorted(ROOT.glob("*.md"))
# Each entry is another way in which a link can be broken.
BROKEN_LINKS = {
    "page": "[a page](no-such-page.md)",
    "anchor": "[an anchor](training.md#no-such-anchor)",
    "own anchor": "[an anchor of this page](#no-such-heading)",
    "image": "![an image](img/no-such-image.png)",
    "absolute": "[an absolute link](/no-such-root)",
}


def site_options() -> list[str]:
    """Return the arguments that `make site` passes to mkdocs."""
    recipe = (ROOT / "Makefile").read_text().split("\nsite:")[1].splitlines()[1]
    command = shlex.split(recipe)
    return command[command.index("$(BIN)/mkdocs") + 1 :]


def build_site(folder: Path) -> ForkedProcess:
    program = folder / "build_site.py"
    # The process lives for seconds, a quarter of which it would collect garbage.
    program.write_text("import gc\ngc.disable()\nfrom mkdocs.__main__ import cli\ncli()\n")
    command = [program, *site_options(), "--site-dir", folder / "site"]
    process = ForkedProcess(command, folder, environment={"NO_MKDOCS_2_WARNING": "1"})
    process.wait(300)
    return process


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the site is built from."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    for name in ("docs", "llava_simplified"):
        shutil.copytree(ROOT / name, tmp_path / name)
    # Without the index of the search, which has nothing to do with links.
    plugin = "  - search\n"
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert plugin in config
    (tmp_path / "mkdocs.yml").write_text(config.replace(plugin, ""), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_site_fails_for_every_broken_link_and_for_nothing_else(sources: Path) -> None:
    """The links are added to the site; without them, it would be built without a warning."""
    page = sources / "docs" / "data.md"
    links = "\n\n".join(BROKEN_LINKS.values())
    page.write_text(f"{page.read_text(encoding='utf-8')}\n\n{links}\n", encoding="utf-8")
    (sources / "docs" / "forgotten.md").write_text("# Not in the navigation\n")
    built = build_site(sources)
    assert built.returncode != 0
    targets = [re.search(r"\((.*)\)", link)[1] for link in BROKEN_LINKS.values()]
    targets.append("forgotten.md")
    for target in targets:
        assert target in built.stderr
    assert len(re.findall("(?m)^WARNING", built.stderr)) == len(targets), built.stderr


@pytest.mark.parametrize("page", PAGES_OF_THE_REPOSITORY, ids=lambda path: path.name)
def test_links_of_the_repository_lead_somewhere(page: Path) -> None:
    """Check the pages that are not part of the site, such as the README."""
    text = re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"", text)
    for link in ("".join(pair) for pair in links):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors_of(path), link


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    anchors = set()
    for heading in re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8")):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(kept.replace(" ", "-"))
    return anchors
