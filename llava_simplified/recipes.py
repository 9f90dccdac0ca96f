"""The training recipes in `llava_simplified/configs/`: YAML files that `--config` accepts by name."""

from __future__ import annotations

from pathlib import Path

# The folder is part of the package, so that `--config demo` works with every installation. In a checkout,
# `configs/` in the root folder is a link to it.
RECIPES_FOLDER = Path(__file__).parent / "configs"


def resolve_recipe(name: str | Path) -> Path:
    """Return the YAML file for a value of `--config`.

    Args:
        name: The path of a YAML file; or a recipe of the package, by its name (`demo`) or by its path in a
            checkout (`configs/demo.yaml`). An existing file takes precedence over a recipe.

    Raises:
        ValueError: Neither a file nor a recipe with this name exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    # Accept `demo`, `demo.yaml` and `configs/demo.yaml`, but no other paths: a mistyped path should not
    # silently select a recipe.
    if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".yaml"):
        recipe = RECIPES_FOLDER / f"{path.stem}.yaml"
        if recipe.is_file():
            return recipe
    names = ", ".join(sorted(recipe.stem for recipe in RECIPES_FOLDER.glob("*.yaml")))
    raise ValueError(
        f"--config {name}: no such file. Pass the path of a YAML file, or one of the recipes "
        f"that are part of the package: {names}."
    )
