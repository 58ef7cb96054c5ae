"""All checks over all rows of some files, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from align.data.checking.findings import RULES, Finding, Findings, Severity, counts
from align.data.checking.judgements import SortedLabels
from align.data.checking.leaks import Leaks
from align.data.checking.preferences import Flipped, LengthBias
from align.data.checking.repeats import Repeats
from align.data.checking.texts import Patterns, Scripts
from align.data.checking.tokens import Tokens
from align.data.detect import detect
from align.data.faults import FileFault, quoted
from align.data.files import FileReport, FileRows, Keyed, RowProblem
from align.data.load import TIES_LEFT_OUT, data_files, file_problem, read_evaluated
from align.data.mapping import check_mapped, renamed, renamed_columns
from align.data.progress import Advance, counted, unwatched
from align.data.readers import survey
from align.data.render import Renderer
from align.data.rows import Row
from align.data.sources import DataFile
from align.data.spool import Spool
from align.data.streams import Version, refuse_change, version
from align.errors import DataError, Problem
from align.recipe.data_settings import ReadSettings, Role

GUESSED = (Role.JUDGEMENTS, Role.PREFERENCES, Role.DEMONSTRATIONS, Role.PROMPTS, Role.CORPUS)
"""Roles in the order in which a file that could have several is taken for one."""
FILE, EVALUATION = "file", "evaluation set"
NOT_OF_ROWS = (FILE, EVALUATION)
"""Kinds of findings on whole files."""


class Check(Protocol):
    """Looks at rows as they come."""

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Looks at a good row; `key` is that of its prompt."""
        ...

    def finish(self) -> dict[str, Any]:
        """Tells what shows only in all rows together; gives what was measured."""
        ...


@dataclass(frozen=True)
class Order:
    """What is to be checked, and with what."""

    paths: list[str]
    role: Role
    renderer: Renderer | None = None
    max_length: int | None = None
    settings: ReadSettings = field(default_factory=ReadSettings)
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """What was found."""

    role: Role
    files: list[FileReport]
    findings: list[Finding]
    measured: dict[str, Any]
    left_out: bytearray
    """By position among the good rows: whether a clean copy leaves the row out."""
    rejected: Sequence[RowProblem]
    """Why it does, and why bad rows are no good ones."""
    versions: dict[Path, Version]
    """Of the files that were read."""

    @property
    def has_errors(self) -> bool:
        """Whether training would refuse the data or go wrong on it."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)

    @property
    def incurable(self) -> list[Finding]:
        """Errors that leaving rows out does not mend."""
        kinds = (*NOT_OF_ROWS, *(kind for kind, rule in RULES.items() if not rule.is_left_out))
        return [one for one in self.findings if one.severity is Severity.ERROR and one.kind in kinds]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": 1,
            "role": str(self.role),
            "files": [asdict(file) for file in self.files],
            "good_rows": len(self.left_out),
            "counts": counts(self.findings),
            "findings": [finding.as_json() for finding in self.findings],
            "measured": self.measured,
        }


def guess_role(paths: Sequence[str], settings: ReadSettings) -> Role:
    """What the first readable file holds. Raises DataError when none has columns that align knows."""
    problems: list[Problem] = []
    for file in data_files(list(paths), settings.files):
        if isinstance(file, Problem):
            problems.append(file)
            continue
        try:
            return _held_in(file, settings)
        except FileFault as fault:
            problems.append(file_problem(file.name, fault))
    raise DataError(problems)


def _held_in(file: DataFile, settings: ReadSettings) -> Role:
    columns, sample, _ = survey(file.path)
    check_mapped(columns, settings.columns)
    columns, sample = renamed_columns(columns, settings.columns), [renamed(row, settings) for row in sample]
    for role in GUESSED:
        with suppress(FileFault):
            if detect(columns, sample, settings, role).kind is role:
                return role
    what = f"the columns {quoted(columns)} are not a shape that align knows" if columns else "no row can be read"
    raise FileFault(what, "with `--role` you hear what is missing")


def check(order: Order, advance: Advance, expect: Advance = unwatched) -> Checked:
    """Reads all files and looks at every row. `expect` is told once how many there are. Nothing that is wrong with them
    is raised."""
    findings = Findings()
    checks = _checks(order, findings)
    files = []
    versions: dict[Path, Version] = {}
    readers: list[FileRows] = []
    for file in _files(order, findings):
        with _noted(file, findings):
            versions[file.path] = version(file.path)
            readers.append(FileRows(file, order.settings, order.role))
    expect(sum(reader.num_rows for reader in readers))
    for reader in readers:
        with _noted(reader.file, findings):
            files.append(_check_file(reader, findings, checks, advance))
    measured: dict[str, Any] = {}
    for one in checks:
        measured |= one.finish()
    return Checked(order.role, files, findings.all(), measured, findings.left_out, findings.rejected, versions)


@contextmanager
def _noted(file: DataFile, findings: Findings) -> Iterator[None]:
    """What is wrong with a whole file is a finding."""
    try:
        yield
    except FileFault as fault:
        findings.note(FILE, Severity.ERROR, file_problem(file.name, fault))


def good_rows(order: Order, checked: Checked, advance: Advance) -> Iterator[Keyed]:
    """The good rows again, in the order of their positions and with the columns that are not read. Raises FileFault if
    a file is another one by now."""
    for file in _files(order, Findings()):
        refuse_change(file.path, checked.versions[file.path])
        for found in counted(FileRows(file, order.settings, order.role, keeps_others=True), advance):
            if not isinstance(found, RowProblem):
                yield found


def checks_of_rows(role: Role, findings: Findings) -> list[Check]:
    """The checks that need rows and nothing else."""
    checks: list[Check] = [Repeats(findings), Patterns(findings), Scripts(findings)]
    if role is Role.PREFERENCES:
        checks += [LengthBias(findings), Flipped(findings)]
    if role is Role.JUDGEMENTS:
        checks.append(SortedLabels(findings))
    return checks


def _checks(order: Order, findings: Findings) -> list[Check]:
    checks = checks_of_rows(order.role, findings)
    if order.renderer:
        checks.append(Tokens(findings, order.renderer, order.max_length))
    evaluated, contamination = read_evaluated(list(order.against))
    if evaluated and contamination:
        for problem in chain(evaluated.broken, evaluated.bad):
            findings.note(EVALUATION, Severity.ERROR, problem)
        checks.append(Leaks(findings, contamination))
    return checks


def _files(order: Order, findings: Findings) -> Iterator[DataFile]:
    seen: set[Path] = set()
    for file in data_files(order.paths, order.settings.files):
        if isinstance(file, Problem):
            findings.note(FILE, Severity.ERROR, file)
        elif file.path.resolve() in seen:
            problem = Problem(file.name, "the file is listed twice", "its rows would count double")
            findings.note(FILE, Severity.ERROR, problem)
        else:
            seen.add(file.path.resolve())
            yield file


def _check_file(reader: FileRows, findings: Findings, checks: Sequence[Check], advance: Advance) -> FileReport:
    ties: Spool[RowProblem] = Spool(RowProblem)
    for found in counted(reader, advance):
        if not isinstance(found, RowProblem):
            position = findings.new_row(found.row.source)
            for one in checks:
                one.add(position, found.row, found.key)
        elif found.kind == "tie":
            ties.append(found)
        else:
            findings.bad_row(found, Severity.ERROR if found.is_bad else Severity.WARNING)
    is_usual = len(ties) <= TIES_LEFT_OUT * reader.rows
    for tie in ties:
        findings.bad_row(tie, Severity.WARNING if is_usual else Severity.ERROR)
    return reader.report(is_held_out=False)
