"""From the settings of a stage's data to checked rows. Torch-free: `align plan` calls it.

Every file is read and checked whole before the first row is used, and all that is wrong is reported at once. Rows are
read one at a time and kept in a Spool, so that a data set need not fit in memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from align.data.canonical import ROW_TYPES
from align.data.contamination import Contamination
from align.data.faults import FileFault
from align.data.files import FileReport, FileRows, RowProblem
from align.data.mapping import mapping_problems
from align.data.mixture import mixed
from align.data.progress import Advance, counted, progress, unwatched
from align.data.rows import Row
from align.data.sources import DataFile, files_of, shown_path
from align.data.split import Keys, split
from align.data.spool import Picked, Spool
from align.data.streams import opened
from align.errors import DataError, Problem
from align.recipe.data_settings import DataSettings, ReadSettings, Role

SHOWN = 20

# Sets made by sampling two answers have a few ties, which say nothing about preference. Up to this share of
# rows they are left out and counted; more of them mean that something is wrong with the file.
TIES_LEFT_OUT = 0.01


@dataclass(frozen=True)
class Report:
    """What was found in each file, and why rows were left out."""

    files: list[FileReport]
    skipped: Sequence[RowProblem]
    unused: dict[str, int]
    """Good rows of each part that the mixture and `max_rows` leave; a path alone is a part without a name."""


@dataclass(frozen=True)
class Dataset:
    """Rows of the type of the role: Document, Demonstration, Preference, Judgement or Prompt."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    report: Report
    train_keys: Sequence[bytes]
    """Those of the prompts, row for row."""
    held_out_keys: Sequence[bytes]


def load(settings: DataSettings, role: Role) -> Dataset:
    """Reads, checks and splits the rows of a stage. Paths are absolute or relative to the working folder.

    Raises DataError with everything that is wrong. Where `on_bad` is skip, bad rows are an error only when no
    row is left. `max_rows` limits the rows of `path` or `mixture`, not those of `held_out_path`.
    """
    parts = settings.parts()
    if wrong_names := _wrong_names(settings):
        raise DataError(wrong_names)
    evaluated, contamination = read_evaluated(settings.decontaminate)
    with progress("reading") as watch:
        train = Found(role, contamination=contamination, watch=watch)
        ranges = {name: train.read(part.path, part) for name, part in parts.items()}
        held_out = Found(role, is_held_out=True, watch=watch)
        held_out.read(settings.held_out_path, settings)
    may_skip = settings.on_bad == "skip"
    _raise_problems([train, held_out], evaluated, may_skip=may_skip)
    chosen = mixed(train.keys, list(ranges.values()), list(parts.values()))[: settings.max_rows]
    if settings.held_out_path is None:
        sides = split(Picked(train.keys, chosen), settings.held_out)
        trained, kept_out = (array("q", (chosen[at] for at in side)) for side in sides)
        measured = train
    else:
        _raise_leaks(train, held_out)
        trained, kept_out, measured = chosen, array("q", range(len(held_out.rows))), held_out
    unused = {name: len(part) - sum(number in part for number in chosen) for name, part in ranges.items()}
    _raise_unused(ranges, unused)
    left_out = train.left_out
    for other in (held_out, *([evaluated] if evaluated else [])):
        left_out.extend(other.left_out)
    return Dataset(
        Picked(train.rows, trained),
        Picked(measured.rows, kept_out),
        Report(train.files + held_out.files, left_out, unused),
        Picked(train.keys, trained),
        Picked(measured.keys, kept_out),
    )


def content_hash(settings: DataSettings) -> str:
    """sha256 (64 hex digits) of the bytes of all files in order, decompressed; names, folders and times do not
    matter."""
    digest = hashlib.sha256()
    groups: list[tuple[Any, ReadSettings]] = [(part.path, part) for part in settings.parts().values()]
    groups.append((settings.held_out_path, settings))
    groups += [(settings.decontaminate, ReadSettings())] if settings.decontaminate else []
    for paths, reading in groups:
        files = list(data_files(paths, reading.files))
        # The count and digests of fixed size: no two divisions of the same bytes into files are alike.
        digest.update(len(files).to_bytes(8))
        for file in files:
            if isinstance(file, Problem):
                raise DataError(file)
            try:
                with opened(file.path) as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())  # type: ignore[arg-type]
            except FileFault as fault:
                raise DataError(file_problem(file.name, fault)) from None
    return digest.hexdigest()


@dataclass
class Found:
    """What is read for one side: the good rows with their keys, and the rest."""

    role: Role
    is_held_out: bool = False
    contamination: Contamination | None = None
    watch: tuple[Advance, Advance] = (unwatched, unwatched)
    """Told of rows that were read, and of rows to be read."""
    rows: Spool[Row] = field(init=False)
    keys: Keys = field(default_factory=Keys)
    bad: Spool[RowProblem] = field(default_factory=lambda: Spool(RowProblem))
    left_out: Spool[RowProblem] = field(default_factory=lambda: Spool(RowProblem))
    broken: list[Problem] = field(default_factory=list)
    files: list[FileReport] = field(default_factory=list)
    _seen: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rows = Spool(ROW_TYPES[self.role])

    def read(self, paths: str | list[str] | None, settings: ReadSettings) -> range:
        """Reads files; gives the positions of their good rows."""
        start = len(self.rows)
        for file in data_files(paths, settings.files):
            if isinstance(file, Problem):
                self.broken.append(file)
                continue
            try:
                self._read_file(file, settings)
            except FileFault as fault:
                self.broken.append(file_problem(file.name, fault))
        return range(start, len(self.rows))

    def _read_file(self, file: DataFile, settings: ReadSettings) -> None:
        if file.path.resolve() in self._seen:
            raise FileFault("the file is listed twice", "its rows would count double; remove one")
        self._seen.add(file.path.resolve())
        reader = FileRows(file, settings, self.role)
        ties: Spool[RowProblem] = Spool(RowProblem)
        advance, expect = self.watch
        expect(reader.num_rows)
        for found in counted(reader, advance):
            if isinstance(found, RowProblem):
                is_tie = found.kind == "tie"
                (ties if is_tie else self.bad if found.is_bad else self.left_out).append(found)
            elif reason := self.contamination and self.contamination.reason(found.row, found.key):
                self.left_out.append(RowProblem(found.row.source, reason, "", "contaminated", False))
            else:
                self.rows.append(found.row)
                self.keys.append(found.key)
        (self.left_out if len(ties) <= TIES_LEFT_OUT * reader.rows else self.bad).extend(ties)
        self.files.append(reader.report(self.is_held_out))


def data_files(paths: str | list[str] | None, pattern: str | None) -> Iterator[DataFile | Problem]:
    """The files that paths of the recipe stand for, in order, and what is wrong with those that stand for none."""
    for path in [paths] if isinstance(paths, str) else paths or []:
        try:
            yield from files_of(path, pattern)
        except FileFault as fault:
            yield file_problem(shown_path(Path(path)), fault)


def files_read(settings: DataSettings) -> list[DataFile]:
    """The files whose rows a stage trains on and measures on; those that are not there are not named."""
    groups = [(part.path, part.files) for part in settings.parts().values()]
    found = [file for paths, pattern in groups for file in data_files(paths, pattern)]
    found += data_files(settings.held_out_path, settings.files)
    return [file for file in found if not isinstance(file, Problem)]


def read_evaluated(paths: str | list[str] | None) -> tuple[Found | None, Contamination | None]:
    """The evaluation sets that training rows are compared with."""
    if not paths:
        return None, None
    evaluated = Found(Role.PROMPTS)
    evaluated.read(paths, ReadSettings())
    contamination = Contamination()
    for prompt, key in zip(evaluated.rows, evaluated.keys, strict=True):
        contamination.add(prompt, key)  # type: ignore[arg-type]
    return evaluated, contamination


def _wrong_names(settings: DataSettings) -> list[Problem]:
    problems = mapping_problems(settings, "data")
    for name, part in settings.mixture.items():
        problems += mapping_problems(part, f"data.mixture.{name}")
    return problems


def _raise_problems(both: Sequence[Found], evaluated: Found | None, *, may_skip: bool) -> None:
    every = [*both, *([evaluated] if evaluated else [])]
    broken = [problem for found in every for problem in found.broken]
    bad = [found.bad for found in every]
    num_bad = sum(map(len, bad))
    if broken or (num_bad and not may_skip):
        hint = f"the first {SHOWN} are shown; " if num_bad > SHOWN else ""
        raise DataError([*broken, *_summarised(bad, f"{hint}`on_bad: skip` leaves such rows out")])
    for found in every:
        found.left_out.extend(found.bad)
    for found, use in zip(both, ("train on", "hold out"), strict=True):
        if not found.rows and (found.files or use == "train on"):
            raise DataError(
                [*_summarised([found.left_out], "all were left out"), Problem("data", f"no row is left to {use}")]
            )


def _summarised(problems: Sequence[Sequence[RowProblem]], hint: str) -> list[Problem]:
    """The first problems and, from two on, how many there are of each kind."""
    kinds = Counter(problem.kind for problem in chain(*problems))
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    total = [Problem("data", f"{kinds.total()} bad rows: {named}", hint)] if kinds.total() > 1 else []
    return [*islice(chain(*problems), SHOWN), *total]


def _raise_unused(ranges: Mapping[str, range], unused: Mapping[str, int]) -> None:
    """A part of a mixture that gives no row was not meant so."""
    none = [name for name, part in ranges.items() if name and unused[name] == len(part)]
    if none:
        hint = "see its `weight`, and `max_rows`"
        raise DataError(
            [
                Problem(f"data.mixture.{name}", f"none of its {len(ranges[name])} good rows is used", hint)
                for name in none
            ]
        )


def _raise_leaks(train: Found, held_out: Found) -> None:
    first: dict[bytes, int] = {}
    for number, key in enumerate(held_out.keys):
        first.setdefault(key, number)
    leaks = [
        RowProblem(
            train.rows[number].source,
            f"its prompt is also held out, in {held_out.rows[first[key]].source}",
            "remove one",
            "leaked prompts",
        )
        for number, key in enumerate(train.keys)
        if key in first
    ]
    if leaks:
        raise DataError(_summarised([leaks], "what is measured on must not be trained on"))


def file_problem(name: str, fault: FileFault) -> Problem:
    """What is wrong with a whole file."""
    return Problem(name if fault.row is None else f"{name}:{fault.row}", fault.what, fault.hint)
