"""Rows whose prompts are measured on."""

from __future__ import annotations

from typing import Any

from align.data.checking.findings import Findings
from align.data.contamination import Contamination
from align.data.rows import Row


class Leaks:
    """Compares rows with the prompts of evaluation sets."""

    def __init__(self, findings: Findings, contamination: Contamination):
        self._findings = findings
        self._contamination = contamination

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Looks at a row."""
        if twin := self._contamination.twin(key):
            self._findings.row("leaked prompt", position, twin)
        elif overlap := self._contamination.overlap(row):
            self._findings.row("shared words", position, overlap)

    def finish(self) -> dict[str, Any]:
        """Nothing is left to tell."""
        return {}
