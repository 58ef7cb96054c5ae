"""What a person sees while a stage runs: a rich bar with the numbers that matter, or a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0


class StageProgress:
    """Progress of one stage. On a terminal a live bar; elsewhere one line every 15 seconds."""

    def __init__(self, stage: str, total: int, unit: str, *, enabled: bool = True):
        self._console = Console(stderr=True, quiet=not enabled)
        self._stage, self._total, self._unit = stage, total, unit
        self._live = self._console.is_terminal
        self._printed_at = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(stage, total=total, numbers="")

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: int, **numbers: float) -> None:
        """Moves to `step` and shows the given numbers."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._live:
            self._bar.update(self._task, completed=step, numbers=text or self._bar.tasks[0].fields["numbers"])
            return
        now = time.monotonic()
        if numbers and (now - self._printed_at > SECONDS_BETWEEN_LINES or step >= self._total):
            self._printed_at = now
            self._console.print(f"  {self._stage} {step}/{self._total} {self._unit}  {text}", highlight=False)
