"""Slurm: a job per stage, `afterok` of those it consumes, requeued when it saved and stopped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from align.errors import Interrupted
from align.submit.command import job_script, keep_id, render, submit_script
from align.submit.engine import JobState, State, ask
from align.submit.submission import StageJob, Submission, slug

MEETING = ('export NODE_RANK="$SLURM_NODEID"',)
"""The other variables are made once, in the batch script: a container has no scontrol."""

SQUEUE = ["squeue", "--me", "--states=all", "--noheader", "--format=%i|%T|%r"]
SACCT = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State,ExitCode"]

STATES = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "PREEMPTED"), State.WAITING),
    **dict.fromkeys(("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING"), State.RUNNING),
    "COMPLETED": State.DONE,
}
"""Every other state is a failure."""


def render_slurm(submission: Submission) -> dict[str, str]:
    """Two scripts per stage: what Slurm gets, and what each machine runs."""
    files = {}
    for job in submission.jobs:
        files[f"{job.stage}.sbatch"] = _batch_script(submission, job)
        files[f"{job.stage}.sh"] = job_script(
            submission,
            [job],
            directory=str(submission.here),
            shares_files=not submission.settings.slurm.image,
            meeting=MEETING,
        )
    return {**files, "submit.sh": submit_script(_commands(submission))}


def slurm_states(submission: Submission, ids: Mapping[str, str]) -> dict[str, JobState]:
    """From squeue, which knows what is alive, and sacct, which knows what was."""
    found: dict[str, JobState] = {}
    for command in (SQUEUE, [*SACCT, "--jobs", ",".join(ids.values())]):
        if set(ids.values()) <= found.keys():
            break
        for line in (ask(command) or "").splitlines():
            identity, state, reason = line.strip().split("|")[:3]
            found.setdefault(identity, _state(state, reason))
    return {stage: found.get(identity, JobState(State.UNKNOWN)) for stage, identity in ids.items()}


def _state(state: str, reason: str) -> JobState:
    name = state.split(" ")[0]  # "CANCELLED by 1000"
    said = f"{name} ({reason})" if reason not in ("", "None", "0:0") else name
    return JobState(STATES.get(name, State.FAILED), said)


def _batch_script(submission: Submission, job: StageJob) -> str:
    settings, slurm = submission.settings, submission.settings.slurm
    options = [f"--cpus-per-task={job.resources.cpus}"] if job.resources.cpus else []  # srun takes none from sbatch
    if slurm.image:
        here = str(submission.here)
        mounts = ",".join([f"{here}:{here}", *slurm.mounts])
        options += [f"--container-image={slurm.image}", f"--container-mounts={mounts}"]
    return render(
        "slurm.sbatch",
        name=f"{slug(submission.run, 24)}-{slug(job.stage, 24)}",
        resources=job.resources,
        settings=settings,
        slurm=slurm,
        options="".join(f" {shlex.quote(option)}" for option in options),
        script=submission.folder / f"{job.stage}.sh",
        saved=Interrupted.exit_code,
    )


def _commands(submission: Submission) -> list[str]:
    variables = {stage: f"job_{number}" for number, stage in enumerate(submission.stages, 1)}
    commands = []
    for job in submission.jobs:
        variable = variables[job.stage]
        waits = "".join(f':"${variables[stage]}"' for stage in job.after)
        dependency = f" --dependency=afterok{waits} --kill-on-invalid-dep=yes" if waits else ""
        batch = shlex.quote(f"{job.stage}.sbatch")
        commands += [
            f"{variable}=$(sbatch --parsable{dependency} {batch})",
            f"{variable}=${{{variable}%%;*}}  # of several clusters, the name comes after the id",
            *keep_id([job.stage], f'"${variable}"'),
        ]
    return commands
