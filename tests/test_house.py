"""Data flows one way: a room imports only what stands to its left, also inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llava_simplified"
# From left to right. A name is a package (folder) or a single file; two on one line do not import each other, the
# files of one package do. `prepare` writes what `data` reads, so it uses the formats and the decoder of `data`. The
# scores of texts need no model: training, which reports them, may import them though they live in `evaluation`.
SCORES_OF_TEXTS = [
    f"evaluation/{name}"
    for name in (
        "bootstrap",
        "clip_metrics",
        "java_metrics",
        "metrics",
        "ngram_metrics",
        "ptb_characters",
        "ptb_rules",
        "ptb_tokenizer",
        "rouge",
    )
]
# Training asks a server for rewards, in the way in which `captioning` asks it for captions.
CLIENT_OF_SERVERS = ["captioning/endpoint_client", "captioning/endpoint_options"]
ORDER = [
    ("options", "extras", "foreign_files"),
    ("hub", "jobs", "workers", "recipes", "small_models"),
    ("prompt", "html_report"),
    ("data",),
    ("prepare", *SCORES_OF_TEXTS),
    ("model",),
    ("training_options", "data_option", *CLIENT_OF_SERVERS),
    ("arguments",),
    ("training",),
    ("inspection", "captioning"),
    ("evaluation",),
    ("serve", "export", "doctor_command"),
    ("demo", "python_api"),
    ("cli",),
    ("__main__", "completion_command"),
]


def rank(module: str) -> int:
    """Of `data/images` or `prompt`: the line of ORDER that it stands in; the longest name that fits counts."""
    found = [
        (len(name), line)
        for line, names in enumerate(ORDER)
        for name in names
        if f"{module}/".startswith(name + "/")
    ]
    assert found, f"{module} has no place in the house: name it in ORDER"
    return max(found)[1]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava_simplified."):
            inner = (node.module or "").removeprefix("llava_simplified.").replace(".", "/")
            is_room = (PACKAGE / inner).is_dir()
            found |= {f"{inner}/{alias.name}" for alias in node.names} if is_room else {inner}
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("llava_simplified.").replace(".", "/")
                for a in node.names
                if a.name.startswith("llava_simplified.")
            }
    return found


def room(module: str) -> str:
    return module.partition("/")[0]


MODULES = sorted(
    str(p.relative_to(PACKAGE).with_suffix(""))
    for p in PACKAGE.rglob("*.py")
    if p.name != "__init__.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_what_stands_before_it(module: str) -> None:
    for other in imports(PACKAGE / f"{module}.py"):
        same_room = "/" in module and room(other) == room(module)
        assert same_room or rank(other) < rank(module), (
            f"{module} imports {other}, which stands after it"
        )


@pytest.mark.medium
def test_no_file_is_needed_by_what_it_needs() -> None:
    """No import cycle anywhere, imports inside functions included. One exception: `Llava.from_pretrained`
    loads checkpoints, which are made of the class."""
    graph = {module: imports(PACKAGE / f"{module}.py") for module in MODULES}
    graph["model/llava"].remove("model/checkpoint")
    while graph:
        leaves = [module for module, needs in graph.items() if not needs & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


def test_benchmark_scripts_import_names_that_exist() -> None:
    """No other test runs most of these scripts, so a function that was moved would be noticed only months later."""
    trees = {}
    for folder in ("benchmarks", "tests"):
        for path in (PACKAGE.parent / folder).glob("*.py"):
            trees[path.stem] = (folder, ast.parse(path.read_text(encoding="utf-8")))
    for script, (folder, tree) in trees.items():
        if folder != "benchmarks":
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module not in trees:
                continue
            _, imported = trees[node.module]
            defined = {name for statement in imported.body for name in defined_names(statement)}
            for alias in node.names:
                assert alias.name in defined, f"{script}.py: {node.module} has no {alias.name}"


def defined_names(statement: ast.stmt) -> set[str]:
    """Return the names that a statement at the top level of a module defines or imports."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in statement.names}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
