"""Which shape a file has."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from align.data.faults import FileFault, quoted
from align.data.mapping import OUR_NAMES
from align.data.public import SERVED_BY, SHAPES
from align.data.readers import RawRow
from align.data.shapes import Shape
from align.recipe.data_settings import ReadSettings, Role
from align.recipe.nearest import did_you_mean

TAKEN_BY = {
    Role.CORPUS: "base takes text",
    Role.DEMONSTRATIONS: "sft takes demonstrations",
    Role.PREFERENCES: "reward, dpo and kto take preferences",
    Role.JUDGEMENTS: "kto takes judgements",
    Role.PROMPTS: "ppo takes prompts",
}


def detect(columns: Sequence[str], sample: Sequence[RawRow], settings: ReadSettings, role: Role) -> Shape:
    """The one shape that serves `role` in a file with these columns (under our names). Raises FileFault.

    A file may have several shapes. The role picks the kind, a shape with more columns wins over one that has
    part of them, and then the columns mapped by hand decide. What is still ambiguous is an error. `sample` are some
    rows, for shapes that are told by their values.
    """
    fitting = [shape for shape in SHAPES if set(shape.columns) <= set(columns) and _tells(shape, sample)]
    for kind in SERVED_BY[role]:
        candidates = _by_score([shape for shape in fitting if shape.kind is kind], settings.score)
        candidates = [one for one in candidates if not any(_is_part(one, other) for other in candidates)]
        if len(candidates) > 1:
            most = max(_mapped(shape, settings) for shape in candidates)
            candidates = [shape for shape in candidates if _mapped(shape, settings) == most]
        if len(candidates) > 1:
            raise _ambiguous(candidates, role)
        if candidates:
            _refuse_bad_answers(candidates[0], fitting, settings, role)
            return candidates[0]
    raise _misspelt(columns, role) or _no_shape(columns, fitting, role)


def _tells(shape: Shape, sample: Sequence[RawRow]) -> bool:
    return all(any(tell(row.get(name)) for row in sample) for name, tell in shape.telling.items())


def _by_score(candidates: list[Shape], score: str | None) -> list[Shape]:
    """Of the shapes of a data set that read one score each, the one asked for, or the first. Raises FileFault when the
    file has no such score."""
    scores = [shape.score for shape in candidates if shape.score]
    if score is not None and candidates:
        if score not in scores:
            hint = did_you_mean(score, scores) or (f"there is: {', '.join(scores)}" if scores else "remove `score`")
            raise FileFault(f"`score` is {score}, which the file does not have", hint)
        return [shape for shape in candidates if shape.score == score]
    first = {(shape.data_set, bool(shape.score)): shape for shape in reversed(candidates)}
    return [shape for shape in candidates if not shape.score or shape is first[shape.data_set, True]]


def _is_part(one: Shape, other: Shape) -> bool:
    """Whether `other` reads all that `one` needs, and needs something that `one` does not read."""
    return _reads(other, one) and not _reads(one, other)


def _reads(shape: Shape, other: Shape) -> bool:
    return set(other.columns) <= {*shape.columns, *shape.optional}


def _mapped(shape: Shape, settings: ReadSettings) -> int:
    return sum(name in settings.columns for name in shape.columns)


def _refuse_bad_answers(shape: Shape, fitting: list[Shape], settings: ReadSettings, role: Role) -> None:
    """Answers that were judged, some of them bad, are no demonstrations unless somebody says so."""
    judged = [one for one in fitting if one.kind is Role.JUDGEMENTS and set(shape.columns) < set(one.columns)]
    if role is Role.DEMONSTRATIONS and judged and not _mapped(shape, settings):
        raise FileFault(
            f"the file holds judgements ({judged[0].name}), so some answers are bad ones",
            "keep the good rows and remove `label`, or take all with `columns: {prompt: prompt}`",
        )


def _ambiguous(candidates: list[Shape], role: Role) -> FileFault:
    columns = [name for shape in candidates for name in shape.columns]
    telling = next(name for name in columns if name in OUR_NAMES and columns.count(name) == 1)
    names = " or ".join(shape.name for shape in candidates)
    return FileFault(
        f"the columns can be read as {role} in several ways: {names}",
        f"choose with `columns`, for example `columns: {{{telling}: {telling}}}`, or remove the others",
    )


def _general(role: Role) -> list[Shape]:
    return [shape for shape in SHAPES if shape.kind is role and not shape.data_set]


def _misspelt(columns: Sequence[str], role: Role) -> FileFault | None:
    for shape in (shape for kind in SERVED_BY[role] for shape in _general(kind)):
        missing = [name for name in shape.columns if name not in columns]
        others = [name for name in columns if name not in shape.columns]
        near = {name: difflib.get_close_matches(name, others, n=1, cutoff=0.8) for name in missing}
        if near and all(near.values()):
            theirs = [match[0] for match in near.values()]
            mapping = ", ".join(f"{ours}: {match[0]}" for ours, match in near.items())
            return FileFault(
                f"there is no column {quoted(missing)}, but there is {quoted(theirs)}",
                f"rename it, or set `columns: {{{mapping}}}`",
            )
    return None


def _no_shape(columns: Sequence[str], fitting: list[Shape], role: Role) -> FileFault:
    wanted = " | ".join(shape.name for shape in _general(role))
    if fitting:
        shape = max(fitting, key=lambda shape: len(shape.columns))
        held = "text" if shape.kind is Role.CORPUS else shape.kind
        what = f"the file holds {held} ({shape.name}), not {role}"
        return FileFault(what, f"{TAKEN_BY[shape.kind]}; {role} have {wanted}")
    return FileFault(
        f"the columns {quoted(columns)} are not a shape of {role}",
        f"wanted {wanted}; name yours with `columns: {{our name: their column}}`",
    )
