"""The recipes that come with align, and which recipe a command means when none is named."""

from __future__ import annotations

from pathlib import Path

from align.errors import ConfigError, Problem
from align.recipe.nearest import did_you_mean

DEMO = "demo"
HERE = "align.yaml"


def shipped_folder(name: str = "configs") -> Path:
    """A folder that comes with align, `configs` or `deepspeed`: beside the installed package, or in a source tree."""
    root = Path(__file__).resolve().parents[2]
    installed = root / "align_shipped" / name
    return installed if installed.is_dir() else root / name


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe. Raises ConfigError naming the nearest."""
    recipes = shipped_recipes()
    if name not in recipes:
        raise ConfigError(Problem(name, "no recipe of this name is shipped", did_you_mean(name, recipes)))
    return recipes[name]


def description(path: Path) -> str:
    """What a recipe says of itself: its first line, if that is a comment."""
    with path.open(encoding="utf-8") as stream:
        first = stream.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


def find_recipe(explicit: Path | None, *, model: str | None = None) -> tuple[Path | None, str]:
    """The recipe a command means, and how it was found, to be told to the user.

    The one named, by its path or as one that is shipped; else align.yaml in the current folder; else, when a model
    is given, none at all: every setting has its default; else the demo.
    """
    if explicit is not None:
        if not explicit.exists() and str(explicit) in shipped_recipes():
            return shipped_recipe(str(explicit)), "comes with align"
        return explicit, "named on the command line"
    here = Path(HERE)
    if here.is_file():
        return here, "in the current folder"
    if model is not None:
        return None, "no recipe: every setting has its default"
    return shipped_recipe(DEMO), f"the demo that comes with align: no recipe named and no {HERE} here"
