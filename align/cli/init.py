"""`align init`: copies a recipe that comes with align, and its data, to where it can be edited."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from align.cli.app import app
from align.errors import ConfigError, Problem, WriteError
from align.recipe.shipped import DEMO, HERE, description, shipped_recipe, shipped_recipes


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in shipped_recipes() if name.startswith(incomplete)]


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe.", autocompletion=_complete_recipe)] = DEMO,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    to: Annotated[Path, typer.Option(help="File to write, or a folder to write align.yaml in.")] = Path(HERE),
) -> None:
    """Copy a shipped recipe, with its data, into this folder as align.yaml."""
    console = Console(highlight=False)
    if list_:
        table = Table(box=None, show_header=False)
        for name, path in shipped_recipes().items():
            table.add_row(f"[bold]{name}[/]", description(path))
        console.print(table)
        return
    for path in copy_recipe(shipped_recipe(recipe), to / HERE if to.is_dir() else to):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    console.print("next: edit it, then `align plan` and `align run sft reward ppo`", markup=False)


def copy_recipe(source: Path, target: Path) -> list[Path]:
    """Copies a recipe file, and the folder of the same name beside it that holds its data. Overwrites
    nothing."""
    pairs = [(source, target)]
    if source.with_suffix("").is_dir():
        pairs.append((source.with_suffix(""), target.with_name(source.stem)))
    taken = [
        Problem(str(to), "already exists, and is not overwritten", "use --to PATH") for _, to in pairs if to.exists()
    ]
    if taken:
        raise ConfigError(taken)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, to in reversed(pairs):  # the recipe last: it is what says that the copy is whole
            if path.is_dir():
                shutil.copytree(path, to)
            else:
                shutil.copyfile(path, to)
    except OSError as error:
        raise WriteError(f"{error.filename or target}: cannot write: {error.strerror or error}") from error
    return [to for _, to in pairs]
