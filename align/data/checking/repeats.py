"""Rows that are there twice, and labels that contradict each other."""

from __future__ import annotations

from typing import Any

from align.data.checking.findings import Findings
from align.data.checking.index import Index
from align.data.checking.texts import texts
from align.data.rows import Judgement, Preference, Prompt, Row
from align.data.split import text_key


class Repeats:
    """Texts count in Unicode form NFC without the space around them, as in the split; a prompt that is labelled counts
    without its system message."""

    def __init__(self, findings: Findings):
        self._findings = findings
        self._rows = Index()
        self._labelled = Index()
        self._labels = bytearray()
        self._answers = Index()
        """The chosen and the rejected answer of each pair, in turn."""
        self._is_prompt = False

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Keeps the hashes of a row."""
        self._is_prompt = isinstance(row, Prompt)
        said = list(map(text_key, texts(row)))
        self._rows.add(key.hex(), said, row.is_good if isinstance(row, Judgement) else None)
        if isinstance(row, Preference):
            *_, chosen, rejected = said
            self._labelled.add(key.hex(), *sorted((chosen, rejected)))
            self._labels.append(chosen < rejected)
            self._answers.add(key.hex(), chosen)
            self._answers.add(key.hex(), rejected)
        elif isinstance(row, Judgement):
            self._labelled.add(key.hex(), said[-1])
            self._labels.append(row.is_good)

    def finish(self) -> dict[str, Any]:
        """Tells the findings."""
        place = self._findings.place
        against = self._labelled.opposites(self._labels)
        for position, other in enumerate(against):
            if other >= 0:
                self._findings.row("contradiction", position, f"labelled the other way in {place(other)}")
        kind = "repeated prompt" if self._is_prompt else "duplicate"
        for position, first in enumerate(self._rows.firsts()):
            if position != first:
                self._findings.row(kind, position, f"the same as {place(first)}")
        chosen = self._answers.opposites(bytes([0, 1]) * (len(self._labels)))[1::2] if self._answers else ()
        for position, other in enumerate(chosen):
            if other >= 0 > against[position]:
                self._findings.row(
                    "chosen and rejected", position, f"its rejected answer is chosen in {place(other // 2)}"
                )
        return {}
