"""Every error a user can cause, with the exit code a scheduler can act on.

An error message says where, what is wrong, and the nearest fix. The command line prints it and exits with
`exit_code`; it never shows a traceback for these.

| code | meaning |
|---|---|
| 2 | usage or recipe |
| 3 | data |
| 4 | checkpoint or model given as input |
| 70 | numeric divergence: do not retry |
| 71 | the rollout engine, or a reward endpoint, gave up |
| 72 | distributed failure |
| 73 | cannot write |
| 75 | interrupted after a safe save: run again to continue |
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave us.

    Example: Problem("align.yaml:7", "ppo.max_lenght: no such setting", "did you mean `max_length`?")
    """

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.hint})" if self.hint else "")


class AlignError(Exception):
    """Base of every error with a cause the user can act on."""

    exit_code = 1


class ProblemsError(AlignError):
    """An error made of several problems, all of which are shown at once."""

    def __init__(self, problems: Sequence[Problem] | Problem | str):
        if isinstance(problems, str):
            problems = [Problem("align", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(ProblemsError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class DataError(ProblemsError):
    """A data file is wrong: each problem names file and row."""

    exit_code = 3


class ArtifactError(AlignError):
    """A model, adapter or checkpoint given as input is missing, damaged or of the wrong kind."""

    exit_code = 4


class NumericError(AlignError):
    """A loss, gradient or reward became non-finite, or an oracle of the trainer failed: retrying cannot help."""

    exit_code = 70


class RolloutError(AlignError):
    """The engine that samples responses, or the endpoint that scores them, gave up."""

    exit_code = 71


class DistributedError(AlignError):
    """Processes disagree, or the world size asked for was not obtained."""

    exit_code = 72


class WriteError(AlignError):
    """An output cannot be written: disk full, no permission."""

    exit_code = 73


class Interrupted(AlignError):
    """Stopped by a signal, or the run folder is in use: nothing is lost, run the same command again."""

    exit_code = 75


def leave(error: AlignError) -> None:
    """Ends this process at once, from any thread, with the error's exit code."""
    print(error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)
