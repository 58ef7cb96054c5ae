"""A look at the rows that a stage is to be trained on: the checks of `align data check` that need no tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from align.data.checking.check import Check, checks_of_rows
from align.data.checking.findings import Findings
from align.data.checking.leaks import Leaks
from align.data.contamination import Contamination
from align.data.load import Dataset
from align.data.progress import counted, progress
from align.data.rows import Row
from align.errors import DataError, Problem
from align.recipe.data_settings import Role

AT_MOST = 20_000
"""Rows that are looked at. Of more, all rows of some prompts: the share of rows that repeat or contradict others is
about that of the whole."""
SHOWN = 20


def look(dataset: Dataset, role: Role, evaluated: Contamination | None = None) -> dict[str, Any]:
    """What was found, as plain JSON. `evaluated`: the prompts that policies are measured on. Raises DataError where one
    of them is trained on."""
    findings = Findings()
    checks = checks_of_rows(role, findings)
    leaks: list[Check] = []
    if evaluated and role is not Role.CORPUS:
        _refuse_leaks(dataset, evaluated)
        leaks = [Leaks(findings, evaluated)]
    num_rows = len(dataset.train) + len(dataset.held_out)
    share = AT_MOST / num_rows
    with progress("checking") as (advance, expect):
        expect(min(num_rows, AT_MOST))
        for rows, keys, wanted in (
            (dataset.train, dataset.train_keys, [*checks, *leaks]),
            (dataset.held_out, dataset.held_out_keys, checks),
        ):
            for row, key in counted(_some(rows, keys, share), advance):
                position = findings.new_row(row.source)
                for one in wanted:
                    one.add(position, row, key)
    measured: dict[str, Any] = {}
    for one in checks:
        measured |= one.finish()
    return {
        "role": str(role),
        "files": [asdict(file) for file in dataset.report.files],
        "train": len(dataset.train),
        "held_out": len(dataset.held_out),
        "skipped": dict(Counter(problem.kind for problem in dataset.report.skipped)),
        "looked_at": len(findings),
        "findings": [finding.as_json() for finding in findings.all()],
        "measured": measured,
    }


def _some(rows: Sequence[Row], keys: Sequence[bytes], share: float) -> Iterator[tuple[Row, bytes]]:
    """The rows of a share of the prompts, in order. Other bytes of the keys decide than those that make the split."""
    for number, key in enumerate(keys):
        if int.from_bytes(key[:4]) < share * 2**32:
            yield rows[number], key


def _refuse_leaks(dataset: Dataset, evaluated: Contamination) -> None:
    found = ((number, evaluated.twin(key)) for number, key in enumerate(dataset.train_keys))
    leaks = [(number, what) for number, what in found if what]
    if leaks:
        shown = [Problem(dataset.train[number].source, what, "remove one") for number, what in leaks[:SHOWN]]
        total = Problem("data", f"{len(leaks)} rows are measured on", "what is measured on must not be trained on")
        raise DataError([*shown, *([total] if len(leaks) > 1 else [])])
