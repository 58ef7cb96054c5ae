"""Which rows of many are equal in some respect, without keeping their texts."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby

from align.data.split import digest
from align.records import canonical_json


class Index:
    """One 64-bit hash for each entry: 8 bytes, and while it is sorted about 80. That two of a million different
    entries share one has a probability of 3e-8."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, *parts: object) -> None:
        """Adds an entry, which is equal to others with the same parts."""
        self.add_hash(int.from_bytes(digest(canonical_json(parts))[-8:]))

    def add_hash(self, value: int) -> None:
        """Adds an entry that is equal to others with the same hash."""
        self._hashes.append(value % 2**64)

    def firsts(self) -> array[int]:
        """For each position, the first one with an equal entry: its own, where it is new."""
        found = array("q", range(len(self._hashes)))
        for members in self._groups():
            for member in members:
                found[member] = members[0]
        return found

    def opposites(self, sides: Sequence[int]) -> array[int]:
        """For each position, the first one with an equal entry on the other side; -1 where there is none. `sides` has
        0 or 1 for each entry."""
        found = array("q", [-1]) * len(self._hashes)
        for members in self._groups():
            first = {sides[member]: member for member in reversed(members)}
            if len(first) == 2:
                for member in members:
                    found[member] = first[1 - sides[member]]
        return found

    def _groups(self) -> Iterator[list[int]]:
        """The positions of equal entries, in order, where there are several."""
        order = sorted(range(len(self._hashes)), key=self._hashes.__getitem__)
        for _, members in groupby(order, key=self._hashes.__getitem__):
            group = list(members)
            if len(group) > 1:
                yield group
