"""Truncated importance sampling between the engine that samples and the policy that is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stages.ppo.correction import correction_metrics, importance_weights
from stages.ppo.losses import policy_loss
from stages.ppo.rollout import Responses, Rollout
from stages.ppo.settings import ClipSettings

LOG_WEIGHTS = torch.tensor([[0.0, 0.5, 1.0, -1.0]])


def rollout_of(logp_old: torch.Tensor, lengths: list[int]) -> Rollout:
    """A rollout that is nothing but log-probabilities (B,T)."""
    rows, width = logp_old.shape
    ids = torch.zeros(rows, width + 1, dtype=torch.long)
    responses = Responses(ids, torch.ones_like(ids), torch.tensor(lengths), torch.ones(rows, dtype=torch.bool), width)
    zeros = torch.zeros_like(logp_old)
    counted = torch.ones(rows, dtype=torch.bool)
    return Rollout(responses, zeros.sum(1), counted, logp_old, zeros, zeros, zeros, zeros, None, None)


@pytest.mark.parametrize(
    ("kind", "cap", "expected"),
    [
        ("token", 2.0, [1, 1.648721, 2, 0.367879]),
        ("token", 100.0, [1, 1.648721, 2.718282, 0.367879]),
        ("sequence-mask", 2.0, [1.648721] * 4),
        ("sequence-mask", 1.5, [0.0] * 4),
        ("off", 2.0, [1.0] * 4),
    ],
)
def test_worked_weights(kind, cap, expected):
    """Row 82: log-weights [0, .5, 1, -1]. By token e^x capped at 2; by sequence e^.5, 0 above the cap."""
    engine = torch.full((1, 4), -2.0)
    weights = importance_weights(engine, rollout_of(engine + LOG_WEIGHTS, [4]), kind, cap)
    torch.testing.assert_close(weights, torch.tensor([expected]), rtol=0, atol=1e-6)


def test_what_lies_in_padding_is_not_looked_at():
    """A row of two tokens: whatever is in the other columns, infinities too, weighs nothing and changes nothing."""
    engine = torch.tensor([[-1.0, -1.0, float("inf"), float("nan")]])
    rollout = rollout_of(torch.tensor([[-1.5, -0.5, 3.0, 3.0]]), [2])
    for kind in ("token", "sequence-mask"):
        weights = importance_weights(engine, rollout, kind, 2.0)
        assert torch.isfinite(weights).all()
        assert weights[0, 2:].tolist() == [1.0, 1.0]
        assert importance_weights(engine.nan_to_num(), rollout, kind, 2.0).tolist() == weights.tolist()
    found = correction_metrics(importance_weights(engine, rollout, "token", 10.0), rollout)
    low, high = 0.606531, 1.648721
    assert found["correction/weight_min"] == pytest.approx(low, abs=1e-6)
    assert found["correction/weight_max"] == pytest.approx(high, abs=1e-6)
    assert found["correction/weight_mean"] == pytest.approx((low + high) / 2, abs=1e-6)


@pytest.mark.parametrize("clip", [ClipSettings(), ClipSettings(policy_high=0.28, dual=3.0)])
def test_weighting_advantages_is_weighting_losses(clip):
    """max(-wA r, -wA clip r) = w max(-A r, -A clip r) for w >= 0, and the dual clip's bound -c wA = w (-c A): value and
    gradient, token by token."""
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(1, 64, generator=generator, dtype=torch.double) for _ in range(3))
    weights = torch.rand(1, 64, generator=generator, dtype=torch.double) * 2
    new.requires_grad_()
    mask = torch.ones(1, 64, dtype=torch.bool)
    together, _ = policy_loss(new, old, advantages * weights, mask, clip)
    (gradient,) = torch.autograd.grad(together, new)
    alone = [policy_loss(new[:, [t]], old[:, [t]], advantages[:, [t]], mask[:, [t]], clip)[0] for t in range(64)]
    weighted = (torch.stack(alone) * weights[0]).sum()
    (expected,) = torch.autograd.grad(weighted, new)
    assert float((together - weighted).abs()) < 1e-12
    assert float((gradient - expected).abs().max()) < 1e-12


def test_the_weighted_sample_has_the_policys_expectation():
    """E_policy[f] = E_engine[w f]: three tokens, exactly summed, cap out of reach. With a cap of 1 it is biased."""
    policy, engine = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    values = torch.tensor([1.0, -2.0, 3.0])
    rollout = rollout_of(policy.log()[:, None], [1, 1, 1])
    weights = importance_weights(engine.log()[:, None], rollout, "token", 10.0)[:, 0]
    assert float((engine * weights * values).sum()) == pytest.approx(float((policy * values).sum()), abs=1e-6)
    capped = importance_weights(engine.log()[:, None], rollout, "token", 1.0)[:, 0]
    assert float((engine * capped * values).sum()) == pytest.approx(0.4 - 0.6 + 0.6, abs=1e-6)


def test_weights_have_no_gradient():
    """They multiply advantages, through which nothing flows."""
    old = torch.zeros(1, 4)
    weights = importance_weights(old - LOG_WEIGHTS, rollout_of(old, [4]), "token", 2.0)
    assert not weights.requires_grad
    assert not replace(rollout_of(old, [4]), advantages=weights).advantages.requires_grad
