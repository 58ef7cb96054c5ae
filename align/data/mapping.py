"""The `columns` and `roles` that make a private file have one of the shapes that align knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.faults import FileFault, escaped, quoted
from align.data.public import SHAPES
from align.data.readers import RawRow
from align.data.shapes import PAIR, STARTS
from align.errors import Problem
from align.recipe.data_settings import ReadSettings
from align.recipe.nearest import did_you_mean

MESSAGE_KEYS = {"messages.role": "role", "messages.content": "content"}
"""Names in `columns` for the keys of a message, in whatever column."""

OUR_NAMES = list(dict.fromkeys(name for shape in SHAPES for name in (*shape.columns, *shape.optional)))
"""The names that shapes give to columns."""


def mapping_problems(settings: ReadSettings, where: str) -> list[Problem]:
    """What is wrong with the names that `columns` gives, whatever the file. `where` is the settings' dotted key."""
    problems = []
    known = [*OUR_NAMES, *MESSAGE_KEYS]
    for name in settings.columns:
        if name not in known:
            what = f"{quoted([name])} is not a name that align knows"
            problems.append(Problem(f"{where}.columns", what, did_you_mean(name, known)))
    return problems


def check_mapped(columns: Sequence[str], mapping: Mapping[str, str]) -> None:
    """Raises FileFault unless the file has every column that `mapping` names."""
    for ours, theirs in mapping.items():
        if ours not in MESSAGE_KEYS and theirs not in columns and theirs.split(".")[0] not in columns:
            raise FileFault(
                f"there is no column {quoted([theirs])}, which `data.columns` names for `{ours}`",
                did_you_mean(theirs, map(escaped, columns)),
            )


def renamed_columns(columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    """The columns of a file under our names."""
    named = {ours: theirs for ours, theirs in mapping.items() if ours not in MESSAGE_KEYS}
    return [name for name in columns if name not in {*named, *named.values()}] + list(named)


def renamed(row: RawRow, settings: ReadSettings) -> RawRow:
    """The row under our names: mapped columns move, and win over a column that already has the name."""
    keys = {theirs: MESSAGE_KEYS[ours] for ours, theirs in settings.columns.items() if ours in MESSAGE_KEYS}
    mapping = {ours: theirs for ours, theirs in settings.columns.items() if ours not in MESSAGE_KEYS}
    if mapping:
        found = {ours: _found(row, theirs) for ours, theirs in mapping.items()}
        moved = {ours: value for ours, value in found.items() if value is not ABSENT}
        sources = {*mapping, *mapping.values()}
        row = {**{name: value for name, value in row.items() if name not in sources}, **moved}
    if keys or settings.roles:
        row = {name: _messages(value, keys, settings.roles) for name, value in row.items()}
    return _with_prompt(row) if settings.implicit_prompt else row


def _with_prompt(row: RawRow) -> RawRow:
    """Two texts as conversations whose prompt is what both begin with, up to the last white space. Others, and those
    that have no prompt in common, as they are."""
    chosen, rejected = (row.get(side) for side in PAIR)
    if "prompt" in row or not isinstance(chosen, str) or not isinstance(rejected, str) or chosen.startswith(STARTS):
        return row
    pairs = enumerate(zip(chosen, rejected, strict=False))
    same = next((place for place, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    prompt = re.match(r".*(?=\s)", chosen[:same], re.DOTALL)
    if prompt is None or not prompt[0].strip():
        return row
    asked = {"role": "user", "content": prompt[0]}
    texts = {"chosen": chosen[prompt.end() :], "rejected": rejected[prompt.end() :]}
    return row | {side: [asked, {"role": "assistant", "content": said}] for side, said in texts.items()}


ABSENT = object()


def _found(row: Mapping[str, Any], name: str) -> object:
    """A column, or with dots a value inside one: `question.full_text`."""
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first)
    return _found(inner, rest) if dot and isinstance(inner, Mapping) else ABSENT


def _messages(value: Any, keys: Mapping[str, str], roles: Mapping[str, str]) -> Any:
    """A column's messages with our keys and roles; any other value as it is."""
    if isinstance(value, list):
        return [_messages(item, keys, roles) for item in value]
    if not isinstance(value, dict):
        return value
    message = {keys.get(key, key): item for key, item in value.items()}
    for key in ("role", "from"):
        if isinstance(message.get(key), str):
            message[key] = roles.get(message[key], message[key])
    return message
