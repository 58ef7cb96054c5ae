"""What readers and checks raise. They know what is wrong but not where: the caller adds the file and row."""

from __future__ import annotations

import json
from collections.abc import Sequence


class RowFault(Exception):
    """One row is wrong. `kind` is what rows with the same fault are counted under."""

    def __init__(self, kind: str, what: str, hint: str = ""):
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.hint = hint


class LeftOut(RowFault):
    """Nothing is wrong with the row, but it teaches nothing: left out and counted, whatever `on_bad` is."""


class FileFault(Exception):
    """The file cannot be used at all; `row` is where that showed, when it showed in a row."""

    def __init__(self, what: str, hint: str = "", row: int | None = None):
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.row = row


def show(value: object) -> str:
    """A value from a file as one short line of ASCII: no file can write escape codes to the terminal."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def escaped(name: str) -> str:
    """A name from a file as ASCII without control characters."""
    return json.dumps(name)[1:-1]


def quoted(names: Sequence[str]) -> str:
    """`a`, `b` and so on."""
    return ", ".join(f"`{escaped(name)}`" for name in names)


def type_name(value: object) -> str:
    """What a JSON value is, in words."""
    words = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        bytes: "binary",
    }
    kind = str if isinstance(value, str) else type(value)
    return "null" if value is None else words.get(kind, kind.__name__)
