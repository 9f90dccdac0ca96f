"""The training recipes in `llava_simplified/configs/`: YAML files that `--config` accepts by name."""

from __future__ import annotations

from pathlib import Path

# Part of the package, so that `--config demo` works wherever the package is installed. `configs/` in
# the root of a checkout is a link to this folder.
RECIPES_FOLDER = Path(__file__).parent / "configs"


def resolve_recipe(name: str | Path) -> Path:
    """Return the YAML file that `--config` names.

    Args:
        name: The path of a file; or a packaged recipe, by its name (`demo`) or by the path that it
            has in a checkout (`configs/demo.yaml`). An existing file takes precedence.

    Raises:
        ValueError: There is no such file and no such recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".yaml"):
        recipe = RECIPES_FOLDER / f"{path.stem}.yaml"
        if recipe.is_file():
            return recipe
    names = ", ".join(sorted(recipe.stem for recipe in RECIPES_FOLDER.glob("*.yaml")))
    raise ValueError(
        f"--config {name}: no such file. Pass the path of a YAML file, or one of the recipes "
        f"that are part of the package: {names}."
    )
