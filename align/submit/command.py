"""The one place where the command of a job is made, and the shell script around it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from align.recipe.submit_settings import Resources
from align.submit.submission import JOBS, StageJob, Submission

if TYPE_CHECKING:
    from jinja2 import Environment

PORT = 29500
"""Where processes of several machines meet, unless the engine has a better choice."""


def align_command(submission: Submission, jobs: Sequence[StageJob], resources: Resources, python: str) -> str:
    """The command of a job, as shell. On several machines it reads NODE_RANK, MASTER_ADDR and MASTER_PORT."""
    only = ["--only", jobs[0].stage] if len(jobs) < len(submission.jobs) else []
    processes = resources.nodes * resources.processes
    launch = [
        f"{job.stage}.launch.{name}={value}"
        for job in jobs
        if processes > 1 and job.strategy
        for name, value in (("processes", processes), ("strategy", job.strategy))
    ]
    command = shlex.join([python, "-m", "align", "run", *submission.arguments, *launch, *only])
    if resources.nodes == 1:
        return command
    return f'{command} nodes.count={resources.nodes} nodes.rank="$NODE_RANK" nodes.address="$MASTER_ADDR" ' + (
        'nodes.port="$MASTER_PORT"'
    )


def job_script(
    submission: Submission,
    jobs: Sequence[StageJob],
    *,
    directory: str | None,
    shares_files: bool,
    meeting: Sequence[str] = (),
) -> str:
    """The script that one machine runs for some stages. `directory` is where it runs (None: where it is started),
    `meeting` the lines that set NODE_RANK, MASTER_ADDR and MASTER_PORT where there are several machines."""
    settings = submission.settings
    resources = most(jobs)
    python = settings.python or (sys.executable if shares_files else "python")
    return render(
        "job.sh",
        directory=directory,
        settings=settings,
        meeting=meeting if resources.nodes > 1 else (),
        command=align_command(submission, jobs, resources, python),
    )


def most(jobs: Sequence[StageJob]) -> Resources:
    """The most of everything that some stages ask for: what a job gets that runs them all."""
    asked = [job.resources for job in jobs]
    return Resources(
        nodes=max(one.nodes for one in asked),
        gpus=max(one.gpus for one in asked),
        processes=max(one.processes for one in asked),
        cpus=max((one.cpus for one in asked if one.cpus), default=None),
        memory=max((one.memory for one in asked if one.memory), default=None),
        hours=max((one.hours for one in asked if one.hours), default=None),
    )


def keep_id(stages: Sequence[str], identity: str) -> list[str]:
    """The lines of submit.sh that keep the id of the job of some stages. `identity` is shell."""
    return [f"echo {shlex.quote(stage)} {identity} >> {JOBS}" for stage in stages]


def submit_script(commands: Sequence[str]) -> str:
    """submit.sh: runs once, starts all jobs, and keeps their ids beside it."""
    return render("submit.sh", commands=commands, jobs=JOBS)


def render(template: str, **values: Any) -> str:
    """A template of this package. What is substituted goes through `sh`, which quotes, or was made to be shell."""
    return _environment().get_template(f"{template}.j2").render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("align.submit"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment
