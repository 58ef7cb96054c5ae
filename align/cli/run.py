"""`align run`, `align plan` and `align lineage`."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from align.cli.app import app
from align.cli.complete import complete_run_argument
from align.cli.memory import memory_json, render_memory
from align.cli.table import relative, render_plan, render_summary
from align.errors import ArtifactError, ConfigError, Problem
from align.pipeline.estimate.gpus import parse_gpus
from align.pipeline.estimate.stage import know_stages
from align.pipeline.launch import stage_launch
from align.pipeline.lineage import Ancestor, trace
from align.pipeline.lock import lock_run
from align.pipeline.plan import Plan, Step, make_plan
from align.pipeline.runner import execute
from align.recipe.load import Recipe, load_recipe
from align.recipe.shipped import find_recipe
from stages import load_specs

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="STAGE... [KEY=VALUE ...]",
        help="Stages to end with (none: all of the recipe), and settings to change (`ppo.kl.coef=0.1`).",
        autocompletion=complete_run_argument,
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="The recipe. None: align.yaml here, else the embedded demo.",
        show_default=False,
    ),
]
RunName = Annotated[
    str | None,
    typer.Option("--run", help="Name of the run's folder. None: the recipe's name.", show_default=False),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds all runs.")]
Force = Annotated[
    list[str] | None,
    typer.Option(metavar="STAGE", help="Run this stage again even if it is up to date.", show_default=False),
]
Model = Annotated[
    str | None, typer.Option(help="Model to start from: a folder or `hub/id@revision`.", show_default=False)
]
Data = Annotated[str | None, typer.Option(help="Data file of stages that name none.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    arguments: Arguments = None,
    config: Config = None,
    name: RunName = None,
    runs: Runs = Path("runs"),
    force: Force = None,
    model: Model = None,
    data: Data = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Run no stage but this one; those before it must be up to date. Commands for different stages may run "
            "side by side.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the commands; start nothing.")] = False,
) -> None:
    """Run stages and the stages they need; what is up to date is reused."""
    console = Console()
    recipe, requested = read_recipe(console, arguments, config, model, data)
    run_dir = run_folder(recipe, name, runs)
    if dry_run:
        plan = make_plan(recipe, requested, run_dir, force or (), only=only)
        show_plan(console, plan)
        for step in plan.steps:
            if step.runs:
                launch = stage_launch(step.node, recipe)
                console.print(shlex.join(launch.command(Path(step.job.directory))), markup=False, soft_wrap=True)
        return
    with lock_run(run_dir, only) if recipe.settings.nodes.rank == 0 else nullcontext() as lock:
        plan = make_plan(recipe, requested, run_dir, force or (), only=only, verify=True)
        show_plan(console, plan)
        summary = execute(
            plan,
            lock,
            command=sys.argv,
            announce=lambda step: _announce(console, plan, step),
        )
    if summary:
        _show_results(console, plan, summary)


@app.command()
def plan(
    arguments: Arguments = None,
    config: Config = None,
    name: RunName = None,
    runs: Runs = Path("runs"),
    force: Force = None,
    model: Model = None,
    data: Data = None,
    as_json: AsJson = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate memory, disk, steps and tokens of each stage that runs.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="[N x]SIZE", help="The same on GPUs such as `8x24GiB`: which strategies would fit."),
    ] = None,
) -> None:
    """Say what `align run` with the same arguments would do, and why. Starts nothing."""
    device = parse_gpus(gpu) if gpu is not None else None
    console = Console(stderr=as_json)
    recipe, requested = read_recipe(console, arguments, config, model, data)
    made = make_plan(recipe, requested, run_folder(recipe, name, runs), force or ())
    found = know_stages(made) if memory or device else {}
    if as_json:
        estimates = {"memory": memory_json(found, device)} if found else {}
        print(json.dumps({**made.as_json(), **estimates}, indent=2, ensure_ascii=False))
        return
    show_plan(console, made)
    if found:
        console.print(render_memory(found, device))


@app.command()
def lineage(
    path: Annotated[Path, typer.Argument(help="A stage's folder, its model/, or a run's folder.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print what a result was made from, and verify every file (sha256). Exits with 4 if one is damaged."""
    ancestors = trace(path)
    if as_json:
        print(json.dumps([ancestor.as_json() for ancestor in ancestors], indent=2, ensure_ascii=False))
    else:
        console = Console()
        for ancestor in ancestors:
            console.print(_tree(ancestor))
    damage = {one.damage for ancestor in ancestors for one in ancestor.walk() if one.damage}
    if damage:
        raise ArtifactError("\n".join(sorted(damage)))


def read_recipe(
    console: Console, arguments: list[str] | None, config: Path | None, model: str | None, data: str | None
) -> tuple[Recipe, list[str]]:
    """The recipe with the command line applied, and the stages asked for."""
    requested = [argument for argument in arguments or [] if "=" not in argument]
    overrides = [argument for argument in arguments or [] if "=" in argument]
    path, how = find_recipe(config, model=model)
    if config is None:
        console.print(f"recipe: {relative(path)} ({how})" if path else how, style="dim", markup=False, soft_wrap=True)
    specs = load_specs()
    recipe = load_recipe(path, overrides=overrides, requested=requested, specs=specs, model=model, data=data)
    return recipe, requested


def run_folder(recipe: Recipe, name: str | None, runs: Path) -> Path:
    """The folder of a run. Raises ConfigError for a name that is none."""
    name = recipe.settings.name if name is None else name
    if name in {"", ".", ".."} or Path(name).name != name or name.startswith("."):
        raise ConfigError(Problem("--run", f"{name!r} is not a folder name", "use letters, digits, - and _"))
    return runs.resolve() / name


def show_plan(console: Console, plan: Plan) -> None:
    """Prints the table of a plan."""
    console.print(render_plan(plan.steps))


def _announce(console: Console, plan: Plan, step: Step) -> None:
    place = [planned.job.stage for planned in plan.steps].index(step.job.stage) + 1
    title = f"{place}/{len(plan.steps)} {step.job.stage}: {step.action}"
    if step.runs:
        console.rule(f"[bold]{escape(title)}[/]", align="left")
    else:
        console.print(escape(title), style="dim")


def _show_results(console: Console, plan: Plan, summary: dict[str, Any]) -> None:
    console.print(render_summary(summary))
    last = Path(plan.steps[-1].job.directory)
    console.print(f"model:   {escape(relative(last / 'model'))}", soft_wrap=True, highlight=False)
    console.print(f"history: align lineage {escape(relative(last))}", soft_wrap=True, highlight=False)


def _tree(ancestor: Ancestor, tree: Tree | None = None) -> Tree:
    """The ancestry as a rich tree, the result itself at the top."""
    branch = Tree(_label(ancestor)) if tree is None else tree.add(_label(ancestor))
    for parent in ancestor.inputs:
        _tree(parent, branch)
    return branch


def _label(ancestor: Ancestor) -> str:
    slot = f"[dim]{escape(ancestor.slot)}:[/] " if ancestor.slot else ""
    name = f"{slot}[bold]{escape(ancestor.source)}[/]"
    record = ancestor.record
    if record is None:
        return f"{name} [dim]{escape(ancestor.path)} {ancestor.fingerprint[:8]}, not made by this recipe[/]"
    facts = [ancestor.fingerprint[:8], f"seed {record['seed']}"]
    if record["data"]:
        facts.append(f"data {record['data'][:8]}")
    numbers = [f"{key} {value:.3g}" for key, value in record["metrics"].items() if isinstance(value, int | float)]
    facts += [*numbers[:4], f"{record['seconds']:.0f} s", record["ended"][:16].replace("T", " ") + " UTC"]
    state = "[red]DAMAGED[/]" if ancestor.damage else f"[green]{len(record['files'])} files verified[/]"
    return f"{name}  {escape(', '.join(facts))}  {state}"
