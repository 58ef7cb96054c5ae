"""A bar on the terminal while many rows are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

AT_ONCE = 500
"""Rows between two reports of progress."""
T = TypeVar("T")
Advance = Callable[[int], None]
"""Is told how many more rows were read, or are to be read."""


def unwatched(number: int) -> None:
    """Tells nobody."""


@contextmanager
def progress(what: str) -> Iterator[tuple[Advance, Advance]]:
    """A bar on stderr, on terminals only, that goes away at the end; gives what moves it on by a number of rows, and
    what adds to how many there are: before that it only shows that something is done. Of several processes of a stage
    the first shows it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    console = Console(stderr=True)
    is_shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    total = 0

    def expect(number: int) -> None:
        nonlocal total
        total += number
        bar.update(task, total=total)

    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda number: bar.advance(task, number), expect


def counted(rows: Iterable[T], advance: Advance) -> Iterator[T]:
    """The rows, with a report of progress now and then."""
    number = 0
    for number, row in enumerate(rows, start=1):
        if number % AT_ONCE == 0:
            advance(AT_ONCE)
        yield row
    advance(number % AT_ONCE)
