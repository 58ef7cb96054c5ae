"""Where each stage of a submission is: what its own folder says, and what the engine says of its job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align.errors import Interrupted
from align.pipeline.folders import JOB, read_failure, read_failure_message, read_record
from align.submit.engine import JobState, State
from align.submit.submission import StageJob, Submission, job_ids
from align.submit.targets import TARGETS, TargetName

INTERRUPTED = "interrupted"
NOT_SUBMITTED = "not submitted"


@dataclass(frozen=True)
class StageState:
    """One line of `align status`."""

    stage: str
    state: str
    """done, running, waiting, failed, interrupted, unknown or not submitted."""
    job: str | None
    """The engine's id."""
    detail: str


def stage_states(submission: Submission) -> list[StageState]:
    """Every stage of the submission, in order. The engine is asked only if a stage is not done yet."""
    ids = job_ids(submission.folder)
    done = {job.stage for job in submission.jobs if read_record(Path(job.directory)) is not None}
    asks = bool(ids) and len(done) < len(submission.jobs)
    said = TARGETS[TargetName(submission.target)].states(submission, ids) if asks else {}
    states = []
    for job in submission.jobs:
        identity = ids.get(job.stage)
        if job.stage in done:
            state, detail = str(State.DONE), job.directory
        elif identity is None:
            state, detail = NOT_SUBMITTED, ""
        else:
            state, detail = _unfinished(job, said.get(job.stage, JobState(State.UNKNOWN)))
        states.append(StageState(job.stage, state, identity, detail))
    return states


def _unfinished(job: StageJob, said: JobState) -> tuple[str, str]:
    """State and detail of a stage without a record."""
    folder = Path(job.directory)
    is_started = (folder / JOB).exists()
    if said.state is State.RUNNING and not is_started:
        return State.WAITING, said.detail  # for the stages before it in the same job, or for its process to start
    if said.state not in (State.FAILED, State.UNKNOWN):
        return said.state, said.detail
    code = read_failure(folder)
    if code is not None:
        state = INTERRUPTED if code == Interrupted.exit_code else State.FAILED
        return state, f"exit code {code}: {read_failure_message(folder)}"
    if said.state is State.UNKNOWN and is_started:
        return INTERRUPTED, said.detail
    return said.state, said.detail
