"""KL estimators: values and gradients in closed form (D), sampler mismatch (O9), sums per sequence (K2),
the adaptive coefficient (K)."""

import pytest
import torch

from stages.ppo.kl import adapted, k1, k2, k3, summary

LOGITS = torch.tensor([0.2, -0.1, 0.5], dtype=torch.float64)
REF = torch.tensor([0.0, 0.4, -0.3], dtype=torch.float64).log_softmax(-1)


def test_estimators_in_expectation():
    """D: E[k1] = E[k3] = KL = .139174828 exactly, k2 is biased; k3 varies far less."""
    logp = LOGITS.log_softmax(-1)
    expected = {k1: (0.139174828, 0.265795), k2: (0.142582350, 0.009594), k3: (0.139174828, 0.010699)}
    for estimator, (mean, variance) in expected.items():
        values = estimator(logp, REF)
        ours = (logp.exp() * values).sum()
        assert ours == pytest.approx(mean, abs=1e-9)
        assert (logp.exp() * (values - ours) ** 2).sum() == pytest.approx(variance, abs=1e-6)


def gradient(objective):
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(-1)), logits)[0]


REVERSE = [-0.0304998, -0.1903809, 0.2208807]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (k1, REVERSE),
        (k2, [-0.0458068, 0.0172554, 0.0285513]),
        (k3, [-0.0447091, 0.0314122, 0.0132969]),
    ],
)
def test_gradient_when_the_estimator_is_a_reward(estimator, expected):
    """D, row 31: the score-function gradient sum pi(x) grad log pi(x) k(x) is that of the KL for k1 only."""
    ours = gradient(lambda logp: (logp.exp().detach() * logp * estimator(logp, REF).detach()).sum())
    assert ours.tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(k1, [0.0, 0.0, 0.0]), (k2, REVERSE), (k3, [0.0142093, -0.2217931, 0.2075838])],
)
def test_gradient_when_the_estimator_is_a_loss(estimator, expected):
    """D, row 32: averaged over pi, k1 pulls nowhere, k2 is the KL, k3 the KL the other way round."""
    ours = gradient(lambda logp: (logp.exp().detach() * estimator(logp, REF)).sum())
    assert ours.tolist() == pytest.approx(expected, abs=1e-7)


def test_gradient_of_the_kl_itself():
    """D: what the two tests above are compared with."""
    ours = gradient(lambda logp: (logp.exp() * k1(logp, REF)).sum())
    assert ours.tolist() == pytest.approx(REVERSE, abs=1e-7)


def test_summary_sums_over_tokens():
    """K2, row 34: 30 tokens of .2 are a KL of 6. The rows' sums are 6 and 2: mean 4, standard error 2."""
    logp, mask = torch.full((2, 30), 0.2), torch.ones(2, 30, dtype=torch.bool)
    mask[1, 10:] = False
    ours = summary(logp, torch.zeros(2, 30), mask)
    assert ours["objective/kl"] == pytest.approx(4.0)
    assert ours["objective/kl_se"] == pytest.approx(2.0)


def test_summary_ignores_what_is_masked():
    """M1, M2."""
    generator = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(2, 4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None]
    dirty = torch.where(mask, logp, float("-inf"))
    assert summary(dirty, torch.where(mask, ref, float("nan")), mask) == summary(logp, ref, mask)


@pytest.mark.parametrize(
    ("policy", "mean_k1", "kl"),
    [([0.45, 0.28, 0.27], -0.091411, 0.014298), ([0.40, 0.35, 0.25], -0.047073, 0.020481)],
)
def test_sampling_from_the_top_shows_as_a_negative_kl(policy, mean_k1, kl):
    """O9, row 12: drawing from the two likeliest tokens and scoring with the whole distribution. The 20,000
    rows hold exactly the proportions of that truncated sampler, so the mean has no noise."""
    logp, ref = torch.tensor([policy, [0.5, 0.3, 0.2]], dtype=torch.float64).log()
    assert (logp.exp() * (logp - ref)).sum() == pytest.approx(kl, abs=1e-6)
    share = policy[0] / (policy[0] + policy[1])
    first = round(20_000 * share)
    tokens = torch.tensor([0] * first + [1] * (20_000 - first))[:, None]
    ours = summary(logp[tokens], ref[tokens], torch.ones_like(tokens, dtype=torch.bool))
    assert ours["objective/kl"] == pytest.approx(mean_k1, abs=1e-5)
    assert ours["objective/kl"] < -3 * ours["objective/kl_se"]
    assert abs(ours["objective/kl"] - ours["objective/kl_k3"]) > 3 * ours["objective/kl_gap_se"]


def test_adaptive_coefficient():
    """K, row 35: KL 12 for a target of 6 is an error of 1, clipped to .2: .15 (1 + .2 * 512 / 10000) = .151536. A KL
    of 0 is one of -1, clipped to -.2; within the clip it is proportional: 6.6 gives .1."""
    up = adapted(0.15, 12.0, 6.0, horizon=10_000, episodes=512)
    assert up == pytest.approx(0.151536)
    assert adapted(1.0, 0.0, 6.0, 10_000, 512) == pytest.approx(0.98976)
    assert adapted(1.0, 6.6, 6.0, 10_000, 512) == pytest.approx(1 + 0.1 * 512 / 10_000)
    assert adapted(0.15, 6.0, 6.0, 10_000, 512) == 0.15


def test_adaptive_coefficient_over_many_rollouts():
    """K: 1.01024^100 = 2.769849, and it has doubled after log 2 / log 1.01024 = 68.04 rollouts, that is, after 69."""
    coefs = [0.15]
    for _ in range(100):
        coefs.append(adapted(coefs[-1], 50.0, 6.0, 10_000, 512))
    assert coefs[100] / 0.15 == pytest.approx(2.769849, abs=1e-6)
    assert next(n for n, coef in enumerate(coefs) if coef >= 0.3) == 69


def test_adaptive_coefficient_wants_the_kl_of_a_response():
    """K2, row 34: 60 tokens of .2 are 12 nats, twice the target; fed with the .2 the controller would let go."""
    logp, mask = torch.full((4, 60), 0.2), torch.ones(4, 60, dtype=torch.bool)
    measured = summary(logp, torch.zeros(4, 60), mask)["objective/kl"]
    assert adapted(0.15, measured, 6.0, 10_000, 512) > 0.15 > adapted(0.15, 0.2, 6.0, 10_000, 512)
