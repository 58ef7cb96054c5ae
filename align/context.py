"""What a running stage is given: its inputs, folder, seeds and logs. No globals, no environment."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from align.errors import AlignError, Interrupted, leave
from align.job import Input, Job
from align.metrics import JsonLines, MetricsLog
from align.records import committed_folder


class StopFlag:
    """Set by SIGTERM or Ctrl-C. A stage looks at it after every step, then saves and raises Interrupted.

    A second Ctrl-C stops at once; artifacts are safe all the same, because they appear in one rename.
    """

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT of this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True


class Context:
    """One stage's surroundings while it runs.

    Layout of `directory`: job.json, metrics.jsonl, samples.jsonl, checkpoints/, model/ (the artifact),
    record.json. Of several processes the first one writes it. `abort` ends the process at once, from any thread, with
    an error as the cause.
    """

    def __init__(
        self,
        job: Job,
        stop: StopFlag | None = None,
        abort: Callable[[AlignError], None] = leave,
        *,
        process: int = 0,
        processes: int = 1,
    ):
        self.job, self.abort = job, abort
        self.processes = processes
        """How many work on the stage."""
        self.is_main = process == 0
        """Whether this is the one that writes."""
        self.directory = Path(job.directory)
        self.metrics = MetricsLog(self.directory / "metrics.jsonl", writes=self.is_main)
        self.samples = JsonLines(self.directory / "samples.jsonl", writes=self.is_main)
        self.checkpoints = self.directory / "checkpoints"
        self.model_directory = self.directory / "model"
        self.cache = Path(job.cache) if job.cache else self.directory / "cache"
        self.stop = stop or StopFlag()

    def seed(self, name: str) -> int:
        """A seed of its own for each use of randomness: 31 bits of sha256(seed, stage, name)."""
        text = f"{self.job.seed}/{self.job.stage}/{name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def input(self, slot: str) -> Input:
        """The resolved input of a slot."""
        return self.job.inputs[slot]

    def commit_model(self, **manifest: Any):
        """Context manager giving a staging folder that becomes `model/` in one step. See align.records."""
        return committed_folder(
            self.model_directory, stage=self.job.stage, fingerprint=self.job.fingerprint, **manifest
        )

    def stop_here(self, step: int) -> None:
        """Raises Interrupted; call it once a checkpoint of `step` is on disk."""
        raise Interrupted(
            f"{self.job.stage}: stopped at step {step} with a checkpoint; run the same command to continue"
        )
