"""What is submitted: the stages that would run, what each waits for, and the folder of the files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.errors import ArtifactError, ConfigError, Problem
from align.pipeline.plan import Plan
from align.recipe.nearest import did_you_mean
from align.recipe.submit_settings import Resources, SubmitSettings
from align.records import write_json, write_text

FOLDER = "submit"
"""Folder of a run that holds its submissions; `submit` is a setting of the recipe, so no stage has this name."""

SUBMISSION = "submission.json"
JOBS = "jobs.txt"
"""Written by submit.sh, a line `stage id` per submitted job."""

START = "submit.sh"


@dataclass(frozen=True)
class StageJob:
    """One stage to be run."""

    stage: str
    after: list[str]
    """Stages of the submission that must be done before, those left out that another of them waits for."""
    directory: str
    """Its folder, absolute."""
    resources: Resources
    strategy: str | None = None
    """How several processes share its work (align.recipe.settings.LaunchSettings); None: it trains in one, or the
    recipe says how many there are."""


@dataclass(frozen=True)
class Submission:
    """All that a target needs in order to render its files, and later to find its jobs."""

    target: str
    name: str
    """Name for the engine: the run's and the time. A pod's name, made of it, has at most 63 characters."""
    run: str
    folder: Path
    here: Path
    """The current folder: the command's paths start from it."""
    arguments: list[str]
    """What stands after `align run`: stages, recipe, run, overrides."""
    jobs: list[StageJob]
    """After those that they wait for."""
    settings: SubmitSettings = field(repr=False)

    @property
    def stages(self) -> list[str]:
        """Their names."""
        return [job.stage for job in self.jobs]


def make_submission(
    plan: Plan, target: str, arguments: Sequence[str], *, here: Path, now: datetime | None = None
) -> Submission:
    """What `align run` with the same plan would run, as jobs. Raises ConfigError when that is nothing."""
    settings = plan.recipe.settings.submit
    _check_stages(settings, list(plan.recipe.stages))
    needs = {step.job.stage: list(dict.fromkeys(step.node.needs)) for step in plan.steps if step.runs}
    if not needs:
        raise ConfigError(Problem("align submit", "every stage is up to date: there is nothing to submit"))
    after = reduced({stage: [need for need in wanted if need in needs] for stage, wanted in needs.items()})
    moment = f"{now or datetime.now(UTC):%Y%m%d-%H%M%S}"
    return Submission(
        target=target,
        name=f"{slug(plan.run_dir.name, 20)}-{moment}",
        run=plan.run_dir.name,
        folder=plan.run_dir / FOLDER / f"{moment}-{target}",
        here=here,
        arguments=list(arguments),
        jobs=[
            StageJob(
                step.job.stage,
                after[step.job.stage],
                step.job.directory,
                settings.of(step.job.stage),
                _strategy(step.job.launch),
            )
            for step in plan.steps
            if step.runs
        ],
        settings=settings,
    )


def reduced(needs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The graph without edges that a longer path implies: who waits for ppo need not wait for its sft. `needs` lists
    each stage after its inputs."""
    above: dict[str, set[str]] = {}
    for stage, wanted in needs.items():
        above[stage] = set(wanted).union(*(above[need] for need in wanted))
    return {
        stage: [need for need in wanted if not any(need in above[other] for other in wanted)]
        for stage, wanted in needs.items()
    }


def slug(text: str, longest: int) -> str:
    """The text as a name that every engine takes: lower case ASCII letters, digits and single `-`, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"align-{name}")[:longest].strip("-")


def write_files(submission: Submission, files: Mapping[str, str]) -> None:
    """Writes the files into the submission's new folder. Raises ConfigError if there is one already."""
    try:
        submission.folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            Problem(str(submission.folder), "something was submitted in this very second", "run the command again")
        ) from None
    for name, text in files.items():
        write_text(submission.folder / name, text)
    kept = {
        "target": submission.target,
        "name": submission.name,
        "run": submission.run,
        "here": str(submission.here),
        "arguments": submission.arguments,
        "jobs": [asdict(job) for job in submission.jobs],
        "settings": submission.settings.model_dump(mode="json"),
    }
    write_json(submission.folder / SUBMISSION, kept)


def _strategy(launch: Mapping[str, Any] | None) -> str | None:
    """Of the processes that a job starts. An accelerate config of the user's own says by itself how many there are."""
    return None if launch is None or launch["config"] else launch["strategy"]


def read_submission(folder: Path) -> Submission:
    """What `write_files` wrote. Raises ArtifactError."""
    try:
        kept: dict[str, Any] = json.loads((folder / SUBMISSION).read_text(encoding="utf-8"))
        jobs = [StageJob(**{**job, "resources": Resources(**job["resources"])}) for job in kept.pop("jobs")]
        settings = SubmitSettings.model_validate(kept.pop("settings"))
        return Submission(**{**kept, "here": Path(kept["here"])}, folder=folder, jobs=jobs, settings=settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / SUBMISSION}: not a readable submission: {error}") from error


def job_ids(folder: Path) -> dict[str, str]:
    """The engine's id of each stage's job; empty when nothing was submitted."""
    path = folder / JOBS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(line.split(" ", 1) for line in lines)


def newest_submission(run_dir: Path) -> Path | None:
    """Folder of the last submission of a run; None without one."""
    return max((path.parent for path in run_dir.glob(f"{FOLDER}/*/{SUBMISSION}")), default=None)


def _check_stages(settings: SubmitSettings, names: Sequence[str]) -> None:
    unknown = [name for name in settings.stages if name not in names]
    if unknown:
        what = "no such stage in the recipe"
        raise ConfigError([Problem(f"submit.stages.{name}", what, did_you_mean(name, names)) for name in unknown])
