"""One file to canonical rows, each with the key it is split by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from align.data.detect import check_mapped, columns_of, detect, renamed
from align.data.faults import FileFault, RowFault, escaped, quoted
from align.data.messages import optional_text
from align.data.readers import READERS, RawRow, Table, read
from align.data.rows import Demonstration, Document, Preference, Prompt, Row
from align.data.shapes import Parsed, Shape
from align.data.split import Keyed, prompt_key, text_key
from align.errors import Problem
from align.recipe.nearest import did_you_mean
from align.recipe.settings import DataSettings, Role

# Sets made by sampling two answers have a few ties, which say nothing about preference. Up to this share of
# rows they are left out and counted; more of them mean that something is wrong with the file.
TIES_LEFT_OUT = 0.01


@dataclass(frozen=True)
class RowProblem(Problem):
    """A problem of one row; `kind` is what it is counted under."""

    kind: str = ""


@dataclass(frozen=True)
class FileReport:
    """What was found in one file. `shape` is empty when no row could be read."""

    name: str
    shape: str
    rows: int
    kept: int
    blank_lines: int
    ignored_columns: list[str]
    is_held_out: bool


@dataclass(frozen=True)
class FileRows:
    """The good rows of a file, its bad rows, and the few ties that are left out whatever `on_bad` says."""

    rows: list[Keyed]
    bad: list[RowProblem]
    ties: list[RowProblem]
    report: FileReport


def read_rows(path: Path, settings: DataSettings, role: Role, is_held_out: bool) -> FileRows:
    """Reads and checks a whole file. Raises FileFault when it cannot be used at all."""
    name = shown_path(path)
    table = read(content(path), path.suffix.lower())
    faults = dict(table.bad)
    rows: list[Keyed] = []
    shape_name, ignored = "", []
    if table.rows:
        shape, ignored = _shape(table, settings, role)
        shape_name = shape.name
        for number, values in table.rows:
            try:
                ours = renamed(values, settings.columns)
                rows.append(_keyed(ours, shape, settings.system, role, f"{name}:{number}"))
            except RowFault as fault:
                faults[number] = fault
    bad = [
        RowProblem(f"{name}:{number}", fault.what, fault.hint, fault.kind) for number, fault in sorted(faults.items())
    ]
    total = len(rows) + len(bad)
    if not rows and total > 1 and len({problem.what for problem in bad}) == 1:
        raise FileFault(f"in all {total} rows, {bad[0].what}", bad[0].hint)
    ties = [problem for problem in bad if problem.kind == "tie"]
    if len(ties) <= TIES_LEFT_OUT * total:
        bad = [problem for problem in bad if problem.kind != "tie"]
    else:
        ties = []
    report = FileReport(name, shape_name, total, len(rows), table.blank_lines, ignored, is_held_out)
    return FileRows(rows, bad, ties, report)


def content(path: Path) -> bytes:
    """The bytes of a file. Raises FileFault when there is none, with the nearest names there are."""
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in READERS)
        raise FileFault("this is a folder; name its files", f"it has {quoted(inside[:5])}" if inside else "")
    if path.exists() and not path.is_file():
        raise FileFault("this is not a regular file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileFault("there is no such file", _nearest(path)) from None
    except OSError as error:
        raise FileFault(f"the file cannot be read: {error.strerror}") from None


def shown_path(path: Path) -> str:
    """The path as messages name it: relative to the working folder where that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def _shape(table: Table, settings: DataSettings, role: Role) -> tuple[Shape, list[str]]:
    """The file's shape, and the columns (under their names in the file) that it does not use."""
    mapping = settings.columns
    theirs = columns_of(values for _, values in table.rows)
    check_mapped(theirs, mapping)
    ours = list(renamed(dict.fromkeys(theirs), mapping))
    shape = detect(ours, mapping, role)
    used = {mapping.get(name, name) for name in (*shape.columns, *shape.optional)}
    return shape, [name for name in theirs if name not in used]


def _keyed(values: RawRow, shape: Shape, default_system: str | None, role: Role, source: str) -> Keyed:
    parsed = shape.parse(values)
    system = optional_text(values, "system") if "system" in shape.optional else None
    key = prompt_key(parsed.prompt) if parsed.prompt else text_key(parsed.answers[0])
    return Keyed(_canonical(parsed, role, system or default_system, source), key)


def _canonical(parsed: Parsed, role: Role, system: str | None, source: str) -> Row:
    asked = parsed.prompt
    if system and asked and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": system}, *asked]
    if role is Role.PROMPTS:
        return Prompt(asked, source)
    if role is Role.CORPUS:
        return Document("\n\n".join([*(turn["content"] for turn in asked), *parsed.answers]), source)
    if role is Role.DEMONSTRATIONS:
        return Demonstration([*asked, {"role": "assistant", "content": parsed.answers[0]}], source)
    chosen, rejected = parsed.answers
    if chosen.strip() == rejected.strip():
        raise RowFault("tie", "`chosen` and `rejected` are the same", "a tie says nothing about preference: remove it")
    return Preference(asked, chosen, rejected, source)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {shown_path(path.parent)}"
    data_files = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in READERS)
    return did_you_mean(path.name, map(escaped, data_files)) or "its folder has no data files"
