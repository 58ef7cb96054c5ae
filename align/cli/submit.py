"""`align submit` and `align status`."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from shutil import which
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from align.cli.app import app
from align.cli.complete import complete_run_argument
from align.cli.run import AsJson, Config, Data, Model, RunName, Runs, read_recipe, run_folder, show_plan
from align.cli.table import relative
from align.errors import AlignError, ConfigError, Problem
from align.pipeline.plan import make_plan
from align.recipe.load import Recipe
from align.recipe.nearest import did_you_mean
from align.recipe.shipped import shipped_folder
from align.submit.status import stage_states
from align.submit.submission import (
    FOLDER,
    START,
    SUBMISSION,
    Submission,
    job_ids,
    make_submission,
    newest_submission,
    read_submission,
    write_files,
)
from align.submit.targets import TARGETS, TargetName

COLOURS = {"done": "green", "running": "cyan", "waiting": "yellow", "failed": "red", "interrupted": "magenta"}


class SubmitFailed(AlignError):
    """submit.sh ended badly; the engine said why on stderr."""


@app.command()
def submit(
    to: Annotated[TargetName, typer.Option(help="The engine that runs the jobs.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE... [KEY=VALUE ...]",
            help="As for `align run`: stages to end with, and settings to change (`submit.slurm.partition=gpu`).",
            autocompletion=complete_run_argument,
            show_default=False,
        ),
    ] = None,
    config: Config = None,
    name: RunName = None,
    runs: Runs = Path("runs"),
    model: Model = None,
    data: Data = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and show the files; submit nothing.")] = False,
) -> None:
    """Run stages on a cluster: write job files into the run's folder, show them, and submit them.

    A job per stage that is not up to date, each after those it consumes. What they ask of the machines is the recipe's
    `submit:`.
    """
    console = Console()
    recipe, requested = read_recipe(console, arguments, config, model, data)
    run_dir = run_folder(recipe, name, runs)
    plan = make_plan(recipe, requested, run_dir)
    show_plan(console, plan)
    there = (to is TargetName.SKYPILOT and recipe.settings.submit.skypilot.runs) or relative(runs.resolve())
    options = {"-c": _recipe_name(recipe), "--run": run_dir.name, "--runs": there, "--model": model, "--data": data}
    words = [word for option, value in options.items() if value is not None for word in (option, value)]
    submission = make_submission(plan, to, [*(arguments or []), *words], here=Path.cwd())
    files = TARGETS[to].render(submission)
    if not dry_run and which(TARGETS[to].command) is None:
        hint = f"submit from a machine that has it, or use --dry-run and `bash {START}` there"
        raise ConfigError(Problem(f"--to {to}", f"there is no `{TARGETS[to].command}` here", hint))
    write_files(submission, files)
    _show_files(console, submission, files)
    command = ["bash", relative(submission.folder / START)]
    console.print(f"[bold]to submit:[/] {escape(shlex.join(command))}", soft_wrap=True, highlight=False)
    if not dry_run:
        _submit(console, submission, command)


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]", help="Name or folder of a run. None: the last one submitted.", show_default=False
        ),
    ] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Say where the stages of the last `align submit` are, from the run's own folder and from the engine."""
    submission = read_submission(_find(run, runs))
    states = stage_states(submission)
    if as_json:
        facts = {"run": submission.run, "target": submission.target, "folder": str(submission.folder)}
        print(json.dumps({**facts, "stages": [asdict(state) for state in states]}, indent=2, ensure_ascii=False))
        return
    table = Table("stage", "state", "job", box=SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for one in states:
        colour = COLOURS.get(one.state, "dim")
        detail = relative(Path(one.detail)) if one.state == "done" else one.detail
        table.add_row(escape(one.stage), f"[{colour}]{one.state}[/]", escape(one.job or ""), escape(detail))
    console = Console()
    console.print(table)
    console.print(f"{submission.target}: {escape(relative(submission.folder))}", soft_wrap=True, highlight=False)


def _recipe_name(recipe: Recipe) -> str | None:
    """How a job names the recipe: one that is shipped by its name, for it lies elsewhere on another machine."""
    if recipe.path is None:
        return None
    path = recipe.path.resolve()
    return path.stem if path.parent == shipped_folder() else relative(path)


def _show_files(console: Console, submission: Submission, files: dict[str, str]) -> None:
    for name, text in files.items():
        console.rule(f"[bold]{escape(relative(submission.folder / name))}[/]", align="left")
        syntax = Syntax("", "yaml" if name.endswith(".yaml") else "bash", background_color="default")
        console.print(syntax.highlight(text), soft_wrap=True)


def _submit(console: Console, submission: Submission, command: list[str]) -> None:
    done = subprocess.run(command)
    ids = job_ids(submission.folder)
    for stage, identity in ids.items():
        console.print(f"submitted {escape(stage)}: {escape(identity)}", soft_wrap=True, highlight=False)
    if done.returncode:
        cancel = TARGETS[TargetName(submission.target)].cancel
        ends = " && ".join(cancel.format(id=one) for one in dict.fromkeys(ids.values()))
        hint = f"; to end what was submitted: {ends}" if ends else ""
        raise SubmitFailed(f"{shlex.join(command)} ended with exit code {done.returncode}{hint}")
    console.print("align status", escape(shlex.quote(submission.run)), highlight=False)


def _find(run: str | None, runs: Path) -> Path:
    """The newest submission of a run, or of all runs. Raises ConfigError naming the nearest run."""
    found = {path.parents[2].name: path.parents[2] for path in runs.glob(f"*/{FOLDER}/*/{SUBMISSION}")}
    if run is None:
        folders = [folder for run_dir in found.values() if (folder := newest_submission(run_dir))]
        newest = max(folders, key=lambda folder: folder.name, default=None)
    else:
        newest = newest_submission(Path(run)) or newest_submission(runs / run)
    if newest is None:
        raise ConfigError(Problem(run or "align status", f"no submission in {runs}/", did_you_mean(run or "", found)))
    return newest
