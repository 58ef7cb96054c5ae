"""O2, the zero-advantage oracle: at pi* with the critic V* every advantage is 0, whatever path and lambda.

r_t + V*(s') - V*(s) = 0 holds only if the score index, the KL's sign and estimator, the masks, the columns of
the values and the treatment of EOS are all right, so each of the known bugs is planted and must show.
"""

from __future__ import annotations

import pytest
import torch

from align.training.masked import length_mask, whiten
from stages.ppo.advantages import gae
from stages.ppo.kl import k1, k3
from stages.ppo.rewards import assemble, at_the_end
from tests.ppo.table_model import DEPTH, Path, World

LAMBDAS = [0.0, 0.5, 0.95, 1.0]


@pytest.fixture(params=[0, 1, 2])
def world(request) -> World:
    return World.random(request.param)


def garbage_where_unreachable(values):
    """A critic says something of padding too; nothing may read it."""
    return torch.where(values == 0, 0.2, values)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("width", [DEPTH, DEPTH + 2])
def test_advantages_vanish_at_the_optimum(world, lam, width):
    """O2, with prompts padded on the left and responses on the right."""
    path = Path(world, world.policy, garbage_where_unreachable(world.values), width)
    advantages, returns = gae(path.rewards(), path.values, path.mask, 1.0, lam)
    assert advantages.abs().max() < 1e-12
    torch.testing.assert_close(returns[path.mask], path.values[path.mask], rtol=0, atol=1e-12)
    assert whiten(advantages, path.mask).abs().max() < 1e-12, "rounding noise must not be blown up"


@pytest.mark.parametrize("lam", LAMBDAS)
def test_planted_score_past_eos(world, lam):
    """O2, row 39: the score on the first padding token, taken for a state of value 0. At EOS the advantage
    becomes -(1 - lambda) score; the largest score is 2.5, so .125 at lambda .95, and nothing at lambda 1."""
    path = Path(world, world.policy, world.values)
    lengths = path.batch.lengths + 1
    rewards = assemble(at_the_end(path.batch.scores, lengths, DEPTH + 1), path.old, path.ref, lengths, path.beta)
    rewards = torch.where(path.mask, rewards, path.batch.scores[:, None])  # no KL on the padding token
    values, mask = torch.where(path.mask, path.values, 0), length_mask(lengths, DEPTH + 1)
    advantages, _ = gae(rewards, values, mask, 1.0, lam)
    assert advantages[path.mask].abs().max() == pytest.approx((1 - lam) * 2.5, abs=1e-12)


def test_planted_score_at_the_last_column(world):
    """O2: the score at column T - 1 whatever the length. Only responses of full length keep theirs; of the
    others the largest is that of "a EOS", 1.5."""
    path = Path(world, world.policy, world.values, DEPTH)
    last = torch.where(torch.arange(DEPTH) == DEPTH - 1, path.batch.scores[:, None], 0)
    rewards = assemble(last, path.old, path.ref, path.batch.lengths, path.beta)
    advantages, _ = gae(rewards, path.values, path.mask, 1.0, 0.95)
    assert advantages.abs().max() == pytest.approx(1.5)


def test_planted_kl_sign(world):
    """O2: +beta k1 leaves 2 beta k1 per token."""
    path = Path(world, world.policy, world.values)
    scores = at_the_end(path.batch.scores, path.batch.lengths, DEPTH + 1)
    rewards = assemble(scores, path.old, path.ref, path.batch.lengths, -path.beta)
    advantages, _ = gae(rewards, path.values, path.mask, 1.0, 0.0)
    left = torch.where(path.mask, 2 * path.beta * k1(path.old, path.ref), 0)
    torch.testing.assert_close(advantages, left, rtol=0, atol=1e-12)
    assert advantages.abs().max() > 1


def test_planted_k3_in_the_reward(world):
    """O2, row 31: k3 in place of k1 leaves -beta (k3 - k1), which is not small where the reference likes a
    token that the policy avoids."""
    path = Path(world, world.policy, world.values)
    token_scores = -path.beta * torch.where(path.mask, k3(path.old, path.ref), 0)
    rewards = at_the_end(path.batch.scores, path.batch.lengths, DEPTH + 1) + token_scores
    advantages, _ = gae(rewards, path.values, path.mask, 1.0, 0.95)
    assert advantages.abs().max() > 1


@pytest.mark.parametrize("lam", LAMBDAS)
def test_planted_value_shift(world, lam):
    """O2, row 48: values read at the column of their token, one too late."""
    path = Path(world, world.policy, world.values)
    shifted = path.values.roll(-1, dims=1)
    advantages, _ = gae(path.rewards(), shifted, path.mask, 1.0, lam)
    assert advantages.abs().max() > 0.5


def test_two_token_tree():
    """O1: beta .5, two binary tokens, the second one's reference and reward given the first. V* by hand:
    V(s1=0) = .5 log(.5 e^0 + .5 e^2) = .716890, V(s1=1) = .5 log(.2 e^4 + .8 e^-2) = 1.200214."""
    beta = 0.5
    ref1 = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    ref2 = torch.tensor([[0.5, 0.5], [0.2, 0.8]], dtype=torch.float64).log()
    reward = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    v1 = beta * (ref2 + reward / beta).logsumexp(-1)
    v0 = beta * (ref1 + v1 / beta).logsumexp(-1)
    pi2, pi1 = (ref2 + reward / beta).log_softmax(-1), (ref1 + v1 / beta).log_softmax(-1)
    assert v1.tolist() == pytest.approx([0.716890, 1.200214], abs=1e-6)
    assert float(v0) == pytest.approx(0.967777, abs=1e-6)
    assert pi1.exp().tolist() == pytest.approx([0.363274, 0.636726], abs=1e-6)
    expected = [0.119203, 0.880797, 0.990182, 0.009818]
    assert pi2.exp().flatten().tolist() == pytest.approx(expected, abs=1e-6)
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    logp = torch.stack([pi1[first], pi2[first, second]], dim=1)
    logp_ref = torch.stack([ref1[first], ref2[first, second]], dim=1)
    values = torch.stack([v0.expand(4), v1[first]], dim=1)
    scores, lengths = reward[first, second], torch.full((4,), 2)
    weights = logp.sum(1).exp()
    assert (weights * scores).sum() == pytest.approx(1.574669, abs=1e-6)
    assert (weights * k1(logp, logp_ref).sum(1)).sum() == pytest.approx(1.213785, abs=1e-6)
    rewards = assemble(at_the_end(scores, lengths, 2), logp, logp_ref, lengths, beta)
    for lam in LAMBDAS:
        advantages, _ = gae(rewards, values, torch.ones(4, 2).bool(), 1.0, lam)
        assert advantages.abs().max() < 1e-12
