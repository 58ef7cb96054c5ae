"""Slurm as far as `align submit` relies on it: real processes and signals, one machine, no waiting for resources.

Like Slurm it copies the script, starts it in the folder of the submission once all `afterok` jobs have ended with 0,
cancels it when one has not, signals steps and not the batch shell, and starts a requeued job again under its id.
A job holds the lock `ID/lock` from its submission to its end, so that whoever waits for it waits without polling.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_SLURM"])
KNOWN = {
    *("job-name", "output", "open-mode", "nodes", "ntasks-per-node", "gres", "cpus-per-task", "mem", "time"),
    *("partition", "account", "qos", "constraint", "requeue", "no-requeue", "signal"),
}


def sbatch(*arguments: str) -> None:
    """Prints the id."""
    *options, script = arguments
    assert options[0] == "--parsable"
    (waits,) = [option.split("afterok:")[1].split(":") for option in options if "--dependency=" in option] or [[]]
    assert all((ROOT / identity).exists() for identity in waits), "unknown job"
    identity = str(len(list(ROOT.iterdir())) + 100)
    job = ROOT / identity
    job.mkdir()
    shutil.copy(script, job / "script")
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (job / "script").read_text(), re.MULTILINE)
    assert {name for name, _ in found} <= KNOWN
    say(identity, "PENDING", "Dependency" if waits else "None")
    lock = os.open(job / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    facts = json.dumps({"waits": waits, **dict(found)})
    command = [sys.executable, __file__, "run_job", identity, facts]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, pass_fds=[lock], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
    print(f"{identity};here")


def run_job(identity: str, facts: str) -> None:
    """The life of a job."""
    options, job = json.loads(facts), ROOT / identity
    for other in options["waits"]:
        with (ROOT / other / "lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
        if state(other)[0] != "COMPLETED":
            return say(identity, "CANCELLED by 1000", "DependencyNeverSatisfied")
    nodes = int(options["nodes"])
    own = {"SLURM_JOB_ID": identity, "SLURM_NNODES": str(nodes)}
    own["SLURM_JOB_NODELIST"] = ",".join(f"node{number}" for number in range(nodes))
    log = options["output"].replace("%x", options["job-name"]).replace("%j", identity)
    while True:
        with Path(log).open("ab") as stream:
            batch = subprocess.Popen(
                ["bash", job / "script"], env={**os.environ, **own}, stdout=stream, stderr=stream, stdin=stream
            )
            (job / "batch").write_text(str(batch.pid))
            say(identity, "RUNNING", "None")
            code = batch.wait()
        if state(identity)[0].startswith("CANCELLED"):
            return
        if not (job / "requeue").exists():
            return say(identity, "COMPLETED" if code == 0 else "FAILED", f"{code}:0")
        (job / "requeue").rename(job / "requeued")
        say(identity, "PENDING", "BeginTime")


def srun(*arguments: str) -> None:
    """The command once per node; ends with the highest of their exit codes."""
    place = next(index for index, word in enumerate(arguments) if not word.startswith("-"))
    steps = [
        subprocess.Popen(arguments[place:], env={**os.environ, "SLURM_NODEID": str(node)})
        for node in range(int(os.environ["SLURM_NNODES"]))
    ]
    (ROOT / os.environ["SLURM_JOB_ID"] / "steps").write_text(" ".join(str(step.pid) for step in steps))
    sys.exit(max(step.wait() for step in steps))


def scancel(option: str, identity: str) -> None:
    """`--signal=TERM ID`: to the steps."""
    assert option == "--signal=TERM"
    for pid in (ROOT / identity / "steps").read_text().split():
        os.kill(int(pid), signal.SIGTERM)


def cancelled(identity: str) -> None:
    """What `scancel ID` makes Slurm do: the job is over at once, and its steps are told."""
    say(identity, "CANCELLED by 1000", "0:15")
    scancel("--signal=TERM", identity)


def preempted(identity: str) -> None:
    """What a grace time of the partition (GraceTime) makes Slurm do: steps are told, and the job runs on until it ends
    by itself, or is killed when that time is over."""
    scancel("--signal=TERM", identity)


def time_is_nearly_over(identity: str) -> None:
    """What `--signal=B:USR1@120` makes Slurm do."""
    os.kill(int((ROOT / identity / "batch").read_text()), signal.SIGUSR1)


def scontrol(verb: str, *arguments: str) -> None:
    """`requeue ID`, `show hostnames LIST`."""
    if verb == "requeue":
        (ROOT / arguments[0] / "requeue").touch()
    else:
        print(*arguments[1].split(","), sep="\n")


def squeue(*options: str) -> None:
    """Jobs that live, in the two formats that are asked for."""
    if options[0] == "--noheader":
        only, form = options[1:]
        assert form == "--format=%T"
        print(state(only.removeprefix("--jobs="))[0])
        return
    assert options == ("--me", "--states=all", "--noheader", "--format=%i|%T|%r")
    for job in ROOT.iterdir():
        name, reason = state(job.name)
        if name in ("PENDING", "RUNNING"):
            print(f"{job.name}|{name}|{reason}")


def sacct(*options: str) -> None:
    """Jobs that have ended."""
    assert options[:4] == ("--allocations", "--noheader", "--parsable2", "--format=JobID,State,ExitCode")
    for identity in options[-1].split(","):
        print("|".join([identity, *state(identity)]))


def say(identity: str, name: str, reason: str) -> None:
    """Keeps the state of a job, whole."""
    path = ROOT / identity / "state"
    path.with_suffix(".new").write_text(f"{name}|{reason}")
    path.with_suffix(".new").replace(path)


def state(identity: str) -> list[str]:
    """Name and reason."""
    return (ROOT / identity / "state").read_text().split("|")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
