"""The list whose older values are on disk."""

from __future__ import annotations

from array import array
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from align.data.rows import Demonstration, Preference
from align.data.spool import Picked, Spool

ROWS = [
    Preference([{"role": "user", "content": f"caf\u00e9 {number}"}], "a" * number, "", f"x:{number}")
    for number in range(50)
]


@given(st.integers(0, 5000))
def test_values_come_back_wherever_they_are(held: int) -> None:
    """All in memory, all on disk, or some of each."""
    spool = Spool(Preference, held)
    spool.extend(ROWS)
    assert list(spool) == ROWS
    assert spool[-1] == ROWS[-1] and spool[7] == ROWS[7]
    assert list(spool[3:40:5]) == ROWS[3:40:5]


def test_values_may_be_added_after_reading() -> None:
    """Reading does not move where the next value goes."""
    spool = Spool(Demonstration, 100)
    rows = [Demonstration([{"role": "user", "content": str(number)}], "x") for number in range(20)]
    for number, row in enumerate(rows):
        spool.append(row)
        assert spool[number // 2] == rows[number // 2]


def test_threads_may_read_at_once() -> None:
    """There is no position in the file that they would share."""
    spool = Spool(Preference, 100)
    spool.extend(ROWS * 20)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(spool.__getitem__, range(1000))) == ROWS * 20


def test_picked_values_are_those_of_the_numbers_in_their_order() -> None:
    """Slices and negative positions are those of the choice."""
    picked = Picked("abcdef", array("q", [4, 0, 0, 2]))
    assert list(picked) == ["e", "a", "a", "c"]
    assert picked[-1] == "c" and list(picked[1:3]) == ["a", "a"] and len(picked) == 4
