"""What `--gpu` says: how many GPUs of how much memory."""

from __future__ import annotations

import re

from align.errors import ConfigError, Problem
from align.pipeline.estimate.memory import Device

UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}
SIZE = r"(?P<size>\d+(?:\.\d+)?)(?P<unit>[a-z]+?)"
WRITTEN = (rf"(?:(?P<count>\d+)x)?{SIZE}", rf"{SIZE}x(?P<count>\d+)")


def parse_gpus(text: str) -> Device:
    """`8x24GiB` or `24GiB x 8`, or `80GB` for one. Raises ConfigError."""
    written = text.replace(" ", "").lower()
    found = next(filter(None, (re.fullmatch(pattern, written) for pattern in WRITTEN)), None)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    problem = Problem(f"--gpu {text}", "not a number of GPUs and their memory", "write 8x24GiB, or 80GB for one")
    if found is None or found["unit"] not in units:
        raise ConfigError(problem)
    count, memory = int(found["count"] or 1), round(float(found["size"]) * units[found["unit"]])
    if count == 0 or memory == 0:
        raise ConfigError(problem)
    return Device(memory, count)
