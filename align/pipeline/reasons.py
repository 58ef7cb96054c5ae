"""Why a stage is out of date, field by field, in the words a user would use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align.pipeline.fingerprint import SOURCE
from align.records import canonical_json

UNSET = "unset"
AREAS = ("kind", "version", "config", "seed", "data", "inputs", "evaluation")


@dataclass(frozen=True)
class Change:
    """One difference between two identities; `path` is dotted."""

    path: str
    old: Any
    new: Any


def changes(old: Mapping[str, Any], new: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """What differs between two identities of a stage. `sources` says where each input comes from now."""
    found = sorted(_differences(old, new), key=_order)
    renamed = {f"{change.path}{SOURCE}" for change in found}
    return [_say(change, sources) for change in found if change.path not in renamed]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """Goes into what is a mapping on both sides: what came or went as a whole is one change. Lists are values."""
    for key in sorted({*old, *new}):
        path, before, after = f"{prefix}{key}", old.get(key, UNSET), new.get(key, UNSET)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{path}.")
        elif before != after:
            yield Change(path, before, after)


def _say(change: Change, sources: Mapping[str, str]) -> str:
    path, old, new = change.path, change.old, change.new
    area, _, rest = path.partition(".")
    name = rest if area == "config" else path
    if area == "inputs":
        if rest not in sources:
            return f"input {rest}: removed"
        return f"input {rest} ({sources[rest]}): {'added' if old == UNSET else 'changed'}"
    if path == "version":
        return f"the stage itself changed: version {old} -> {new}"
    if isinstance(old, Mapping) or isinstance(new, Mapping):
        return f"{name}: {'added' if isinstance(new, Mapping) else 'removed'}"
    if path.endswith("data.content"):
        return f"{name.removesuffix('.content')}: content changed ({_short(old)} -> {_short(new)})"
    if path.endswith(SOURCE):
        return f"{name.removesuffix(SOURCE)}: source changed ({_short(old)} -> {_short(new)})"
    return f"{name}: {_shown(old)} -> {_shown(new)}"


def _order(change: Change) -> tuple[int, str]:
    area = change.path.partition(".")[0]
    return (AREAS.index(area) if area in AREAS else len(AREAS), change.path)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else canonical_json(value)


def _short(digest: Any) -> str:
    return str(digest)[:8]
