"""Whether a measurement had the machine to itself."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from benchmarks.machine import Load, undisturbed

BUSY = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"


def test_cores() -> None:
    """In 10 s all processes used 8 s and ours 5 s: 0.5 cores, and 0.3 by others."""
    before, after = Load(wall=100, everyone=50, own=20), Load(wall=110, everyone=58, own=25)
    assert (after.own_since(before), after.others_since(before)) == (0.5, pytest.approx(0.3))


def test_processes_that_still_run_are_ours() -> None:
    """A child works for half a second and waits; it counts then, and still counts when it has ended."""
    before = Load.now().own
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert Load.now().own - before >= 0.45
        child.communicate(b"\n")
    assert Load.now().own - before >= 0.45


def test_as_many_as_are_wanted() -> None:
    """Nothing disturbs when others may use all cores there are."""
    numbers = iter(range(100))
    assert undisturbed(4, lambda: next(numbers), quiet=math.inf) == ([0, 1, 2, 3], [])


def test_a_machine_that_is_never_quiet_ends_the_benchmark() -> None:
    """After 4 + 3 measurements in vain, when 4 are wanted."""
    calls: list[int] = []
    with pytest.raises(SystemExit, match="other processes used"):
        undisturbed(4, lambda: calls.append(0), quiet=-math.inf)
    assert len(calls) == 7
