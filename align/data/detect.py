"""Which shape a file has, and the `columns` mapping that makes a private file have one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from align.data.faults import FileFault, escaped, quoted
from align.data.readers import RawRow
from align.data.shapes import SERVED_BY, SHAPES, Shape
from align.errors import Problem
from align.recipe.nearest import did_you_mean
from align.recipe.settings import Role

OUR_NAMES = [
    "prompt",
    "response",
    "chosen",
    "rejected",
    "messages",
    "system",
    "text",
    "instruction",
    "input",
    "output",
]
TAKEN_BY = {
    Role.CORPUS: "base takes text",
    Role.DEMONSTRATIONS: "sft takes demonstrations",
    Role.PREFERENCES: "reward and dpo take preferences",
    Role.PROMPTS: "ppo takes prompts",
}


def columns_of(rows: Iterable[RawRow]) -> list[str]:
    """Every column that some row has, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def mapping_problems(mapping: Mapping[str, str]) -> list[Problem]:
    """What is wrong with the names that `columns` gives, whatever the file."""
    problems = []
    for name in mapping:
        if name not in OUR_NAMES:
            what = f"{quoted([name])} is not a name that align knows"
            problems.append(Problem("data.columns", what, did_you_mean(name, OUR_NAMES)))
    return problems


def check_mapped(columns: list[str], mapping: Mapping[str, str]) -> None:
    """Raises FileFault unless the file has every column that `mapping` names."""
    for ours, theirs in mapping.items():
        if theirs not in columns:
            raise FileFault(
                f"there is no column {quoted([theirs])}, which `data.columns` names for `{ours}`",
                did_you_mean(theirs, map(escaped, columns)),
            )


def renamed(row: Mapping[str, object], mapping: Mapping[str, str]) -> RawRow:
    """The row under our names: mapped columns move, and win over a column that already has the name."""
    moved = {ours: row[theirs] for ours, theirs in mapping.items() if theirs in row}
    sources = {*mapping, *mapping.values()}
    return {**{name: value for name, value in row.items() if name not in sources}, **moved}


def detect(columns: list[str], mapping: Mapping[str, str], role: Role) -> Shape:
    """The one shape that serves `role` in a file with these columns (under our names). Raises FileFault.

    A file may have several shapes. The role picks the kind, a shape with more columns wins over one that has
    part of them, and then the columns mapped by hand decide. What is still ambiguous is an error.
    """
    fitting = [shape for shape in SHAPES if set(shape.columns) <= set(columns)]
    for kind in SERVED_BY[role]:
        candidates = [shape for shape in fitting if shape.kind is kind]
        candidates = [one for one in candidates if not any(_is_part(one, other) for other in candidates)]
        if len(candidates) > 1:
            most = max(_mapped(shape, mapping) for shape in candidates)
            candidates = [shape for shape in candidates if _mapped(shape, mapping) == most]
        if len(candidates) > 1:
            raise _ambiguous(candidates, role)
        if candidates:
            return candidates[0]
    raise _misspelt(columns, role) or _no_shape(columns, fitting, role)


def _is_part(one: Shape, other: Shape) -> bool:
    return set(one.columns) < set(other.columns)


def _mapped(shape: Shape, mapping: Mapping[str, str]) -> int:
    return sum(name in mapping for name in shape.columns)


def _ambiguous(candidates: list[Shape], role: Role) -> FileFault:
    columns = [name for shape in candidates for name in shape.columns]
    telling = next(name for name in columns if name in OUR_NAMES and columns.count(name) == 1)
    names = " or ".join(shape.name for shape in candidates)
    return FileFault(
        f"the columns can be read as {role} in several ways: {names}",
        f"choose with `columns`, for example `columns: {{{telling}: {telling}}}`, or remove the others",
    )


def _misspelt(columns: list[str], role: Role) -> FileFault | None:
    for shape in (shape for kind in SERVED_BY[role] for shape in SHAPES if shape.kind is kind):
        missing = [name for name in shape.columns if name not in columns]
        others = [name for name in columns if name not in shape.columns]
        near = {name: difflib.get_close_matches(name, others, n=1, cutoff=0.8) for name in missing}
        if all(near.values()):
            theirs = [match[0] for match in near.values()]
            mapping = ", ".join(f"{ours}: {match[0]}" for ours, match in near.items())
            return FileFault(
                f"there is no column {quoted(missing)}, but there is {quoted(theirs)}",
                f"rename it, or set `columns: {{{mapping}}}`",
            )
    return None


def _no_shape(columns: list[str], fitting: list[Shape], role: Role) -> FileFault:
    wanted = " | ".join(shape.name for shape in SHAPES if shape.kind is role)
    if fitting:
        shape = max(fitting, key=lambda shape: len(shape.columns))
        held = "text" if shape.kind is Role.CORPUS else shape.kind
        what = f"the file holds {held} ({shape.name}), not {role}"
        return FileFault(what, f"{TAKEN_BY[shape.kind]}; {role} have {wanted}")
    return FileFault(
        f"the columns {quoted(columns)} are not a shape of {role}",
        f"wanted {wanted}; name yours with `columns: {{our name: their column}}`",
    )
