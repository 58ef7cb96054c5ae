"""Intervals, by worked numbers."""

from __future__ import annotations

import pytest

from align.evaluation.reward import pair_metrics
from align.evaluation.statistics import mean_interval, share_interval


def test_wilson_interval():
    """55 of 100 at 95 %: 0.45 to 0.64 (Wilson 1927); 550 of 1000: 0.519 to 0.581."""
    share, (low, high) = share_interval(55, 100)
    assert (share, low, high) == pytest.approx((0.55, 0.4524, 0.6439), abs=1e-4)
    share, (low, high) = share_interval(550, 1000)
    assert (low, high) == pytest.approx((0.5190, 0.5806), abs=1e-4)


@pytest.mark.parametrize(("successes", "expected"), [(0, [0.0, 0.2775]), (10, [0.7225, 1.0])])
def test_wilson_at_the_ends(successes, expected):
    """0 or 10 of 10: the interval stays inside 0..1 and has a width, where the normal approximation has none."""
    assert share_interval(successes, 10)[1] == pytest.approx(expected, abs=1e-4)


def test_mean_interval():
    """1, 2, 3, 4: mean 2.5, standard error sqrt(5/3 / 4) = 0.6455, times 1.96."""
    mean, (low, high) = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert (low, high) == pytest.approx((2.5 - 1.2652, 2.5 + 1.2652), abs=1e-4)


def test_one_value_has_no_spread():
    """No interval can be known: it is the value itself."""
    assert mean_interval([3.0]) == (3.0, [3.0, 3.0])


def test_pair_metrics_worked_example():
    """Margins 1, -1, 2 and 0: a tie counts half, so 2.5 of 4 are right. Log loss is the mean of ln(1 + e^-m). The
    longer answer is right in two pairs and ties in one, so the length-only rule also has 2.5 of 4."""
    metrics = pair_metrics([2.0, 0.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0], [(5, 3), (2, 2), (4, 1), (1, 6)])
    assert metrics["pairs"] == 4
    assert metrics["accuracy"] == 0.625
    low, high = metrics["accuracy_ci95"]
    assert low < 0.625 < high
    assert metrics["margin"] == 0.5
    assert metrics["log_loss"] == pytest.approx((0.313262 + 1.313262 + 0.126928 + 0.693147) / 4, abs=1e-6)
    assert metrics["length_only_accuracy"] == 0.625


def test_one_tie_is_half_right():
    """Rounding a tie to right or wrong would make a constant reward model look bad or good by chance."""
    assert pair_metrics([1.0], [1.0], [(1, 1)])["accuracy"] == 0.5


def test_length_rule_counts_in_its_better_direction():
    """Always the shorter one wins: a rule as good as always the longer one."""
    assert pair_metrics([1.0, 1.0], [0.0, 0.0], [(1, 2), (3, 9)])["length_only_accuracy"] == 1.0


def test_log_loss_of_large_margins_does_not_overflow():
    """ln(1 + e^1000) is 1000."""
    assert pair_metrics([0.0], [1000.0], [(1, 1)])["log_loss"] == pytest.approx(1000)
    assert pair_metrics([1000.0], [0.0], [(1, 1)])["log_loss"] == pytest.approx(0)
