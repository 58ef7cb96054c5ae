"""The maths of the pages: envelopes, ceilings, smoothing, peaks, means with intervals. No files, no models."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]


class Estimate(NamedTuple):
    """A mean and the half width of its 95 % interval."""

    value: float
    half: float

    def text(self, digits: int) -> str:
        """As tables show it: 0.854 ±0.013."""
        return f"{self.value:.{digits}f} ±{self.half:.{digits}f}"


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates: half widths add up in squares."""
    count = len(estimates)
    return Estimate(sum(one.value for one in estimates) / count, math.hypot(*(one.half for one in estimates)) / count)


def envelope(points: Sequence[Point]) -> list[Point]:
    """The best gold within a KL that the points (KL, gold) prove possible: corners, by rising KL, of the least function
    above all points that is concave and never falls.

    Concave, because answering each prompt with one of two policies, drawn by lot, reaches every point of the chord
    between them or a better one: the KL is convex. Never falling, because less KL is also within a larger KL.
    """
    corners: list[Point] = []
    for x, y in sorted(points):
        if corners and y <= corners[-1][1]:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-2], (x, y)):
            corners.pop()
        if corners and corners[-1][0] == x:
            corners.pop()
        corners.append((x, y))
    return corners


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / (right[0] - left[0]) if right[0] > left[0] else math.inf


def height(corners: Sequence[Point], x: float) -> float:
    """The envelope at x: straight between corners, flat after the last. Raises ValueError left of the first."""
    if x < corners[0][0]:
        raise ValueError(f"the envelope begins at {corners[0][0]}, right of {x}")
    index = bisect_right([corner[0] for corner in corners], x)
    if index == len(corners):
        return corners[-1][1]
    left, right = corners[index - 1], corners[index]
    return left[1] + _slope(left, right) * (x - left[0])


def ceiling(golds: Sequence[float], kl: float) -> float:
    """What no policy at this KL can exceed, estimated from gold scores of the reference's own answers.

    For every policy and every beta > 0, E_pi[r] <= beta KL(pi || ref) + beta log E_ref[exp(r / beta)] (Donsker and
    Varadhan 1975); this is the least over beta of 100 from 0.01 to 100, and at most the highest score, which the bound
    tends to as beta goes to 0. Pooled over prompts: E_x[beta log Z(x)] <= beta log E_x[Z(x)], so it stays a bound.
    """
    top = max(golds)
    betas = [10 ** (-2 + 4 * step / 99) for step in range(100)]
    bounds = [
        top + beta * (kl + math.log(sum(math.exp((gold - top) / beta) for gold in golds) / len(golds)))
        for beta in betas
    ]
    return min(top, *bounds)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over `window` (odd) values; at the ends over as many as there are on the shorter side, so
    that it stays centred."""
    if window % 2 == 0:
        raise ValueError(f"a centred window has an odd number of values, not {window}")
    reach = [min(window // 2, index, len(values) - 1 - index) for index in range(len(values))]
    parts = [values[index - side : index + side + 1] for index, side in enumerate(reach)]
    return [sum(part) / len(part) for part in parts]


def peak(values: Sequence[float], window: int) -> int:
    """Index of the highest value, the first of equals, among those that are averages over a whole window."""
    side = window // 2
    inside = range(side, len(values) - side)
    return max(inside, key=lambda index: (values[index], -index))
