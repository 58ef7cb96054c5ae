"""Where PPO comes to rest: at pi* = ref exp(score / beta) / Z, the optimum of J(pi) = E[score] - beta KL(pi
|| ref).

Expectations are exact: every response is enumerated and weighted by its probability (E, E1, E12, O4, P3, L)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.ppo.advantages import gae
from stages.ppo.losses import policy_loss
from stages.ppo.settings import ClipSettings
from tests.ppo.bandit import REF, SCORES, Draws, descend, tilted
from tests.ppo.table_model import STATES, Path, World, scores_of_all, sequence_logprobs

LAMBDAS = [0.0, 0.5, 0.95, 1.0]


@pytest.fixture(params=[0, 1, 2])
def world(request) -> World:
    return World.random(request.param)


def test_identities_of_the_optimum(world):
    """J(pi*) = V*(root) = beta log Z, and no policy does better (frontier inequality)."""
    best, expected, divergence = world.expectations(world.policy)
    assert best == pytest.approx(float(world.values[0]), abs=1e-12)
    assert best == pytest.approx(expected - world.beta * divergence)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = (3 * torch.randn(STATES, 3, generator=generator, dtype=torch.float64)).log_softmax(-1)
        assert world.expectations(other)[0] < best
        assert world.distance(other) > 0


@pytest.mark.parametrize("lam", LAMBDAS)
def test_expected_gradient_is_the_gradient_of_the_objective(world, lam):
    """E1, E2, rows 31 and 65: with the exact critic V^pi, the expectation of PPO's first gradient over all
    responses is -grad J, for every lambda. Hence pi* is its fixed point, and the only one."""
    generator = torch.Generator().manual_seed(7)
    policy = torch.randn(STATES, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    path = Path(world, policy, world.evaluate(policy))
    advantages, _ = gae(path.rewards(), path.values, path.mask, 1.0, lam)
    # The loss is linear in the advantages: weights pi(y) on them make its sum the expectation.
    weighted = advantages * path.probabilities()[:, None]
    loss, _ = policy_loss(path.logp, path.old, weighted, path.mask, ClipSettings())
    (ours,) = torch.autograd.grad(loss, path.actor.table)
    torch.testing.assert_close(ours, -objective_gradient(world, policy), rtol=0, atol=1e-12)


def objective_gradient(world: World, logits: Tensor) -> Tensor:
    """grad of J, by differentiating the sum over the fifteen responses."""
    table = logits.clone().requires_grad_()
    logp, logp_ref = sequence_logprobs(table.log_softmax(-1)), sequence_logprobs(world.ref)
    objective = (logp.exp() * (scores_of_all() - world.beta * (logp - logp_ref))).sum()
    return torch.autograd.grad(objective, table)[0]


def test_stop_decision_gets_a_gradient(world):
    """P3, row 4: EOS is part of the mask, so its logit is trained wherever a response ended."""
    path = Path(world, world.ref, world.values)
    advantages, _ = gae(path.rewards(), path.values, path.mask, 1.0, 0.95)
    loss, _ = policy_loss(path.logp, path.old, advantages, path.mask, ClipSettings())
    (gradient,) = torch.autograd.grad(loss, path.actor.table)
    ends_at = [0, 1, 2, 4, 5, 7, 8]
    assert (gradient[ends_at, 2].abs() > 1e-6).all()


# The bandit of E.
BANDIT = {
    2.0: ([0.325040, 0.321540, 0.353420], 1.028380, 0.083530, 0.861320),
    1.0: ([0.179000, 0.291944, 0.529056], 1.350056, 0.322834, 1.027222),
    0.5: ([0.036667, 0.162559, 0.800774], 1.764107, 0.915475, 1.306369),
    0.1: ([5.15e-9, 6.81e-5, 0.999932], 1.999932, 1.608689, 1.839063),
}


def bandit_gradient(logits: Tensor, beta: float) -> Tensor:
    """The expected gradient of PPO's loss, k1 in the reward: each action once, weighted by its probability."""
    draws = Draws(logits)
    advantages, _ = gae(draws.rewards(beta), torch.zeros_like(draws.old), draws.mask, 1.0, 1.0)
    return draws.gradient(advantages)


@pytest.mark.parametrize("beta", BANDIT)
def test_bandit_optimum_is_a_fixed_point(beta):
    """E: pi*, E r, KL and J* = beta log Z as tabulated, and no gradient there."""
    policy, expected, divergence, best = BANDIT[beta]
    optimum = (REF + SCORES / beta).log_softmax(-1)
    p = optimum.exp()
    assert p.tolist() == pytest.approx(policy, abs=1e-6, rel=1e-3)
    assert (p * SCORES).sum() == pytest.approx(expected, abs=1e-6)
    assert (p * (optimum - REF)).sum() == pytest.approx(divergence, abs=1e-6)
    assert beta * (REF + SCORES / beta).logsumexp(-1) == pytest.approx(best, abs=1e-6)
    assert bandit_gradient(optimum, beta).abs().max() < 1e-14


@pytest.mark.parametrize("beta", [2.0, 1.0, 0.5])
def test_bandit_descent_reaches_the_optimum(beta):
    """E1: plain gradient descent on the exact gradient, from the reference."""
    ours = descend(lambda logits: bandit_gradient(logits, beta), rate=3 / beta, steps=600)
    assert (ours - tilted(SCORES, beta)).abs().max() < 1e-6


def test_k2_as_a_loss_reaches_the_optimum():
    """O4, row 32: with the KL as a loss, on single actions, the optimum is the same pi*, to 1e-8."""

    def gradient(logits):
        draws = Draws(logits)
        return draws.gradient(draws.rewards(0.0), kl_coef=1.0)

    assert (descend(gradient) - tilted(SCORES, 1.0)).abs().max() < 1e-8


def test_k3_as_a_loss_reaches_another_optimum():
    """O4, row 32: its gradient is that of KL(ref || pi), so it comes to rest where E[r] - KL(ref || pi) is largest:
    pi_k = ref_k / (c - r_k), where .5/c + .3/(c-1) + .2/(c-2) = 1 gives c = 2.3534288. It is not on offer."""

    def gradient(logits):
        draws = Draws(logits)
        x = draws.policy - REF
        k3 = torch.expm1(-x) + x
        return draws.gradient(draws.rewards(0.0), extra=(draws.policy.exp().detach() * k3).sum())

    ours = descend(gradient)
    assert ours.tolist() == pytest.approx([0.212456, 0.221659, 0.565885], abs=1e-6)
    assert (REF.exp() / ours + SCORES).tolist() == pytest.approx([2.3534288] * 3, abs=1e-6)


def test_both_penalties_at_once_double_the_coefficient():
    """Row 33: k1 in the reward and k2 as a loss, each at beta .5, rest at the optimum of beta 1. That is why the
    settings name one estimator."""

    def gradient(logits):
        draws = Draws(logits)
        return draws.gradient(draws.rewards(0.5), kl_coef=0.5)

    assert (descend(gradient) - tilted(SCORES, 1.0)).abs().max() < 1e-8


def test_an_entropy_bonus_is_a_larger_beta_and_a_flatter_reference():
    """Row 29: J + c H = E[score] - (beta + c) KL(pi || ref') + const with ref' ~ ref^(beta / (beta + c)), so it rests
    at softmax((score + beta log ref) / (beta + c)): another optimum, which is why its default is 0."""

    def gradient(logits):
        draws = Draws(logits)
        entropy = -(draws.policy.exp() * draws.policy).sum()
        return draws.gradient(draws.rewards(1.0), extra=-0.5 * entropy)

    expected = ((SCORES + REF) / 1.5).softmax(-1)
    assert (descend(gradient) - expected).abs().max() < 1e-8


def test_an_unseen_action_is_settled_by_the_reference():
    """E12: only the pair (0, 1) was ever compared. A loss of log(pi_0 / pi_1) alone, like DPO's, is as small when
    action 2 takes nearly everything; PPO on a reward model that says 0 of the unseen has one optimum, and the second of
    these policies is not it."""
    seen = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    settled = tilted(seen, 1.0)
    drifted = torch.cat([settled[:2] * 0.01, 1 - settled[:2].sum(0, keepdim=True) * 0.01])
    assert drifted[2] > 0.98
    margins = [float((policy.log() - REF)[:2].diff()) for policy in (settled, drifted)]
    assert margins[0] == pytest.approx(margins[1])
    pulls = [draws.gradient(draws.rewards(1.0)) for draws in (Draws(p.log(), scores=seen) for p in (settled, drifted))]
    assert pulls[0].abs().max() < 1e-12
    assert pulls[1][2] > 0.01, "descent takes probability away from it"


def test_frontier_inequality():
    """E: E r <= min over beta of beta KL + J*(beta), for any policy at all; J* = beta log Z."""
    shares = -torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    policies = shares / shares.sum(-1, keepdim=True)
    betas = torch.logspace(-2, 3, 400, dtype=torch.float64)
    best = betas * (REF + SCORES / betas[:, None]).logsumexp(-1)
    divergence = (torch.xlogy(policies, policies) - policies * REF).sum(-1)
    bound = (betas * divergence[:, None] + best).min(-1).values
    assert (policies @ SCORES - bound).max() < 1e-12


def test_first_adam_step():
    """L, row 73: with g = eps = 1e-5 torch's first step is lr g / (g + eps) = lr / 2. An eps added before the
    bias of the second moment is corrected, as in TensorFlow, would make it .0306534 lr: eps is not portable.
    """
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimiser = torch.optim.AdamW([weight], lr=1.0, eps=1e-5, weight_decay=0.0)
    weight.grad = torch.full_like(weight, 1e-5)
    optimiser.step()
    assert float(weight.detach()) == pytest.approx(-0.5)
