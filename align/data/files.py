"""One file to canonical rows, one at a time, each with the key it is split by."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from align.data.canonical import canonical
from align.data.detect import detect
from align.data.faults import FileFault, LeftOut, RowFault
from align.data.mapping import check_mapped, renamed, renamed_columns
from align.data.messages import optional_text, with_system
from align.data.readers import RawRow, read, survey
from align.data.rows import Judgement, Preference, Row
from align.data.shapes import Grouped, Item, Parsed, Shape
from align.data.sources import DataFile
from align.data.split import digest, prompt_key, text_key
from align.data.spool import Spool
from align.data.streams import refuse_change, version
from align.errors import Problem
from align.recipe.data_settings import ReadSettings, Role

NOT_TEXT = ("images", "videos", "audios", "tools")
"""Columns that change what a row says: they may be there, but not be filled."""
NOTHING = (None, "", "[]", [], {}, "null")


class Keyed(NamedTuple):
    """A row and the key of its prompt."""

    row: Row
    key: bytes
    others: Mapping[str, object]
    """Columns of the file that are not read, if they are kept; none where several rows became one."""


@dataclass(frozen=True)
class RowProblem(Problem):
    """Why a row is not there; `kind` is what it is counted under."""

    kind: str = ""
    is_bad: bool = True
    """Whether it is an error unless `on_bad` is skip; else the row is left out in any case."""


@dataclass(frozen=True)
class FileReport:
    """What was found in one file. `shape` is empty when no row could be read."""

    name: str
    shape: str
    data_set: str
    """The public data set that has this shape, if one does."""
    rows: int
    kept: int
    """Canonical rows made of them: in most shapes one each."""
    blank_lines: int
    ignored_columns: list[str]
    is_held_out: bool


class FileRows:
    """The rows of one file. Making it finds the shape and reads the file once; iterating reads it again.

    Both raise FileFault when the file cannot be used at all. What is wrong with a row comes in its place.
    """

    def __init__(self, file: DataFile, settings: ReadSettings, role: Role, *, keeps_others: bool = False):
        self.file = file
        self.role = role
        self.rows = self.kept = self.blank_lines = 0
        self._settings = settings
        self._columns, sample, self.num_rows = survey(file.path)
        self._version = version(file.path)
        self.shape: Shape | None = None
        if self._columns:
            check_mapped(self._columns, settings.columns)
            ours = renamed_columns(self._columns, settings.columns)
            self.shape = detect(ours, [renamed(row, settings) for row in sample], settings, role)
        self._pairs: defaultdict[bytes, float] = defaultdict(float)
        self._filled = [name for name in NOT_TEXT if name in self._columns]
        self._others = self._ignored() if keeps_others else ()

    def __iter__(self) -> Iterator[Keyed | RowProblem]:
        refuse_change(self.file.path, self._version)
        self.rows = self.kept = self.blank_lines = 0
        self._pairs = defaultdict(float)
        faults: set[str] = set()
        num_faults, hint = 0, ""
        for number, found in self._found():
            if isinstance(found, RowFault):
                num_faults += 1
                hint = found.hint
                if len(faults) < 2:
                    faults.add(found.what)
                where = f"{self.file.name}:{number}"
                yield RowProblem(where, found.what, found.hint, found.kind, not isinstance(found, LeftOut))
            else:
                self.kept += 1
                yield found
        if not self.kept and len(faults) == 1 and num_faults == self.rows > 1:
            raise FileFault(f"in all {self.rows} rows, {faults.pop()}", hint)

    def report(self, is_held_out: bool) -> FileReport:
        """What was found, once all rows were read."""
        name, data_set = (self.shape.name, self.shape.data_set) if self.shape else ("", "")
        return FileReport(
            self.file.name, name, data_set, self.rows, self.kept, self.blank_lines, self._ignored(), is_held_out
        )

    def _ignored(self) -> list[str]:
        """The columns, under their names in the file, that the shape does not read."""
        mapping = self._settings.columns
        ours = (*self.shape.columns, *self.shape.optional) if self.shape else ()
        used = {mapping.get(name, name) for name in ours}
        return [name for name in self._columns if not any(name in (one, one.split(".")[0]) for one in used)]

    def _found(self) -> Iterator[tuple[int, Keyed | RowFault]]:
        if self.shape is None:  # no row could be read
            return ((number, fault) for number, fault in self._raw() if isinstance(fault, RowFault))
        if isinstance(self.shape.parse, Grouped):
            return self._grouped(self.shape, self.shape.parse)
        return self._plain(self.shape, self.shape.parse)

    def _raw(self) -> Iterator[tuple[int, RawRow | RowFault]]:
        for number, row in read(self.file.path):
            if row is None:
                self.blank_lines += 1
                continue
            self.rows += 1
            yield number, renamed(row, self._settings) if isinstance(row, dict) else row

    def _plain(self, shape: Shape, parse: Callable[[RawRow], Parsed]) -> Iterator[tuple[int, Keyed | RowFault]]:
        for number, row in self._raw():
            try:
                values = self._checked(row)
                parsed = parse(values)
                system = optional_text(values, "system") if "system" in shape.optional else None
            except RowFault as fault:
                yield number, fault
                continue
            asked = with_system(parsed.prompt, system)
            others = {name: values[name] for name in self._others if name in values}
            yield from self._keyed(shape, replace(parsed, prompt=asked), number, others)

    def _grouped(self, shape: Shape, grouped: Grouped) -> Iterator[tuple[int, Keyed | RowFault]]:
        """Rows of a shape whose rows belong together: checked and kept, then put together by their keys."""
        items: Spool[tuple[int, Item]] = Spool(lambda *fields: fields)  # type: ignore[arg-type]
        groups: dict[bytes, array[int]] = {}
        for number, row in self._raw():
            try:
                key, item = grouped.read(self._checked(row))
            except RowFault as fault:
                yield number, fault
                continue
            groups.setdefault(digest(key), array("q")).append(len(items))
            items.append((number, item))
        for positions in groups.values():
            for number, parsed in grouped.assemble([items[position] for position in positions]):
                if isinstance(parsed, RowFault):
                    yield number, parsed
                else:
                    yield from self._keyed(shape, parsed, number)

    def _checked(self, row: RawRow | RowFault) -> RawRow:
        """A row that could be read and holds nothing but text. Raises RowFault."""
        if isinstance(row, RowFault):
            raise row
        for name in self._filled:
            if row.get(name) not in NOTHING:
                raise RowFault("not only text", f"`{name}` is not empty", "align trains on text without it")
        return row

    def _keyed(
        self, shape: Shape, parsed: Parsed, number: int, others: Mapping[str, object] = MappingProxyType({})
    ) -> Iterator[tuple[int, Keyed | RowFault]]:
        key = digest(prompt_key(parsed.prompt) if parsed.prompt else text_key(parsed.answers[0]))
        parsed = replace(parsed, prompt=with_system(parsed.prompt, self._settings.system))
        for place, row in canonical(parsed, shape, self.role, self._settings.pairs, self.file.name, number):
            found = row if isinstance(row, RowFault) else self._unwanted(row, parsed, shape, key)
            yield place, found or Keyed(row, key, others)  # type: ignore[arg-type]

    def _unwanted(self, row: Row, parsed: Parsed, shape: Shape, key: bytes) -> LeftOut | None:
        """Why a row that was made of a pair is left out, by `score_ratio` or `pairs_per_prompt`."""
        if shape.kind is not Role.PREFERENCES or not isinstance(row, Preference | Judgement):
            return None
        least, most = self._settings.score_ratio, self._settings.pairs_per_prompt or shape.pairs_per_prompt
        if parsed.ratio is not None and parsed.ratio < least:
            return LeftOut("close scores", f"`score_ratio` is {parsed.ratio:g}, below {least:g}")
        if most is not None:
            self._pairs[key] += 1 if isinstance(row, Preference) else 0.5  # a pair is two judgements
            if self._pairs[key] > most:
                return LeftOut("many pairs", f"its prompt has {most} pairs already")
        return None
