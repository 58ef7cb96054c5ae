"""SkyPilot: a managed pipeline with a task per stage, one after another, recovered when preempted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from align.errors import ConfigError, Interrupted, Problem
from align.submit.command import PORT, job_script, keep_id, submit_script
from align.submit.engine import JobState, State, ask
from align.submit.submission import StageJob, Submission, slug
from align.submit.yaml_text import to_yaml

PIPELINE = "pipeline.yaml"
MEETING = (
    'export NODE_RANK="$SKYPILOT_NODE_RANK"',
    f"export MASTER_ADDR=\"${{SKYPILOT_NODE_IPS%%$'\\n'*}}\" MASTER_PORT={PORT}",
)

STATES = {
    **dict.fromkeys(("PENDING", "SUBMITTED", "STARTING", "RECOVERING"), State.WAITING),
    **dict.fromkeys(("RUNNING", "CANCELLING"), State.RUNNING),
    "SUCCEEDED": State.DONE,
}
"""Every other state is a failure."""


def render_skypilot(submission: Submission) -> dict[str, str]:
    """The pipeline: a document that names it, and one per task."""
    settings = submission.settings
    if settings.gpu_type is None and any(job.resources.gpus for job in submission.jobs):
        raise ConfigError(Problem("submit.gpu_type", "required for --to skypilot", "as `H100`; or `submit.gpus: 0`"))
    tasks = [_task(submission, job) for job in submission.jobs]
    launch = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", submission.name]
    launch += [option for name in settings.skypilot.secrets for option in ("--secret", name)]
    commands = [
        f"cd -- {shlex.quote(str(submission.here))}  # where workdir starts from",
        shlex.join([*launch, str(submission.folder / PIPELINE)]),
        'cd -- "$OLDPWD"',
        *keep_id(submission.stages, submission.name),
    ]
    return {PIPELINE: to_yaml({"name": submission.name}, *tasks), "submit.sh": submit_script(commands)}


def skypilot_states(submission: Submission, ids: Mapping[str, str]) -> dict[str, JobState]:
    """From the queue of managed jobs, which lists each task."""
    text = ask(["sky", "jobs", "queue", "--all", "--output", "json"])
    tasks = [task for task in json.loads(text or "[]") if task["job_name"] == submission.name]
    found = {task["task_id"]: task for task in tasks}
    return {stage: _state(found.get(submission.stages.index(stage))) for stage in ids}


def _state(task: Mapping[str, Any] | None) -> JobState:
    if task is None:
        return JobState(State.UNKNOWN)
    said = str(task["status"]).upper()
    return JobState(STATES.get(said, State.FAILED), said)


def _task(submission: Submission, job: StageJob) -> dict[str, Any]:
    settings, asked = submission.settings.skypilot, job.resources
    resources = {
        **settings.resources,
        "infra": settings.infra,
        "accelerators": {submission.settings.gpu_type: asked.gpus} if asked.gpus else None,
        "cpus": f"{asked.cpus}+" if asked.cpus else None,
        "memory": f"{asked.memory}+" if asked.memory else None,
        "use_spot": settings.spot,
        "image_id": settings.image,
        "job_recovery": {
            "max_restarts_on_errors": settings.retries,
            "recover_on_exit_codes": [Interrupted.exit_code],
        },
    }
    buckets = {path: {"source": url, "mode": "MOUNT_CACHED"} for path, url in settings.mounts.items()}
    task = {
        "name": slug(job.stage, 24),
        "resources": {name: value for name, value in resources.items() if value is not None},
        "num_nodes": asked.nodes,
        "workdir": settings.workdir,
        "secrets": dict.fromkeys(settings.secrets),
        "file_mounts": buckets,
        "volumes": settings.volumes,
        "run": job_script(submission, [job], directory=None, shares_files=False, meeting=MEETING),
    }
    return {name: value for name, value in task.items() if value not in (None, {})}
