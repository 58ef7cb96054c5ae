"""Which rows of several sources make a mixture: chosen by their prompts, interleaved evenly, with nothing random."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Sequence
from fractions import Fraction

from align.recipe.data_settings import SourceSettings


def counts(available: Sequence[int], parts: Sequence[SourceSettings]) -> list[int]:
    """How many rows of each part are used. With weights w and n rows: floor(w min(n / w)), so that the part that is
    scarcest for its weight is used whole and no row twice. Else the fraction of each, at least one row.

    >>> counts([100, 100], [SourceSettings(path="a", weight=3), SourceSettings(path="b", weight=1)])
    [100, 33]
    """
    weights = [Fraction(part.weight) for part in parts if part.weight is not None]
    if len(weights) == len(parts):
        unit = min(Fraction(rows) / weight for rows, weight in zip(available, weights, strict=True))
        return [int(unit * weight) for weight in weights]
    return [max(1, round(rows * part.fraction)) if rows else 0 for rows, part in zip(available, parts, strict=True)]


def mixed(keys: Sequence[bytes], ranges: Sequence[range], parts: Sequence[SourceSettings]) -> array[int]:
    """Positions of the rows of a mixture. `ranges` are the positions of each part's rows, `keys` those of all.

    The rows of a part are chosen in the order of a hash of their prompts, so a larger count takes a smaller one's rows
    and more, and the order of a file matters only between rows of one prompt. The k-th of a part's n rows stands at
    (k + 1/2) / n of the whole, so the first rows of a mixture are a mixture too.
    """
    if len(parts) == 1 and parts[0].fraction == 1:
        return array("q", ranges[0])
    numbers = counts([len(positions) for positions in ranges], parts)
    streams = []
    for order, (positions, number) in enumerate(zip(ranges, numbers, strict=True)):
        chosen = sorted(sorted(positions, key=lambda position: _rank(keys[position]))[:number])
        streams.append([(Fraction(2 * k + 1, 2 * number), order, position) for k, position in enumerate(chosen)])
    return array("q", (position for _, _, position in heapq.merge(*streams)))


def _rank(key: bytes) -> bytes:
    """Independent of the split, which is by the key itself."""
    return hashlib.sha256(b"mixture" + key).digest()
