"""The machine that a benchmark runs on: its processor, and whether it had the machine to itself."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

QUIET = 0.1
"""Cores that other processes may use during a measurement that counts."""
SPARE = 3
"""Measurements more than are wanted that may be disturbed; and the fewest that a result can come from."""

REST_WINDOW, PATIENCE = 0.2, 10.0
"""Seconds over which rest is observed, and for which it is waited for."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Load:
    """Seconds since some start, and processor seconds used in them: by all processes, and by ours."""

    wall: float
    everyone: float
    own: float

    @classmethod
    def now(cls) -> Load:
        """As of now."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)  # guest is in user as well
        return cls(time.monotonic(), sum(times) - idle, _own())

    def own_since(self, before: Load) -> float:
        """Cores that this process used on average, and all that it started."""
        return (self.own - before.own) / (self.wall - before.wall)

    def others_since(self, before: Load) -> float:
        """Cores that others used on average, the host's other guests included."""
        return (self.everyone - before.everyone) / (self.wall - before.wall) - self.own_since(before)


def _own() -> float:
    """Processor seconds of this process and all under it, those that have ended included."""
    here, total = psutil.Process(), 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # just now: its parent has them
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def settle() -> None:
    """Waits until this process and all that it started have come to rest: a server looks busily for more work for a
    second after its last."""
    end, cores = time.monotonic() + PATIENCE, QUIET + 1
    while cores > QUIET and time.monotonic() < end:
        before = Load.now()
        time.sleep(REST_WINDOW)
        cores = Load.now().own_since(before)


def undisturbed(wanted: int, measure: Callable[[], Result], quiet: float = QUIET) -> tuple[list[Result], list[float]]:
    """The results of calls during which other processes used at most `quiet` cores, as many as are wanted, and the
    cores that they used during each of the calls that do not count. Ends the benchmark when too many do not."""
    counted: list[Result] = []
    disturbed: list[float] = []
    while len(counted) < wanted and len(disturbed) < wanted + SPARE:
        before = Load.now()
        result = measure()
        others = Load.now().others_since(before)
        if others > quiet:
            disturbed.append(others)
        else:
            counted.append(result)
    if len(counted) < min(wanted, SPARE):
        shares = ", ".join(f"{one:.2f}" for one in disturbed)
        sys.exit(f"too few measurements count: other processes used {shares} cores during the rest")
    return counted, disturbed


def processor() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
