"""A clean copy of checked files, and beside it why each missing row is not in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.data.checking.check import Checked, Order, good_rows
from align.data.faults import FileFault
from align.data.files import Keyed
from align.data.mapping import OUR_NAMES
from align.data.progress import Advance
from align.data.rows import Demonstration, Document, Judgement, Prompt, Row
from align.errors import ConfigError, DataError, Problem
from align.records import write_lines


def rejected_beside(path: Path) -> Path:
    """Where the reasons go: clean.rejected.jsonl for clean.jsonl."""
    return path.with_suffix(".rejected.jsonl")


def refuse_target(path: Path) -> None:
    """Raises ConfigError unless a clean copy can be written there without overwriting anything."""
    problems = []
    if path.suffix != ".jsonl":
        problems.append(Problem(str(path), "the clean copy is a .jsonl file", f"--fix {path.with_suffix('.jsonl')}"))
    for target in (path, rejected_beside(path)):
        if target.exists():
            problems.append(Problem(str(target), "already exists, and is not overwritten", "choose another --fix"))
    if problems:
        raise ConfigError(problems)


def write_clean(order: Order, checked: Checked, path: Path, advance: Advance) -> int:
    """Writes the good rows that no finding leaves out, in the shape of the role, and the others with their reasons.
    Returns the number of the former."""
    refuse_target(path)
    rows = zip(good_rows(order, checked, advance), checked.left_out, strict=True)
    try:
        write_lines(path, _lines(_whole(row) for row, is_left_out in rows if not is_left_out))
    except FileFault as fault:
        raise DataError(Problem(", ".join(order.paths), fault.what, fault.hint)) from None
    write_lines(rejected_beside(path), _lines(_reason(problem) for problem in checked.rejected))
    return checked.left_out.count(0)


def _lines(values: Iterable[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _reason(problem: Any) -> dict[str, Any]:
    """As in the rejected.jsonl of a stage."""
    return {name: value for name, value in asdict(problem).items() if name != "is_bad"}


def _whole(found: Keyed) -> dict[str, Any]:
    """A row with the columns that are not read, but for names that would give the copy another shape. `source` is the
    row's place, unless it is a column of the file."""
    others = {name: value for name, value in found.others.items() if name not in OUR_NAMES}
    text = json.dumps(others, default=str)  # columnar files have dates and the like
    kept = json.loads(text, parse_constant=lambda name: None)  # and numbers that JSON has not
    return _plain(found.row) | {"source": found.row.source} | kept


def _plain(row: Row) -> dict[str, Any]:
    """A row in the first shape of its role in docs/data.md."""
    if isinstance(row, Document):
        return {"text": row.text}
    if isinstance(row, Demonstration):
        return {"messages": row.messages}
    if isinstance(row, Prompt):
        return {"prompt": row.messages}
    if isinstance(row, Judgement):
        return {"prompt": row.prompt, "completion": row.response, "label": row.is_good}
    return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
