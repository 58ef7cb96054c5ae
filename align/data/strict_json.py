"""JSON read strictly: what the standard decoder lets pass silently is a fault here."""

from __future__ import annotations

import json
import re

from align.data.faults import RowFault, quoted

LONGEST_INTEGER = 18
"""Digits that always fit 64 bits; longer numbers become other numbers in most tools."""

SPACE = re.compile(r"[ \t\n\r]*")


class StrictDecoder:
    """Notices a key given twice, NaN and infinities, and whole numbers over 64 bits; one decoder reads one file."""

    def __init__(self) -> None:
        self._faults: list[RowFault] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs, parse_constant=self._constant, parse_int=self._integer
        )

    def decode(self, text: str, start: int) -> tuple[object, int]:
        """The value that starts at `start` and where it ends. Raises ValueError; `check` raises the rest."""
        self._faults.clear()
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def check(self) -> None:
        """Raises what was wrong with the last value although it was JSON."""
        if self._faults:
            raise self._faults[0]

    def _pairs(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._faults.append(
                RowFault("key given twice", f"the key {quoted([twice])} is given twice", "keep one of them")
            )
        return values

    def _integer(self, digits: str) -> int:
        if len(digits) > LONGEST_INTEGER:
            self._faults.append(
                RowFault("number too long", f"{digits[:24]} does not fit 64 bits", "write it as text, or round it")
            )
            return 0
        return int(digits)

    def _constant(self, name: str) -> None:
        self._faults.append(RowFault("not JSON", f"{name} is not a JSON value", "write a number or null"))


def skip_space(text: str, at: int) -> int:
    """The position of the first character from `at` on that is not JSON's white space."""
    match = SPACE.match(text, at)
    return match.end() if match else at


def place(text: str, at: int) -> str:
    """A position in a text, in words."""
    line_start = text.rfind("\n", 0, at) + 1
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - line_start + 1}"


def reason(error: ValueError) -> str:
    """What the decoder says is wrong, without the position."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def position(error: ValueError, start: int) -> int:
    """Where the decoder stopped; `start` when it does not say."""
    return error.pos if isinstance(error, json.JSONDecodeError) else start
