"""The nearest valid name, for every message that says no to a name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None when none is like it."""
    by_lower = {option.lower(): option for option in options}
    matches = get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The hint of a Problem: the nearest option, or all of them when none is near."""
    options = list(options)
    match = nearest(name, options)
    if match:
        return f"did you mean `{match}`?"
    return f"there is: {', '.join(options)}" if options else ""
