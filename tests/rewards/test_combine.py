"""Scores of an ensemble: the formulas by hand, and what they are for."""

from __future__ import annotations

import math

import pytest
import torch

from align.rewards.combine import combine, disagreement
from align.rewards.settings import RewardTerm

SCORES = torch.tensor([[1.0, 0.0, -2.0], [2.0, 0.0, 2.0], [6.0, 0.0, 3.0]])
"""Three reward models (rows), three responses: means 3, 0, 1; variances (4+1+9)/3 = 14/3, 0, (9+1+4)/3 = 14/3."""

BEST_OF_64 = {"mean": 2.13952, "min": 2.00572, "mean-variance": 2.09486}
"""Gold score of the best of 64 by five proxies q + N(0,1), gold q ~ N(0,1), variance_coef 0.5. By numeric integration
of E[q] = 64 int m(s) F(s)^63 ds, where F is the distribution function of the proxy s = q + z,
m(s) = int q phi(q) g(s - q) dq, and g is the density of z: N(0, 1/5) for the mean; 5 phi (1 - Phi)^4 for the minimum;
that of N(0, 1/5) less an independent chi2_4 / 10 for mean-variance. The mean's has a closed form, sqrt(5/6) * 2.34373,
and so has a single proxy's, sqrt(1/2) * 2.34373: E[max of 64 N(0,1)] = 2.34373."""
SINGLE = 1.65727


def settings(name: str, coef: float = 0.5) -> RewardTerm:
    return RewardTerm.model_validate({"model": ["a", "b", "c"], "combine": name, "variance_coef": coef})


@pytest.mark.parametrize(
    ("name", "coef", "expected"),
    [
        ("mean", 0.5, [3.0, 0.0, 1.0]),
        ("min", 0.5, [1.0, 0.0, -2.0]),
        ("mean-variance", 0.5, [3 - 7 / 3, 0.0, 1 - 7 / 3]),
        ("mean-variance", 0.0, [3.0, 0.0, 1.0]),
        ("mean-variance", 3.0, [3 - 14, 0.0, 1 - 14]),
    ],
)
def test_formulas(name, coef, expected):
    """By hand, from the table above; the variance is divided by K."""
    assert combine(SCORES, settings(name, coef)).tolist() == pytest.approx(expected, abs=1e-6)


def test_disagreement():
    """The square root of that variance: sqrt(14/3)."""
    assert disagreement(SCORES).tolist() == pytest.approx([math.sqrt(14 / 3), 0, math.sqrt(14 / 3)])


@pytest.mark.parametrize("name", ["mean", "min", "mean-variance"])
def test_one_model_is_no_ensemble(name):
    """With K = 1 every rule gives the score itself, bit for bit, and nobody disagrees."""
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(combine(scores, settings(name)), scores[0])
    assert not disagreement(scores).any()


@pytest.mark.parametrize("name", ["mean", "min", "mean-variance"])
def test_order_and_offset(name):
    """The order of the models does not matter, and a constant added to all scores is added to the result."""
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = combine(scores, settings(name))
    assert torch.allclose(combine(scores.flip(0), settings(name)), expected, atol=1e-12)
    assert torch.allclose(combine(scores + 2, settings(name)), expected + 2, atol=1e-12)


@pytest.fixture(scope="module")
def worlds():
    """Gold (N,64) and five proxies (5,N,64) of N = 20000 draws of 64 responses."""
    generator = torch.Generator().manual_seed(0)
    gold = torch.randn(20_000, 64, generator=generator)
    return gold, gold + torch.randn(5, 20_000, 64, generator=generator)


def best_by(proxy: torch.Tensor, gold: torch.Tensor) -> tuple[float, float]:
    """Mean gold score of the response that the proxy likes best, and its standard error."""
    picked = gold.gather(1, proxy.argmax(1, keepdim=True))
    return float(picked.mean()), float(picked.std()) / math.sqrt(len(picked))


@pytest.mark.parametrize("name", list(BEST_OF_64))
def test_ensembles_reduce_overoptimisation(worlds, name):
    """Oracle E8: the gold score reached is the integral's within 3 standard errors (0.013), and every ensemble is far
    above a single proxy."""
    gold, proxies = worlds
    found, error = best_by(combine(proxies.flatten(1), settings(name)).view_as(gold), gold)
    assert found == pytest.approx(BEST_OF_64[name], abs=3 * error)
    single, single_error = best_by(proxies[0], gold)
    assert single == pytest.approx(SINGLE, abs=3 * single_error)
    assert found > single + 0.3
