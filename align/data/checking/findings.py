"""What was found: faults by kind, each with its severity, its count and its first places.

A row is known by its position among the good rows. What is kept of each is a few bytes: its place in the files, and
whether the clean copy leaves it out.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from align.data.files import RowProblem
from align.data.spool import Spool
from align.errors import Problem

SHOWN = 20
"""Places of a finding that are kept."""


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """Training would refuse the data, or go wrong on it."""
    WARNING = "warning"
    """Training works, and rows are left out or teach something that was hardly meant."""
    HINT = "hint"
    """Worth a look. Found by a simple rule, which may be wrong."""


@dataclass(frozen=True)
class Rule:
    """What a kind of row finding means."""

    severity: Severity
    hint: str
    """What to do about it."""
    is_left_out: bool = False
    """Whether the clean copy leaves such rows out."""


RULES: dict[str, Rule] = {
    "duplicate": Rule(Severity.WARNING, "it counts double", True),
    "near duplicate": Rule(Severity.WARNING, "it counts nearly double", True),
    "repeated prompt": Rule(Severity.HINT, "PPO asks each prompt once", True),
    "contradiction": Rule(Severity.WARNING, "which of them is right cannot be told", True),
    "alike answers": Rule(Severity.WARNING, "they differ in nothing that a model could learn", True),
    "chosen and rejected": Rule(Severity.HINT, "right for rankings of several answers, else a contradiction"),
    "flipped label": Rule(Severity.HINT, "read it: its words speak against its label"),
    "leaked prompt": Rule(Severity.ERROR, "what is measured on must not be trained on", True),
    "shared words": Rule(Severity.WARNING, "probably the same question in other words", True),
    "e-mail address": Rule(Severity.HINT, "may be personal data"),
    "phone number": Rule(Severity.HINT, "may be personal data"),
    "card number": Rule(Severity.HINT, "may be personal data"),
    "secret": Rule(Severity.WARNING, "a model could repeat it: revoke it", True),
    "blob": Rule(Severity.WARNING, "no text that a model should learn"),
    "hidden character": Rule(Severity.WARNING, "it is not seen, or stands for what was lost; a model learns it"),
    "label in prompt": Rule(Severity.HINT, "a model would read the label instead of the answers"),
    "other script": Rule(Severity.HINT, "most rows are written in another one"),
    "control text": Rule(Severity.ERROR, "it would be read as the end or start of a turn", True),
    "template refuses": Rule(Severity.ERROR, "remove the turn, or train with data.template=plain", True),
    "template drops": Rule(Severity.ERROR, "the model would not see it: mend the chat template", True),
    "loss mask": Rule(Severity.ERROR, "use a template that does not rewrite earlier turns", True),
    "missing EOS": Rule(Severity.ERROR, "the model would never learn to stop: mend the chat template", True),
    "double BOS": Rule(Severity.ERROR, "mend the chat template: it writes BOS twice"),
    "over-long": Rule(Severity.WARNING, "raise max_length, or shorten the row", True),
}
"""The findings on rows that could be read. Why others could not has the kinds that training gives them."""


@dataclass
class Finding:
    """All faults of one kind and severity."""

    kind: str
    severity: Severity
    hint: str = ""
    count: int = 0
    places: list[Problem] = field(default_factory=list)
    """The first SHOWN."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "severity": str(self.severity)}


class Findings:
    """Collects what is found. `left_out` says by position which good rows a clean copy does not have."""

    def __init__(self) -> None:
        self.left_out = bytearray()
        self.rejected: Spool[RowProblem] = Spool(RowProblem)
        """Why the clean copy lacks a row, good or bad: its first fault."""
        self._found: dict[tuple[str, Severity], Finding] = {}
        self._numbers = array("q")
        self._starts: list[int] = []
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self.left_out)

    def new_row(self, source: str) -> int:
        """The position of a good row, by which its findings are told."""
        name, _, number = source.rpartition(":")
        if self._names[-1:] != [name]:
            self._starts.append(len(self))
            self._names.append(name)
        self._numbers.append(int(number))
        self.left_out.append(False)
        return len(self) - 1

    def place(self, position: int) -> str:
        """`file.jsonl:12`."""
        return f"{self._names[bisect_right(self._starts, position) - 1]}:{self._numbers[position]}"

    def note(self, kind: str, severity: Severity, problem: Problem) -> None:
        """Something that is wrong elsewhere than in a good row."""
        finding = self._found.setdefault((kind, severity), Finding(kind, severity, problem.hint))
        finding.count += 1
        if len(finding.places) < SHOWN:
            finding.places.append(Problem(problem.where, problem.what))

    def bad_row(self, problem: RowProblem, severity: Severity) -> None:
        """A row that is no good row."""
        self.note(problem.kind, severity, problem)
        self.rejected.append(problem)

    def row(self, kind: str, position: int, what: str) -> None:
        """A finding of RULES in a good row."""
        rule = RULES[kind]
        problem = RowProblem(self.place(position), what, rule.hint, kind)
        self.note(kind, rule.severity, problem)
        if rule.is_left_out and not self.left_out[position]:
            self.left_out[position] = True
            self.rejected.append(problem)

    def all(self) -> list[Finding]:
        """The worst first, then the most frequent."""
        order = list(Severity)
        return sorted(self._found.values(), key=lambda one: (order.index(one.severity), -one.count, one.kind))


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many faults there are of each severity."""
    return {str(level): sum(one.count for one in findings if one.severity is level) for level in Severity}
