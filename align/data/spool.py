"""A long list that does not have to fit in memory: the newest values are held, older ones are in a temporary file."""

from __future__ import annotations

import marshal
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")

HELD = 64 * 2**20
"""Bytes held in memory before they go to the file: most data never touches the disk."""


class Spool(Sequence[T]):
    """Append-only. A value is a dataclass or a tuple of plain fields (text, numbers, lists, dicts); `kind` makes it of
    them.

    Memory: at most `held` bytes, and 8 for each value. The file has no name, so nothing is left behind.
    """

    def __init__(self, kind: Callable[..., T], held: int = HELD):
        self._kind = kind
        self._held = held
        self._ends = array("q")
        self._memory = bytearray()
        self._file = None
        self._on_disk = 0

    def append(self, value: T) -> None:
        """Adds a value at the end."""
        self._memory += marshal.dumps(tuple(_fields(value)))  # type: ignore[arg-type]
        self._ends.append(self._on_disk + len(self._memory))
        if len(self._memory) > self._held:
            self._spill()

    def extend(self, values: Iterable[T]) -> None:
        """Adds values at the end."""
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Picked(self, array("q", range(len(self))[index]))
        number = range(len(self))[index]
        start, end = self._ends[number - 1] if number else 0, self._ends[number]
        return self._kind(*marshal.loads(self._bytes(start, end)))  # our own bytes, of this process

    def _bytes(self, start: int, end: int) -> bytes | bytearray:
        if self._file is None or start >= self._on_disk:
            return self._memory[start - self._on_disk : end - self._on_disk]
        return os.pread(self._file.fileno(), end - start, start)  # has no position that threads could share

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="align-")  # noqa: SIM115  # open as long as the list is
        self._file.write(self._memory)
        self._file.flush()
        self._on_disk += len(self._memory)
        self._memory.clear()


class Picked(Sequence[T], Generic[T]):
    """Some values of a list, by their numbers and in that order; nothing is copied."""

    def __init__(self, values: Sequence[T], numbers: array[int]):
        self._values = values
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Picked(self._values, self._numbers[index])
        return self._values[self._numbers[index]]

    def __iter__(self) -> Iterator[T]:
        return (self._values[number] for number in self._numbers)


def _fields(value: object) -> Iterable[object]:
    """The fields of a dataclass in order, or the items of a named tuple."""
    return value if isinstance(value, tuple) else vars(value).values()
