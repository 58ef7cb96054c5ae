"""Asking an engine through its own command line."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

TIMEOUT = 60.0
"""Seconds to wait for an answer."""


class State(StrEnum):
    """Where a job is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """The engine does not answer, or does not know it."""


@dataclass(frozen=True)
class JobState:
    """What an engine says of a job; `detail` is in its own words."""

    state: State
    detail: str = ""


def ask(command: Sequence[str]) -> str | None:
    """What an engine's command prints; None when it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def same_for_all(stages: Sequence[str], state: JobState) -> dict[str, JobState]:
    """The state of the one job that runs all stages."""
    return dict.fromkeys(stages, state)
