"""Runs a plan: one process per stage, so that memory is returned and a crash stays in its stage."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import OmegaConf

from align.errors import AlignError, ConfigError, Interrupted, Problem, WriteError
from align.pipeline.folders import FAILURE, LOG, Order, read_failure, write_order
from align.pipeline.launch import Launch, stage_launch
from align.pipeline.lock import lock_run
from align.pipeline.plan import Action, Plan, Step, decide, make_plan
from align.pipeline.processes import die_with_parent, signal_workers
from align.pipeline.summary import write_summary
from align.recipe.load import Recipe
from align.records import remove_folder, sweep, write_text


class StageFailed(AlignError):
    """A stage's process ended badly; it said why on stderr and in its log. The exit code is its own."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def execute(
    plan: Plan,
    lock: Sequence[int] | None,
    *,
    command: Sequence[str] = (),
    announce: Callable[[Step], None] = lambda step: None,
) -> dict[str, Any]:
    """Runs every stage of the plan that needs it and returns the summary. `lock` is what `lock_run` gave; None on any
    machine but the first, which writes everything.

    Raises Interrupted when stopped after a safe save, StageFailed when a stage's process ends badly.
    """
    if lock is not None:
        write_text(plan.run_dir / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(plan.recipe.resolved())))
    with forwarded_signals() as stop:
        for planned in plan.steps:
            # A stage before it may have come out differently, so what is reused is looked at once more.
            step = planned if planned.runs else decide(planned.node, planned.job)
            announce(step)
            launch = stage_launch(step.node, plan.recipe)
            if step.runs and lock is not None:
                prepare(step, command)
            if step.runs and (lock is not None or launch.accelerate is not None):
                _run_stage(step, lock, launch, stop)
            if lock is not None:
                write_summary(plan)
    return {} if lock is None else write_summary(plan)


def prepare(step: Step, command: Sequence[str]) -> None:
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


@contextmanager
def order_stage(recipe: Recipe, stage: str, runs: Path, command: Sequence[str]) -> Iterator[Path | None]:
    """For processes that somebody else starts: the folder of a stage, prepared as `execute` does, while its run is
    locked. None when the stage is up to date. Raises ConfigError when stages that it needs are not."""
    run_dir = runs / recipe.settings.name
    with lock_run(run_dir):
        plan = make_plan(recipe, [stage], run_dir, verify=True)
        *others, step = plan.steps
        wanting = [other.job.stage for other in others if other.runs]
        if wanting:
            what = f"needs {' and '.join(wanting)}, not up to date"
            raise ConfigError(Problem(stage, what, f"first `align run {' '.join(wanting)}` with the same recipe"))
        if not step.runs:
            yield None
            return
        sweep(run_dir)
        write_text(run_dir / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(recipe.resolved())))
        prepare(step, command)
        yield Path(step.job.directory)
        write_summary(plan)


class Stop:
    """The stage's process while it lives, and the signal that was passed on to it."""

    def __init__(self) -> None:
        self.launched = False
        """Whether the process is a launcher."""
        self.signal: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Passes SIGINT on as it is, and anything else as SIGTERM."""
        self.signal = number
        if self.process is not None and self.process.poll() is None:
            passed = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            signal_workers(self.process.pid, passed, launched=self.launched)


@contextmanager
def forwarded_signals() -> Iterator[Stop]:
    """While open, SIGINT, SIGTERM and SIGHUP go to the running stage, which saves and ends by itself."""
    stop = Stop()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_stage(step: Step, lock: Sequence[int] | None, launch: Launch, stop: Stop) -> None:
    """Starts the stage's process, in its own session so that Ctrl-C reaches it once, and waits for it."""
    command = launch.prepare(Path(step.job.directory))
    stop.launched = launch.accelerate is not None
    # A signal that arrives before the process exists must not be lost: none is handled while it starts.
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        if stop.signal is not None:
            raise Interrupted(f"stopped before {step.job.stage}; run the same command to continue")
        stop.process = subprocess.Popen(
            command,
            env=os.environ | ({"ALIGN_WORLD_SIZE": str(launch.processes)} if stop.launched else {}),
            pass_fds=lock or (),
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
