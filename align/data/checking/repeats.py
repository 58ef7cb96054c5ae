"""Rows that are there twice or nearly twice, and labels that contradict each other."""

from __future__ import annotations

from typing import Any

from align.data.checking.findings import Findings
from align.data.checking.index import Index
from align.data.checking.near import Near
from align.data.checking.texts import texts
from align.data.rows import Demonstration, Judgement, Preference, Prompt, Row
from align.data.split import text_key

ANSWERS = {Preference: 2, Judgement: 1, Demonstration: 1}
"""Texts of a row, from its end, that answer the others."""


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
        self._near = Near()
        self._kind: type[Row] = Prompt

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Keeps the hashes of a row."""
        self._kind = type(row)
        said = list(map(text_key, texts(row)))
        self._rows.add(key.hex(), said, row.is_good if isinstance(row, Judgement) else None)
        end = len(said) - ANSWERS.get(type(row), 0)
        self._near.add(said[:end], said[end:])
        if isinstance(row, Preference):
            *_, chosen, rejected = said
            if chosen == rejected:
                self._findings.row("alike answers", position, "its answers differ only in their Unicode form")
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
        kind = "repeated prompt" if self._kind is Prompt else "duplicate"
        firsts, twins = self._rows.firsts(), self._near.twins()
        for position, (first, twin) in enumerate(zip(firsts, twins, strict=True)):
            if position != first:
                self._findings.row(kind, position, f"the same as {place(first)}")
            elif twin >= 0 and (self._kind is not Judgement or self._labels[position] == self._labels[twin]):
                self._findings.row("near duplicate", position, f"nearly the same as {place(twin)}")
        chosen = self._answers.opposites(bytes([0, 1]) * (len(self._labels)))[1::2] if self._answers else ()
        for position, other in enumerate(chosen):
            if other >= 0 > against[position]:
                self._findings.row(
                    "chosen and rejected", position, f"its rejected answer is chosen in {place(other // 2)}"
                )
        return {}
