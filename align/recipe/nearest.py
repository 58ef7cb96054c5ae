"""The nearest valid name, for every message that says no to a name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, or None when none is like it. Of several that are like it, one with more of its
    words: `max_new_tokens` is rather `max_response_tokens` than `max_staleness`."""
    by_lower = {option.lower(): option for option in options}
    words = set(name.lower().split("_"))
    matches = get_close_matches(name.lower(), by_lower)  # the most alike first, which `max` keeps among equals
    best = max(matches, key=lambda match: len(words.intersection(match.split("_"))), default=None)
    return None if best is None else by_lower[best]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The hint of a Problem: the nearest option, or all of them when none is near."""
    options = list(options)
    match = nearest(name, options)
    if match:
        return f"did you mean `{match}`?"
    return f"there is: {', '.join(options)}" if options else ""
