"""From the settings of a stage's data to checked rows. Torch-free: `align plan` calls it.

Every file is read and checked whole before the first row is used, and all that is wrong is reported at once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.data.detect import mapping_problems
from align.data.faults import FileFault
from align.data.files import FileReport, RowProblem, content, read_rows, shown_path
from align.data.split import Keyed, split
from align.errors import DataError, Problem
from align.recipe.settings import DataSettings, Role

SHOWN = 20


@dataclass(frozen=True)
class Report:
    """What was found in each file, and why rows were left out."""

    files: list[FileReport]
    skipped: list[Problem]


@dataclass(frozen=True)
class Dataset:
    """Rows of the type of the role: Document, Demonstration, Preference or Prompt."""

    train: list
    held_out: list
    report: Report


def load(settings: DataSettings, role: Role) -> Dataset:
    """Reads, checks and splits the rows of a stage. Paths are absolute or relative to the working folder.

    Raises DataError with everything that is wrong. Where `on_bad` is skip, bad rows are an error only when no
    row is left. `max_rows` limits the rows of `path`, not those of `held_out_path`.
    """
    if wrong_names := mapping_problems(settings.columns):
        raise DataError(wrong_names)
    train = _read_all(_listed(settings.path), settings, role, is_held_out=False)
    held_out = _read_all(_listed(settings.held_out_path), settings, role, is_held_out=True)
    _raise_problems([train, held_out], may_skip=settings.on_bad == "skip")
    if settings.held_out_path is None:
        training, measured = split(train.rows[: settings.max_rows], settings.held_out)
    else:
        _raise_leaks(train.rows, held_out.rows)
        training, measured = train.rows[: settings.max_rows], held_out.rows
    report = Report(train.files + held_out.files, [*train.ties, *train.bad, *held_out.ties, *held_out.bad])
    return Dataset([keyed.row for keyed in training], [keyed.row for keyed in measured], report)


def content_hash(settings: DataSettings) -> str:
    """sha256 (64 hex digits) of the bytes of all files in order; names, folders and times do not matter."""
    digest = hashlib.sha256()
    for paths in (_listed(settings.path), _listed(settings.held_out_path)):
        # The count and digests of fixed size: no two divisions of the same bytes into files are alike.
        digest.update(len(paths).to_bytes(8))
        for path in paths:
            try:
                digest.update(hashlib.sha256(content(path)).digest())
            except FileFault as fault:
                raise DataError(_file_problem(path, fault)) from None
    return digest.hexdigest()


@dataclass
class _Found:
    rows: list[Keyed] = field(default_factory=list)
    bad: list[RowProblem] = field(default_factory=list)
    ties: list[RowProblem] = field(default_factory=list)
    broken: list[Problem] = field(default_factory=list)
    files: list[FileReport] = field(default_factory=list)


def _read_all(paths: Sequence[Path], settings: DataSettings, role: Role, is_held_out: bool) -> _Found:
    found = _Found()
    seen: set[Path] = set()
    for path in paths:
        try:
            if path.resolve() in seen:
                raise FileFault("the file is listed twice", "its rows would count double; remove one")
            seen.add(path.resolve())
            file = read_rows(path, settings, role, is_held_out)
        except FileFault as fault:
            found.broken.append(_file_problem(path, fault))
            continue
        found.rows += file.rows
        found.bad += file.bad
        found.ties += file.ties
        found.files.append(file.report)
    return found


def _raise_problems(both: list[_Found], may_skip: bool) -> None:
    broken = [problem for found in both for problem in found.broken]
    bad = [problem for found in both for problem in found.bad]
    if broken or (bad and not may_skip):
        hint = f"the first {SHOWN} are shown; " if len(bad) > SHOWN else ""
        raise DataError([*broken, *_summarised(bad, f"{hint}`on_bad: skip` leaves such rows out")])
    for found, use in zip(both, ("train on", "hold out"), strict=True):
        if not found.rows and (found.files or use == "train on"):
            left_out = _summarised(found.bad + found.ties, "all were left out")
            raise DataError([*left_out, Problem("data", f"no row is left to {use}")])


def _summarised(bad: list[RowProblem], hint: str) -> list[Problem]:
    """The first problems and, from two on, how many there are of each kind."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(problem.kind for problem in bad).most_common())
    total = [Problem("data", f"{len(bad)} bad rows: {kinds}", hint)] if len(bad) > 1 else []
    return [*bad[:SHOWN], *total]


def _raise_leaks(train: list[Keyed], held_out: list[Keyed]) -> None:
    first: dict[str, str] = {}
    for keyed in held_out:
        first.setdefault(keyed.key, keyed.row.source)
    leaks = [
        RowProblem(
            keyed.row.source,
            f"its prompt is also held out, in {first[keyed.key]}",
            "remove one",
            "leaked prompts",
        )
        for keyed in train
        if keyed.key in first
    ]
    if leaks:
        raise DataError(_summarised(leaks, "what is measured on must not be trained on"))


def _file_problem(path: Path, fault: FileFault) -> Problem:
    where = shown_path(path) if fault.row is None else f"{shown_path(path)}:{fault.row}"
    return Problem(where, fault.what, fault.hint)


def _listed(paths: str | list[str] | None) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str) else paths or [])]
