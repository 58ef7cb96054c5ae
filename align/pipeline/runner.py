"""Runs a plan: one process per stage, so that memory is returned and a crash stays in its stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import OmegaConf

from align.errors import AlignError, Interrupted, WriteError
from align.pipeline.folders import FAILURE, LOG, Order, read_failure, write_order
from align.pipeline.plan import Action, Plan, Step, decide
from align.pipeline.processes import die_with_parent, signal_workers
from align.pipeline.summary import write_summary
from align.records import remove_folder, sweep, write_text


class StageFailed(AlignError):
    """A stage's process ended badly; it said why on stderr and in its log. The exit code is its own."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def execute(
    plan: Plan,
    lock: Sequence[int],
    *,
    launcher: Sequence[str] = (),
    command: Sequence[str] = (),
    announce: Callable[[Step], None] = lambda step: None,
) -> dict[str, Any]:
    """Runs every stage of the plan that needs it and returns the summary. `lock` is what `lock_run` gave.

    Raises Interrupted when stopped after a safe save, StageFailed when a stage's process ends badly.
    """
    write_text(plan.run_dir / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(plan.recipe.resolved())))
    with forwarded_signals(bool(launcher)) as stop:
        for planned in plan.steps:
            # A stage before it may have come out differently, so what is reused is looked at once more.
            step = planned if planned.runs else decide(planned.node, planned.job)
            announce(step)
            if step.runs:
                _prepare(step, command)
                _run_stage(step, lock, launcher, stop)
            write_summary(plan)
    return write_summary(plan)


def _prepare(step: Step, command: Sequence[str]) -> None:
    """Clears what an interrupted commit left, and the old result unless this is a resume; writes job.json."""
    directory = Path(step.job.directory)
    try:
        sweep(directory.parent)
        if directory.exists() and step.action is not Action.RESUME:
            remove_folder(directory)
        sweep(directory)
        (directory / FAILURE).unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{directory}: cannot write: {error.strerror or error}") from error
    spec = step.node.spec
    config_class = f"{spec.config.__module__}:{spec.config.__qualname__}"
    write_order(Order(step.job, spec.run, config_class, str(spec.output), list(command)))


class Stop:
    """The stage's process while it lives, and the signal that was passed on to it."""

    def __init__(self, launched: bool) -> None:
        self.launched = launched
        self.signal: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Passes SIGINT on as it is, and anything else as SIGTERM."""
        self.signal = number
        if self.process is not None and self.process.poll() is None:
            passed = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            signal_workers(self.process.pid, passed, launched=self.launched)


@contextmanager
def forwarded_signals(launched: bool) -> Iterator[Stop]:
    """While open, SIGINT, SIGTERM and SIGHUP go to the running stage, which saves and ends by itself."""
    stop = Stop(launched)
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_stage(step: Step, lock: Sequence[int], launcher: Sequence[str], stop: Stop) -> None:
    """Starts the stage's process, in its own session so that Ctrl-C reaches it once, and waits for it."""
    # A signal that arrives before the process exists must not be lost: none is handled while it starts.
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        if stop.signal is not None:
            raise Interrupted(f"stopped before {step.job.stage}; run the same command to continue")
        stop.process = subprocess.Popen(
            worker_command(step.job.directory, launcher),
            env=worker_environment(launcher),
            pass_fds=lock,
            start_new_session=True,
            preexec_fn=partial(_in_child, os.getpid(), held),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    code = stop.process.wait()
    stop.process = None
    if code:
        raise _failure(step, code, stop)


def _in_child(parent: int, held: set[signal.Signals]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    die_with_parent(parent)


def worker_command(directory: str, launcher: Sequence[str] = ()) -> list[str]:
    """The command line of a stage's process: direct, or through `accelerate launch` when it has arguments."""
    through = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
    return [sys.executable, *through, "-m", "align.worker", directory]


def worker_environment(launcher: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a stage's process. ALIGN_WORLD_SIZE is the number of processes asked for."""
    environment = dict(os.environ)
    for place, argument in enumerate(launcher):
        name, _, value = argument.partition("=")
        if name in {"--num_processes", "--num-processes"}:
            environment["ALIGN_WORLD_SIZE"] = value or "".join(launcher[place + 1 : place + 2])
    return environment


def _failure(step: Step, code: int, stop: Stop) -> AlignError:
    """The error for a stage's process that ended with `code`. Launchers hide it; failure.json keeps it."""
    stage, log = step.job.stage, Path(step.job.directory) / LOG
    code = read_failure(Path(step.job.directory)) or code
    if code == Interrupted.exit_code:
        return Interrupted(f"{stage}: interrupted; run the same command to continue")
    if code > 0:
        return StageFailed(f"{stage} failed with exit code {code}; see {log}", code)
    if stop.signal is not None:
        return Interrupted(f"{stage}: stopped before it could save; run the same command to continue")
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return StageFailed(f"{stage}: its process was killed by {name}{hint}; run the same command to continue", 128 - code)
