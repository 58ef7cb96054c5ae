"""Why a stage is out of date, field by field, in the words a user would use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.records import canonical_json

ABSENT = "unset"


def changes(old: Mapping[str, Any], new: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """What differs between two identities of a stage. `sources` says where each input slot comes from now."""
    before, after = _flat(old), _flat(new)
    paths = sorted({*before, *after}, key=_order)
    return [
        _say(path, before.get(path, ABSENT), after.get(path, ABSENT), sources)
        for path in paths
        if before.get(path, ABSENT) != after.get(path, ABSENT)
    ]


def _say(path: str, old: Any, new: Any, sources: Mapping[str, str]) -> str:
    area, _, rest = path.partition(".")
    if area == "inputs":
        return f"input {rest} ({sources.get(rest, 'none')}): changed"
    if path == "version":
        return f"the stage itself changed: version {old} -> {new}"
    if path.endswith("data.content"):
        return f"{path.removesuffix('.content')}: content changed ({_short(old)} -> {_short(new)})"
    if path == "evaluation.gold_source":
        return f"evaluation.gold: its source changed ({_short(old)} -> {_short(new)})"
    name = rest if area == "config" else path
    return f"{name}: {_shown(old)} -> {_shown(new)}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}. Lists are values; an empty mapping is one too."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _order(path: str) -> tuple[int, str]:
    areas = ("kind", "version", "config", "seed", "data", "inputs", "evaluation")
    area = path.partition(".")[0]
    return (areas.index(area) if area in areas else len(areas), path)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else canonical_json(value)


def _short(digest: Any) -> str:
    return str(digest)[:8]
