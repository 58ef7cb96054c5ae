"""The maths of the benchmark pages, by worked numbers."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from benchmarks.curves import Estimate, ceiling, envelope, height, mean, peak, smooth


def test_envelope_keeps_the_corners() -> None:
    """From (0, .5): slope .2 to (1, .7) and .1 to (3, .9). (2, .75) is under the chord, which is .8 there; (4, .85) is
    more KL for less gold; (1, .6) is under (1, .7)."""
    points = [(3, 0.9), (0, 0.5), (2, 0.75), (1, 0.6), (4, 0.85), (1, 0.7)]
    assert envelope(points) == [(0, 0.5), (1, 0.7), (3, 0.9)]


def test_envelope_drops_a_corner_that_a_later_point_covers() -> None:
    """(1, .55) is a corner until (2, .9) comes: the chord from (0, .5) passes it at .7."""
    assert envelope([(0, 0.5), (1, 0.55), (2, 0.9)]) == [(0, 0.5), (2, 0.9)]


def test_envelope_is_concave_and_above_all_points() -> None:
    """What defines it, on random points; each corner is one of them, so nothing lower is possible."""
    rng = random.Random(0)
    for _ in range(50):
        points = [(0.0, 0.5)] + [(rng.random() * 5, rng.random()) for _ in range(12)]
        corners = envelope(points)
        assert set(corners) <= set(points)
        assert all(height(corners, x) >= y - 1e-12 for x, y in points)
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(corners)]
        assert slopes == sorted(slopes, reverse=True)
        assert all(slope > 0 for slope in slopes)


def test_height() -> None:
    """Between (1, .7) and (3, .9) a quarter of the way is .75; right of the last corner it is flat."""
    corners = [(0, 0.5), (1, 0.7), (3, 0.9)]
    assert [height(corners, x) for x in (0, 0.5, 1, 1.5, 3, 9)] == pytest.approx([0.5, 0.6, 0.7, 0.75, 0.9, 0.9])
    with pytest.raises(ValueError, match="begins at 0"):
        height(corners, -0.1)


def test_ceiling_of_a_coin() -> None:
    """A reference whose answers score 0 or 1, half each: a policy that scores q has KL q log 2q + (1-q) log 2(1-q) at
    least, and the tilted reference has exactly that. q = .9: .9 log 1.8 + .1 log .2 = .368064."""
    kl = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert kl == pytest.approx(0.368064, abs=1e-6)
    assert ceiling([0, 1], kl) == pytest.approx(0.9, abs=2e-4)


def test_ceiling_at_the_ends() -> None:
    """At KL 0 the mean (beta 100 leaves var/200 of it); with log 2 nats and more the highest score."""
    assert ceiling([0, 1], 0) == pytest.approx(0.5, abs=2e-3)
    assert ceiling([0, 1], math.log(2)) == pytest.approx(1, abs=1e-9)
    assert ceiling([0, 1], 5) == 1


def test_no_policy_is_above_the_ceiling() -> None:
    """The inequality itself, on random references and policies over eight answers."""
    rng = random.Random(1)
    for _ in range(200):
        scores = [rng.random() for _ in range(8)]
        weights = [rng.expovariate(1) for _ in scores]
        policy = [weight / sum(weights) for weight in weights]
        kl = sum(p * math.log(8 * p) for p in policy)
        assert sum(p * score for p, score in zip(policy, scores, strict=True)) <= ceiling(scores, kl) + 1e-12


def test_smooth() -> None:
    """Window 3: the ends are alone, (0+3+6)/3 = 3, (3+6+0)/3 = 3, (6+0+3)/3 = 3. A straight line stays as it is."""
    assert smooth([0, 3, 6, 0, 3], 3) == [0, 3, 3, 3, 3]
    assert smooth([1, 2, 3, 4, 5, 6], 5) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="odd"):
        smooth([1, 2], 2)


def test_peak_leaves_out_the_ends() -> None:
    """The ends are averages of fewer values, so noisier: the 9 at the end does not count. The first of equals wins."""
    assert peak([0, 1, 5, 5, 2, 9], 3) == 2


def test_mean_of_estimates() -> None:
    """Half widths 3 and 4 of two independent means: sqrt(9 + 16) / 2 = 2.5."""
    assert mean([Estimate(1, 3), Estimate(2, 4)]) == Estimate(1.5, 2.5)
    assert Estimate(0.8537, 0.01304).text(3) == "0.854 ±0.013"
