"""Data flows one way: a package imports only from packages that precede it in ORDER, also inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llava_simplified"
# `evaluation` comes late in the order. But the scores of texts need no model, and training reports them, so these
# modules come earlier.
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
# The HTTP client of `captioning`. Training uses it too, to request rewards from a server.
CLIENT_OF_SERVERS = ["captioning/endpoint_client", "captioning/endpoint_options"]
# Each line may import from the lines above it. A name is a package (folder) or a single file. The files of one package
# may import each other, but two names on one line may not. `prepare` writes the files that `data` reads, so it uses the
# formats and the decoder of `data`.
ORDER = [
    ("options", "extras", "foreign_files", "process_memory"),
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
    """Return the line of ORDER that contains a module, such as "data/images" or "prompt".

    If ORDER contains both the module and its package, the line of the module is returned.
    """
    found = [
        (len(name), line)
        for line, names in enumerate(ORDER)
        for name in names
        if f"{module}/".startswith(name + "/")
    ]
    assert found, f"{module} is not in ORDER: add it"
    _, line_of_longest_name = max(found)
    return line_of_longest_name


def imports(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava_simplified."):
            inner = (node.module or "").removeprefix("llava_simplified.").replace(".", "/")
            is_package = (PACKAGE / inner).is_dir()
            found |= {f"{inner}/{alias.name}" for alias in node.names} if is_package else {inner}
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("llava_simplified.").replace(".", "/")
                for a in node.names
                if a.name.startswith("llava_simplified.")
            }
    return found


def top_level(module: str) -> str:
    """Return the package of a module, or the name of a module that is in no package."""
    return module.partition("/")[0]


MODULES = sorted(
    str(p.relative_to(PACKAGE).with_suffix(""))
    for p in PACKAGE.rglob("*.py")
    if p.name != "__init__.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_precedes_them_in_the_order(module: str) -> None:
    for other in imports(PACKAGE / f"{module}.py"):
        is_same_package = "/" in module and top_level(other) == top_level(module)
        assert is_same_package or rank(other) < rank(module), (
            f"{module} imports {other}, which does not precede it in ORDER"
        )


@pytest.mark.medium
def test_there_is_no_import_cycle() -> None:
    """Imports inside functions count too, with one exception.

    `Llava.from_pretrained` imports the module that loads checkpoints, which imports `Llava`.
    """
    graph = {module: imports(PACKAGE / f"{module}.py") for module in MODULES}
    graph["model/llava"].remove("model/checkpoint")
    while graph:
        leaves = [module for module, imported in graph.items() if not imported & graph.keys()]
        assert leaves, f"an import cycle among {sorted(graph)}"
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
