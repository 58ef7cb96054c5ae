"""What can be told of a whole set of judgements: whether good and bad answers stand apart."""

from __future__ import annotations

from typing import Any

from align.data.checking.findings import Findings, Severity
from align.data.rows import Judgement, Row
from align.errors import Problem

FEWEST = 20
"""Judgements below which nothing is told of the whole."""
SORTED = 0.2
"""Share of the expected number of runs below which labels are not in a random order."""


class SortedLabels:
    """Counts runs of equal labels. In a random order of n, of which a share p is good, 2 n p (1 - p) + 1 are
    expected."""

    def __init__(self, findings: Findings):
        self._findings = findings
        self._number = self._good = self._runs = 0
        self._last: bool | None = None

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Counts a judgement."""
        assert isinstance(row, Judgement)
        self._number += 1
        self._good += row.is_good
        self._runs += row.is_good is not self._last
        self._last = row.is_good

    def finish(self) -> dict[str, Any]:
        """Tells if there are far fewer runs than by chance."""
        if not self._number:
            return {}
        share = self._good / self._number
        expected = 2 * self._number * share * (1 - share) + 1
        if self._number >= FEWEST and 0 < share < 1 and self._runs < SORTED * expected:
            what = f"good and bad answers stand in {self._runs} blocks; in a random order there would be {expected:.0f}"
            hint = "with `max_rows`, or without shuffling, a model sees one kind"
            self._findings.note("sorted labels", Severity.WARNING, Problem("all rows", what, hint))
        return {"good": share}
