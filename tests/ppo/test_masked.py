"""Masked statistics: whitening (oracles W, Wh), moments over processes, NaN at masked slots (M2)."""

import math

import pytest
import torch

from align.training.masked import correlation, length_mask, masked_mean, masked_sum, moments, whiten

NAN = float("nan")


def over_ranks(function, parts):
    """Calls function(*part, reduce) for every rank's part; `reduce` sums what all ranks handed in."""
    handed_in = []

    def collect(sums):
        handed_in.append(sums)
        return sums

    for part in parts:
        function(*part, collect)
    return [function(*part, lambda sums: torch.stack(handed_in).sum(0)) for part in parts]


def test_mask_counts_the_first_tokens():
    assert length_mask(torch.tensor([0, 1, 3]), 3).tolist() == [[False] * 3, [True, False, False], [True] * 3]


def test_token_mean_is_not_a_mean_of_means():
    """Agg, row 66: [[1,2,.],[3,4,5]] has the token mean 15/5 = 3; the mean of the row means 1.5 and 4 is 2.75. Of the
    same row sums 3 and 12 the mean is 7.5, and over rows times columns (Dr. GRPO) 15/6 = 2.5."""
    x = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]])
    mask = length_mask(torch.tensor([2, 3]), 3)
    assert masked_mean(x, mask) == 3.0
    assert masked_sum(x, mask, dim=1).tolist() == [3.0, 12.0]
    assert masked_sum(x, mask, dim=1).mean() == 7.5
    assert masked_sum(x, mask) / mask.numel() == 2.5
    assert sum(masked_sum(x[i], mask[i]) for i in range(2)) / mask.sum() == 3.0
    assert sum(masked_mean(x[i], mask[i]) for i in range(2)) / 2 == 2.75


def test_whitening_uses_the_biased_variance():
    """W, Wh: the grid 1.2, 1.3 .. 2.0 has mean 1.6 and biased variance .0667; with the mean put back these
    are the nine numbers of the published comparison of TensorFlow and PyTorch. Unbiased, the first would be
    .1394.
    """
    x = torch.arange(12, 21).double().view(3, 3) / 10
    expected = [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492]
    white = whiten(x, torch.ones(3, 3, dtype=torch.bool))
    assert (white + 1.6).flatten().tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("lengths", [[3, 5, 1], [5, 5, 5]])
def test_whitened_valid_tokens_have_mean_0_and_variance_1(lengths):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    mask = length_mask(torch.tensor(lengths), 5)
    white = whiten(torch.where(mask, x, NAN), mask)
    assert white[mask].mean() == pytest.approx(0, abs=1e-12)
    assert white[mask].square().mean() == pytest.approx(1, abs=1e-8)
    assert (white[~mask] == 0).all()


@pytest.mark.parametrize("x", [[[4.0]], [[2.0, 2.0]], [[1e-9, -1e-9]]])
def test_nothing_to_scale_by_leaves_values_as_they_are(x):
    """Row 50: one token or no spread must not give NaN, nor blow rounding noise up to size 1."""
    x = torch.tensor(x)
    assert torch.equal(whiten(x, torch.ones_like(x, dtype=torch.bool)), x)


def test_whitening_does_not_depend_on_how_rows_are_spread_over_processes():
    """Row 50: mean and variance are those of the whole rollout, not of a process."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = length_mask(torch.tensor([1, 2, 3, 4, 5, 6, 6, 6]), 6)
    whole = whiten(x, mask)
    for cut in (1, 4, 7):
        parts = over_ranks(whiten, [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])])
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_moments_survive_a_large_mean():
    """In float32, 1e4 +- 1 squared loses the variance to cancellation; the sums are float64."""
    x = torch.tensor([9999.0, 10001.0] * 50)
    stats = moments(x)
    assert (stats.count, stats.mean, stats.variance) == (100, 10000.0, 1.0)
    assert stats.standard_error == pytest.approx((1 / 99) ** 0.5)


def test_moments_of_too_little():
    assert moments(torch.tensor([3.0])).standard_error == float("inf")
    assert math.isnan(moments(torch.tensor([])).mean)


def test_correlation_over_processes():
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = y + x
    expected = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert correlation(x, y) == pytest.approx(expected)
    assert over_ranks(correlation, [(x[:20], y[:20]), (x[20:], y[20:])]) == pytest.approx([expected] * 2)
    assert math.isnan(correlation(x, torch.ones(50)))
