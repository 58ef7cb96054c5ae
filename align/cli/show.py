"""`align show`: the documentation of a stage's settings, and the results of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from align.cli.app import app
from align.errors import ArtifactError, ConfigError, Problem

if TYPE_CHECKING:
    from align.recipe.settings import Settings

RECIPE = "recipe"


def _complete_what(incomplete: str) -> list[str]:
    from stages import KINDS

    return [name for name in (*KINDS, RECIPE, *_finished(Path("runs"))) if name.startswith(incomplete)]


@app.command()
def show(
    what: Annotated[
        str | None,
        typer.Argument(help="A stage kind, `recipe`, or a run's name or folder.", autocompletion=_complete_what),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Show the stages, the settings of one with their documentation, or the results of a run."""
    from align.recipe.recipe_settings import RecipeSettings
    from stages import load_specs

    specs = load_specs()
    console = Console(highlight=False)
    models = {RECIPE: RecipeSettings, **{kind: spec.config for kind, spec in specs.items()}}
    if what is None:
        summaries = {kind: spec.summary for kind, spec in specs.items()}
        _show_kinds(console, {**summaries, RECIPE: "the recipe's own settings"}, as_json)
    elif what in models:
        if as_json:
            print(json.dumps(models[what].model_json_schema(), indent=2))
        else:
            _show_settings(console, models[what], "" if what == RECIPE else f"{what}.")
    else:
        summary = _summary(what, runs, list(models))
        if as_json:
            print(json.dumps(summary, indent=2, ensure_ascii=False))
        else:
            from align.cli.table import render_summary

            console.print(render_summary(summary))


def _show_kinds(console: Console, summaries: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summaries, indent=2))
        return
    table = Table(box=None, show_header=False)
    for kind, summary in summaries.items():
        table.add_row(f"[bold]{kind}[/]", summary)
    console.print(table)
    console.print("\n`align show STAGE` documents its settings.", markup=False)


def _show_settings(console: Console, model: type[Settings], prefix: str) -> None:
    """One block per key: key, type and default on a line, the documentation below it."""
    from rich.markup import escape
    from rich.padding import Padding

    from align.cli.describe import default_text, type_text
    from align.recipe.schema import nested_in, walk
    from align.recipe.settings import is_marked

    console.print(escape(_one_line(model.__doc__)), style="italic")
    for setting in walk(model):
        inner = nested_in(setting.field)
        kind = type_text(setting.field.annotation, tuple(setting.field.metadata))
        if inner:
            kind = "settings by name" if inner.by_name else "settings"
        default = default_text(setting.default, bool(inner))
        line = f"\n[bold]{prefix}{setting.key}[/]  [cyan]{escape(kind)}[/]"
        line += f"  = {escape(default)}" if default else ""
        console.print(line + ("  [dim]cannot change the result[/]" if is_marked(setting.field, "execution") else ""))
        console.print(Padding(escape(_one_line(setting.field.description)), (0, 0, 0, 4)))


def _one_line(text: str | None) -> str:
    """A docstring without its line breaks, for the terminal to fold."""
    return " ".join((text or "").split())


def _summary(what: str, runs: Path, names: list[str]) -> dict[str, Any]:
    """The summary of a run given by folder or by name. Raises ConfigError naming the nearest."""
    from align.pipeline.summary import SUMMARY
    from align.recipe.nearest import did_you_mean

    folders = [folder for folder in (Path(what), runs / what) if folder.is_dir()]
    folder = next((folder for folder in folders if (folder / SUMMARY).exists()), None) or next(iter(folders), None)
    if folder is None:
        hint = did_you_mean(what, [*names, *_finished(runs)])
        raise ConfigError(Problem(what, f"neither a stage kind nor a run in {runs}/", hint))
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no stage of this run is finished: there is no {SUMMARY}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / SUMMARY}: cannot be read: {error}") from None


def _finished(runs: Path) -> list[str]:
    return [path.parent.name for path in runs.glob("*/summary.json")]
