"""GAE: worked numbers (A, A2, B, C, CB, U), the definition as a sum (REF), and explained variance."""

import math

import pytest
import torch
from torch.nn.functional import pad

from stages.ppo.advantages import explained_variance, gae, length_lambda, reward_to_go

R, V = [0.0, 0.0, 1.0], [0.5, 0.6, 0.7]


def run(rewards, values, mask, lam, **more):
    rewards, values = torch.tensor([[rewards], [values]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.tensor([mask]), 1.0, lam, **more)
    return advantages[0].tolist(), returns[0].tolist()


@pytest.mark.parametrize(
    ("lam", "advantages", "returns"),
    [
        (0.0, [0.1, 0.1, 0.3], [0.6, 0.7, 1.0]),
        (0.95, [0.46575, 0.385, 0.3], [0.96575, 0.985, 1.0]),
        (1.0, [0.5, 0.4, 0.3], [1.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("padding", [0, 2])
def test_worked_example(lam, advantages, returns, padding):
    """A: delta = [.6-.5, .7-.6, 1-.7] = [.1, .1, .3]; at .95: .1+.95(.1+.95*.3) = .46575. The value after the
    last token is 0, whatever the critic says of the padding (B: with V(pad) = .2 it would be [.42965, .347,
    .26])."""
    rewards, values = R + [9.0] * padding, V + [0.2] * padding
    ours = run(rewards, values, [True] * 3 + [False] * padding, lam)
    assert ours[0] == pytest.approx(advantages + [0.0] * padding)
    assert ours[1] == pytest.approx(returns + [0.0] * padding)


@pytest.mark.parametrize(("lam", "wrong"), [(0.95, [0.42965, 0.347, 0.26]), (0.0, [0.1, 0.1, -0.5])])
def test_score_on_the_first_padding_token_is_another_estimator(lam, wrong):
    """B, row 39: what comes out if the score is put one past EOS and the padding is taken for a state. At
    lambda 0 the sign of the EOS advantage flips; at lambda 1 both agree, so a test at 1 alone would miss it.
    """
    planted, _ = run([0.0, 0.0, 0.0, 1.0], [*V, 0.2], [True] * 4, lam)
    assert planted[:3] == pytest.approx(wrong)
    ours, _ = run([*R, 0.0], [*V, 0.2], [True] * 3 + [False], lam)
    assert max(abs(a - b) for a, b in zip(ours, wrong, strict=False)) > 0.03
    assert run(R, V, [True] * 3, 1.0)[0] == pytest.approx(run([0.0, 0.0, 0.0, 1.0], [*V, 0.2], [True] * 4, 1.0)[0][:3])


def test_bootstrap_of_a_cut_response():
    """A2, row 10: r = 0 and V(s_L) = .8: delta = [.1, .1, .1]; .1 + .95 * .1 = .195; .1 + .95 * .195 = .28525. For a
    row that ended the value after it is 0, which is also what no bootstrap means."""
    cut = run([0.0] * 3, V, [True] * 3, 0.95, bootstrap=torch.tensor([0.8]))
    assert cut[0] == pytest.approx([0.28525, 0.195, 0.1])
    assert cut[1] == pytest.approx([0.78525, 0.795, 0.8])
    assert run(R, V, [True] * 3, 0.95, bootstrap=torch.zeros(1)) == run(R, V, [True] * 3, 0.95)


@pytest.mark.parametrize("junk", [0.0, 100.0, float("nan"), float("inf")])
def test_masked_values_do_not_leak(junk):
    """C and M2, row 47: r = [0,1], V = [0,0], then a masked slot. A leak of V = 100 would give [5.7, 6.0]."""
    advantages, returns = run([0.0, 1.0, junk], [0.0, 0.0, junk], [True, True, False], 0.95)
    assert advantages == pytest.approx([0.95, 1.0, 0.0])
    assert returns == pytest.approx([0.95, 1.0, 0.0])


def definition(rewards, values, mask, gamma, lam, after):
    """REF: A_t = sum_k (gamma lam)^k delta_{t+k} over the valid slots alone, each sum on its own."""
    slots = [t for t in range(len(mask)) if mask[t]]
    following = [values[t] for t in slots[1:]] + [after]
    deltas = [rewards[t] + gamma * n - values[t] for t, n in zip(slots, following, strict=True)]
    out = [0.0] * len(mask)
    for i, t in enumerate(slots):
        out[t] = sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(slots)))
    return out


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.0), (1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_recursion_equals_the_definition(holes, gamma, lam):
    """REF, row 47: also with masked tokens inside a response, where multiplying by the mask is wrong."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 16, 9, generator=generator, dtype=torch.float64)
    mask = torch.arange(9) < torch.randint(1, 10, (16, 1), generator=generator)
    if holes:
        mask &= torch.rand(16, 9, generator=generator) < 0.6
    bootstrap = torch.randn(16, generator=generator, dtype=torch.float64)
    ours, returns = gae(rewards, values, mask, gamma, lam, bootstrap)
    to_go = reward_to_go(rewards, mask, gamma)
    for i in range(16):
        row = (rewards[i].tolist(), values[i].tolist(), mask[i].tolist())
        assert ours[i].tolist() == pytest.approx(definition(*row, gamma, lam, float(bootstrap[i])), abs=1e-12)
        no_critic = (row[0], [0.0] * 9, row[2])
        assert to_go[i].tolist() == pytest.approx(definition(*no_critic, gamma, 1.0, 0.0), abs=1e-12)
    torch.testing.assert_close(returns, torch.where(mask, ours + values, 0), rtol=0, atol=0)


@pytest.mark.parametrize(("lam", "shift"), [(0.0, [0, 0, -1]), (0.95, [-0.9025, -0.95, -1]), (1.0, [-1, -1, -1])])
def test_constant_critic_offset(lam, shift):
    """CB: V + b shifts A_t by -b lambda^(L-1-t). At lambda 0 only EOS is punished, and answers would grow."""
    plain, _ = run(R, V, [True] * 3, lam)
    offset, _ = run(R, [v + 1 for v in V], [True] * 3, lam)
    assert [o - p for o, p in zip(offset, plain, strict=True)] == pytest.approx(shift)


def test_lambda_of_each_row():
    """Row 46: a lambda per row gives each row what that lambda gives it alone, in the dtype of the values."""
    rewards, values = torch.tensor([[R] * 3, [V] * 3])
    lambdas = torch.tensor([0.0, 0.95, 1.0], dtype=torch.float64)
    mask = torch.ones(3, 3, dtype=torch.bool)
    ours, returns = gae(rewards, values, mask, 1.0, lambdas)
    assert ours.dtype is returns.dtype is torch.float32
    for row, lam in enumerate(lambdas.tolist()):
        assert torch.equal(ours[row], gae(rewards, values, mask, 1.0, lam)[0][row])


def test_length_adaptive_lambda():
    """U, row 46: 1 - 1/(.05 l). At a fixed .95 a reward 100 tokens away has the weight .95^100 = .6 %; here the weights
    lambda^t add up to .05 l, so they always cover the same share of a response."""
    lengths = torch.tensor([1, 20, 50, 100, 500, 1000, 8000])
    ours = length_lambda(lengths, 0.05)
    assert ours.tolist() == pytest.approx([0, 0, 0.6, 0.8, 0.96, 0.98, 0.9975])
    assert pytest.approx(0.005921, abs=1e-6) == 0.95**100
    assert (1 / (1 - ours[2:])).tolist() == pytest.approx((0.05 * lengths[2:]).tolist())


def test_decoupled_lambda():
    """Row 46: at lambda 1 the critic's targets are the rewards to come, whatever the critic says now: its own errors
    do not get into them. At .95 they do."""
    mask = [True] * 3
    assert run(R, V, mask, 1.0)[1] == pytest.approx(reward_to_go(torch.tensor([R]), torch.ones(1, 3).bool(), 1.0)[0])
    assert run(R, [v - 5 for v in V], mask, 1.0)[1] == pytest.approx([1.0, 1.0, 1.0])
    assert run(R, V, mask, 0.95)[1] == pytest.approx([0.96575, 0.985, 1.0])


def test_rows_and_padding_are_independent():
    """Permuted rows give permuted advantages, and columns of padding give zeros."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([1, 2, 3, 4, 5, 5])[:, None]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole = torch.stack(gae(rewards, values, mask, 1.0, 0.95))
    assert torch.equal(torch.stack(gae(rewards[order], values[order], mask[order], 1.0, 0.95)), whole[:, order])
    padded = gae(pad(rewards, (0, 3), value=7), pad(values, (0, 3), value=7), pad(mask, (0, 3)), 1.0, 0.95)
    assert torch.equal(torch.stack(padded), pad(whole, (0, 3)))


def test_explained_variance():
    """1 for a perfect critic, 0 for a constant, 1 - 4/1 = -3 for one that has the sign wrong."""
    returns, mask = torch.tensor([[1.0, -1.0, 99.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 3), 5.0), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == -3
    assert math.isnan(explained_variance(returns, torch.ones(1, 3), mask))
