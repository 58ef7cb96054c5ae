"""What a run will do and why: each stage is run, reused, resumed, or stale. Writes only the hash cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align.errors import ArtifactError, ConfigError, Problem
from align.job import Job
from align.pipeline.data import Report, Reports, check_data, described
from align.pipeline.external import HashCache
from align.pipeline.fingerprint import Contents, make_jobs
from align.pipeline.folders import JOB, content, newest_checkpoint, newest_record, read_record
from align.pipeline.graph import Node, build_graph
from align.pipeline.launch import check_launches
from align.pipeline.reasons import changes
from align.recipe.load import Recipe
from align.recipe.nearest import did_you_mean
from align.recipe.spec import named
from align.records import MANIFEST, read_manifest


class Action(StrEnum):
    """What happens to a stage."""

    RUN = "run"
    REUSE = "reuse"
    RESUME = "resume"
    STALE = "stale"
    """Runs again because something it depends on changed; results made before stay where they are."""


@dataclass(frozen=True)
class Step:
    """One stage of a plan."""

    node: Node
    job: Job
    action: Action
    reasons: list[str]

    @property
    def runs(self) -> bool:
        """Whether a process will be started."""
        return self.action is not Action.REUSE

    @property
    def models(self) -> list[str]:
        """Which models are in memory while it runs, one line each; none for a stage that does not say."""
        describe = self.node.spec.memory
        return named(describe)(self.node.config, self.job.inputs) if describe else []

    def consumes(self, other: Step) -> bool:
        """Whether an input of this stage is the other's artifact."""
        return other.job.stage in self.node.needs


@dataclass(frozen=True)
class Plan:
    """The stages of a run in order."""

    recipe: Recipe
    run_dir: Path
    steps: list[Step]

    def as_json(self) -> dict[str, Any]:
        """The plan as plain JSON, for `align plan --json`."""
        stages = [
            {
                "stage": step.job.stage,
                "kind": step.job.kind,
                "action": str(step.action),
                "reasons": step.reasons,
                "fingerprint": step.job.fingerprint,
                "directory": step.job.directory,
                "inputs": {
                    slot: {"source": value.source, "path": value.path, "fingerprint": value.fingerprint}
                    for slot, value in step.job.inputs.items()
                },
                "models": step.models,
                "data": step.job.data_reports,
            }
            for step in self.steps
        ]
        recipe = str(self.recipe.path) if self.recipe.path else None
        return {"run": self.run_dir.name, "recipe": recipe, "directory": str(self.run_dir), "stages": stages}


def make_plan(
    recipe: Recipe,
    requested: Sequence[str],
    run_dir: Path,
    force: Collection[str] = (),
    *,
    only: str | None = None,
    verify: bool = False,
) -> Plan:
    """Decides what each stage needs. No `requested` means every stage of the recipe; `only` runs this one of them, and
    those before it must be up to date.

    `verify` reads every byte of what a running stage will consume; without it sizes are compared. Raises
    ConfigError, DataError or ArtifactError before anything is started.
    """
    nodes = build_graph(recipe, requested)
    _check_names("--force", force, nodes)
    _check_names("--only", [only] if only else [], nodes)
    _check_trackers(recipe.settings.track)
    _check_quantisation(nodes)
    check_launches(nodes, recipe)
    cache = HashCache(run_dir.parent)
    evaluation = recipe.settings.evaluation.data
    contents = Contents(nodes, evaluation)
    jobs = make_jobs(recipe.settings, nodes, run_dir, cache, contents)
    steps = [decide(node, job, forced=job.stage in force) for node, job in zip(nodes, jobs, strict=True)]
    wanted = {only} if only else {*(requested or [node.name for node in nodes]), *force}
    steps = _settle(steps, wanted, verify)
    if only:
        _check_inputs(only, steps)
    reports = check_data([step.node for step in steps if step.runs], Reports(run_dir.parent, contents, evaluation))
    reports = described(reports, recipe, nodes, cache)
    cache.save()
    return Plan(recipe, run_dir, [_with_reports(step, reports.get(step.job.stage, {})) for step in steps])


def _with_reports(step: Step, reports: dict[str, Report]) -> Step:
    return replace(step, job=replace(step.job, data_reports=reports))


def decide(node: Node, job: Job, *, forced: bool = False, verify: bool = False) -> Step:
    """What one stage needs, from what lies in its folder."""
    directory = Path(job.directory)
    record = read_record(directory)
    if forced:
        return Step(node, job, Action.RUN, ["forced"])
    if record is not None and record["fingerprint"] == job.fingerprint:
        try:
            read_manifest(directory / "model", hashes=verify)
        except ArtifactError as error:
            return Step(node, job, Action.RUN, [f"damaged: {error}"])
        remade = _remade_inputs(job, record)
        return Step(node, job, Action.STALE, remade) if remade else Step(node, job, Action.REUSE, ["up to date"])
    if (directory / JOB).exists():
        step = newest_checkpoint(directory)
        if step is None:
            return Step(node, job, Action.RUN, ["interrupted before its first checkpoint: starts again"])
        return Step(node, job, Action.RESUME, [f"interrupted at step {step}: resumes from checkpoint"])
    previous = newest_record(directory.parent)
    if previous is None:
        return Step(node, job, Action.RUN, ["not run before"])
    sources = {slot: value.source for slot, value in job.inputs.items()}
    return Step(node, job, Action.STALE, changes(previous["identity"], job.identity, sources))


def _remade_inputs(job: Job, record: dict[str, Any]) -> list[str]:
    """Inputs with the fingerprint this result was made from but other bytes, since they were made again."""
    remade = []
    for slot, value in job.inputs.items():
        then, now = record["inputs"][slot]["content"], content(Path(value.path))
        if then and now and then != now:
            remade.append(f"input {slot} ({value.source}): made again with another result ({then[:8]} -> {now[:8]})")
    return remade


def _settle(steps: Sequence[Step], wanted: Collection[str], verify: bool) -> list[Step]:
    """From the last stage back: verifies what running stages consume, and leaves out what nobody needs."""
    settled: list[Step] = []
    for step in reversed(steps):
        users = [other for other in settled if other.runs and other.consumes(step)]
        if not step.runs and users and verify:
            step = decide(step.node, step.job, verify=True)
        if step.runs and not users and step.job.stage not in wanted:
            continue  # everything that would consume it is up to date
        if step.runs and verify:
            _verify_external(step)
        settled.insert(0, step)
    return [_with_caveat(step, settled) for step in settled]


def _with_caveat(step: Step, steps: Sequence[Step]) -> Step:
    remade = [other.job.stage for other in steps if other.runs and step.consumes(other)]
    if step.runs or not remade:
        return step
    return replace(step, reasons=[f"up to date, if {' and '.join(remade)} comes out the same"])


def _verify_external(step: Step) -> None:
    """Raises ArtifactError if a folder that align made in another run was damaged since."""
    for slot, source in step.node.inputs.items():
        folder = Path(step.job.inputs[slot].path)
        if source.model is not None and (folder / MANIFEST).exists():
            read_manifest(folder, hashes=True)


def _check_trackers(names: Sequence[str]) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError([Problem("track", f"{name} is not installed", f"pip install {name}") for name in missing])


def _check_quantisation(nodes: Sequence[Node]) -> None:
    wanted = {
        f"{node.name}.{key}": what
        for node in nodes
        for key, what in {
            "lora.quantise": _value(node.config, "lora.quantise"),
            "optim.kind": _value(node.config, "optim.kind"),
            "critic.optim.kind": _value(node.config, "critic.optim.kind"),
        }.items()
        if what not in {None, "adamw"}
    }
    if wanted and find_spec("bitsandbytes") is None:
        hint = "pip install 'align-rlhf[quant]'"
        raise ConfigError([Problem(key, f"{what} needs bitsandbytes", hint) for key, what in wanted.items()])


def _value(config: Any, key: str) -> Any:
    """A setting by its dotted key; None where a stage has none."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def _check_names(option: str, given: Collection[str], nodes: Sequence[Node]) -> None:
    names = [node.name for node in nodes]
    unknown = [name for name in given if name not in names]
    if unknown:
        what = "no such stage in this run"
        raise ConfigError([Problem(f"{option} {name}", what, did_you_mean(name, names)) for name in unknown])


def _check_inputs(only: str, steps: Sequence[Step]) -> None:
    waiting = [
        f"{step.job.stage} ({', '.join(step.reasons)})" for step in steps if step.runs and step.job.stage != only
    ]
    if waiting:
        raise ArtifactError(f"--only {only}: what it consumes is not up to date: {'; '.join(waiting)}")
