"""An engine in this very process that hangs cannot be interrupted: native code looks at nothing. Its process can be
ended, with the cause, and what was learned until the last checkpoint is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from align.errors import RolloutError, leave


class Watchdog:
    """Calls `end` with an error when nothing was `seen` for so many seconds while it was `watching`."""

    def __init__(self, seconds: float, end: Callable[[RolloutError], None] = leave):
        self.seconds, self._end = seconds, end
        self._due = 0.0

    def seen(self) -> None:
        """There was progress."""
        self._due = time.monotonic() + self.seconds

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Inside, `what` has to make progress."""
        done = Event()
        self.seen()
        Thread(target=self._watch, args=(what, done), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _watch(self, what: str, done: Event) -> None:
        while not done.wait(max(0.0, self._due - time.monotonic())):
            if time.monotonic() >= self._due:
                self._end(
                    RolloutError(
                        f"{what} made no progress for {self.seconds:g} s, and an engine in this process cannot be "
                        "interrupted. Run the same command to go on from the last checkpoint; raise rollout.timeout if "
                        "it is only slow; rollout.engine=vllm-server is started again by itself"
                    )
                )
                return
