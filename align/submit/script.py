"""A plain script that runs all stages in order on this machine, in the background."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from align.errors import ConfigError, Problem
from align.submit.command import job_script, keep_id, most, submit_script
from align.submit.engine import JobState, State, same_for_all
from align.submit.submission import Submission

SCRIPT = "run.sh"
LOG = "run.log"


def render_script(submission: Submission) -> dict[str, str]:
    """The script, and its start in the background."""
    if most(submission.jobs).nodes > 1:
        raise ConfigError(Problem("submit.nodes", "the script runs on this machine alone", "use --to slurm"))
    commands = [
        f"nohup setsid bash {SCRIPT} >> {LOG} 2>&1 < /dev/null &",
        *keep_id(submission.stages, '"$!"'),
    ]
    body = job_script(submission, submission.jobs, directory=str(submission.here), shares_files=True)
    return {SCRIPT: body, "submit.sh": submit_script(commands)}


def script_states(submission: Submission, ids: Mapping[str, str]) -> dict[str, JobState]:
    """Whether the process lives."""
    pid = int(next(iter(ids.values())))
    try:
        is_ours = psutil.Process(pid).cwd() == str(submission.here)  # the system gives old numbers to others
    except psutil.Error:
        is_ours = False
    state = JobState(State.RUNNING, f"process {pid}") if is_ours else JobState(State.UNKNOWN, f"process {pid} is gone")
    return same_for_all(list(ids), state)
