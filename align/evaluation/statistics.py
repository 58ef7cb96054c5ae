"""Means and shares with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959964


def mean_interval(values: Sequence[float]) -> tuple[float, list[float]]:
    """Mean and its normal-approximation 95 % interval. One value has an interval of its own width 0."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, [mean, mean]
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = Z95 * math.sqrt(variance / count)
    return mean, [mean - half, mean + half]


def share_interval(successes: float, count: int) -> tuple[float, list[float]]:
    """Share and its Wilson 95 % interval, which stays inside 0..1 (Wilson 1927)."""
    share = successes / count
    z2 = Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return share, [max(0.0, centre - half), min(1.0, centre + half)]
