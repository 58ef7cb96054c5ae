"""Rows that are nearly the same, without keeping their texts: MinHash (Broder 1997) over runs of words."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import eq
from random import Random
from zlib import crc32

from align.data.checking.index import Index

RUN = 5
"""Words that are hashed together."""
SHORT = 20
"""Words of a text below which it is one run: a changed word in the middle of it would change a quarter of its runs."""
BINS = 32
"""Hashes that are kept of each of the two parts of a row."""
BANDS = 8
"""Two rows are compared if all hashes of one of so many groups agree."""
ALIKE = 0.8
"""Share of the runs of words of two texts that both have (Jaccard), as estimated, from which on they are alike."""
NONE = 2**32
MIX = 0x9E3779B1
"""An odd number that spreads hashes."""
PROBES = [Random(place).sample(range(BINS), BINS) for place in range(BINS)]
"""For each bin the order in which others lend to it."""


class Near:
    """The first of the rows that each row is nearly the same as. 128 bytes a row, and each is compared with few others,
    however many rows are alike."""

    def __init__(self) -> None:
        self._bands = [Index() for _ in range(BANDS)]
        self._marks = bytearray()

    def add(self, asked: Sequence[str], answers: Sequence[str]) -> None:
        """Adds a row. Both parts must be like those of another row: answers to one long prompt are not alike for it."""
        parts = (signature(asked), signature(answers))
        for number, band in enumerate(self._bands):
            band.add_hash(hash((*parts[0][number::BANDS], *parts[1][number::BANDS])))
        for part in parts:
            self._marks += bytes(value & 0xFF for value in part)

    def twins(self) -> array[int]:
        """For each row the first one that it is nearly the same as, -1 where there is none. Of two rows that are alike
        in a share J of both parts, 1 - (1 - J^8)^8 are compared: 99 % at 0.9."""
        found = array("q", [-1]) * (len(self._marks) // (2 * BINS))
        for band in self._bands:
            for position, first in enumerate(band.firsts()):
                if first != position and found[position] < 0 and self._are_alike(position, first):
                    found[position] = first
        return found

    def _are_alike(self, one: int, other: int) -> bool:
        """One byte of each hash is compared: by chance, one in 256 agrees."""
        parts = ((2 * one, 2 * other), (2 * one + 1, 2 * other + 1))
        return all(sum(map(eq, self._part(a), self._part(b))) >= ALIKE * BINS for a, b in parts)

    def _part(self, number: int) -> bytearray:
        return self._marks[number * BINS : (number + 1) * BINS]


def signature(texts: Sequence[str]) -> list[int]:
    """The least hash of the runs of words in each of BINS bins. Two signatures agree in about the share of runs that
    both have. The same run counts as another one in another text of the list.

    A bin without a run borrows the hash of another one, found by a walk of its own (optimal densification: Shrivastava
    2017), so that short texts are estimated as well as long ones.
    """
    least = [NONE] * BINS
    for number, text in enumerate(texts):
        words = text.lower().split()
        runs = zip(*(words[start:] for start in range(RUN)), strict=False) if len(words) >= SHORT else [words]
        for run in map(" ".join, runs):
            value = crc32(run.encode(), number) * MIX % NONE
            if value < least[value % BINS]:
                least[value % BINS] = value
    if not texts:
        return least
    return [
        value if value != NONE else least[next(other for other in PROBES[place] if least[other] != NONE)]
        for place, value in enumerate(least)
    ]
