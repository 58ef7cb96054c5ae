"""A process whose main thread is stuck is ended, with the cause."""

from __future__ import annotations

import subprocess
import sys
from threading import Event
from time import monotonic

from align.errors import RolloutError
from align.generation.watchdog import Watchdog
from align.pipeline.folders import FAILURE, LOG, read_failure

STUCK = """
import sys
from functools import partial
from pathlib import Path
from threading import Event
from align.generation.watchdog import Watchdog
from align.worker import _abort
with Watchdog(0.2, partial(_abort, Path(sys.argv[1]))).watching("sampling"):
    Event().wait()
"""


def test_a_stuck_process_ends_and_says_why(tmp_path):
    """As in a stage: exit code 71, and the cause on stderr, in failure.json and in the log."""
    done = subprocess.run([sys.executable, "-c", STUCK, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 71
    assert done.stderr.startswith("sampling made no progress for 0.2 s")
    assert read_failure(tmp_path) == 71
    assert "sampling made no progress" in (tmp_path / FAILURE).read_text()
    assert "sampling made no progress" in (tmp_path / LOG).read_text()


def test_progress_is_waited_for():
    """Seen every 0.1 s for 1 s, it does not end what has 0.5 s; left alone it does, once."""
    ended: list[RolloutError] = []
    has_ended = Event()

    def end(error: RolloutError) -> None:
        ended.append(error)
        has_ended.set()

    dog, start, pause = Watchdog(0.5, end), monotonic(), Event()
    with dog.watching("sampling"):
        while monotonic() - start < 1:
            pause.wait(0.1)
            dog.seen()
        assert not ended
        assert has_ended.wait(30)
    assert len(ended) == 1


def test_what_is_done_is_not_watched():
    """Work that ended in time is not reported later."""
    ended = Event()
    with Watchdog(0.2, lambda error: ended.set()).watching("sampling"):
        pass
    assert not ended.wait(0.6)
