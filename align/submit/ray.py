"""Ray: one job that runs all stages. Ray's jobs cannot wait for each other, and `align run` keeps the order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from align.errors import ConfigError, Problem
from align.submit.command import job_script, keep_id, most, submit_script
from align.submit.engine import JobState, State, ask, same_for_all
from align.submit.submission import Submission

SCRIPT = "run.sh"
STATES = {
    "pending": State.WAITING,
    "running": State.RUNNING,
    "succeeded": State.DONE,
    "stopped": State.FAILED,
    "failed": State.FAILED,
}


def render_ray(submission: Submission) -> dict[str, str]:
    """The script of the job, and its submission with the most that any stage asks for."""
    script = str(submission.folder / SCRIPT)
    if re.search(r"[^\w/.@%+=:,-]", script, re.ASCII):
        what = "Ray's command line does not keep the spaces and special characters of this path"
        raise ConfigError(Problem(script, what, "use --run and --runs with a plain path"))
    asked, settings = most(submission.jobs), submission.settings.ray
    if asked.nodes > 1:
        raise ConfigError(Problem("submit.nodes", "a Ray job runs on one machine", "use --to slurm or kubernetes"))
    options = {
        "--address": settings.address,
        "--submission-id": submission.name,
        "--entrypoint-num-gpus": asked.gpus or None,
        "--entrypoint-num-cpus": asked.cpus,
        "--entrypoint-memory": asked.memory * 2**30 if asked.memory else None,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    commands = [
        shlex.join(["ray", "job", "submit", "--no-wait", *given, *settings.options, "--", "bash", script]),
        *keep_id(submission.stages, submission.name),
    ]
    body = job_script(submission, submission.jobs, directory=str(submission.here), shares_files=True)
    return {SCRIPT: body, "submit.sh": submit_script(commands)}


def ray_states(submission: Submission, ids: Mapping[str, str]) -> dict[str, JobState]:
    """From `ray job status`, which answers in a sentence."""
    address = submission.settings.ray.address
    options = [f"--address={address}"] if address else []
    text = ask(["ray", "job", "status", *options, submission.name]) or ""
    said = re.search(rf"'{submission.name}'(?: was)?:? ({'|'.join(STATES)})", text, re.IGNORECASE)
    return same_for_all(list(ids), JobState(STATES[said[1].lower()], said[1]) if said else JobState(State.UNKNOWN))
