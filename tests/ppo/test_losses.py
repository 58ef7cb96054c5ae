"""PPO's losses: clip tables (H, I), sums (N), the first gradient (W), the KL as a loss (row 32), masked slots (M1, M2),
gradcheck."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import pad

from align.models.roles import Role
from align.training.logprobs import state_logprobs
from align.training.masked import length_mask, masked_sum
from stages.ppo.losses import kl_loss, policy_loss, value_loss
from stages.ppo.settings import ClipSettings

ONE = torch.ones(1, 1, dtype=torch.bool)
CLIP = ClipSettings(policy=0.2)
MAXIMA = {"ratio_max", "log_ratio_max"}


def loss_and_gradient(advantage, ratio, **clip):
    logp = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    zero = torch.zeros_like(logp)
    loss, _ = policy_loss(logp, zero, torch.full_like(zero, advantage), ONE, ClipSettings(policy=0.2, **clip))
    loss.backward()
    assert logp.grad is not None
    return float(loss.detach()), float(logp.grad)


H = [
    (1, 0.5, -0.5, -0.5),
    (1, 0.9, -0.9, -0.9),
    (1, 1.1, -1.1, -1.1),
    (1, 1.5, -1.2, 0),
    (-1, 0.5, 0.8, 0),
    (-1, 0.9, 0.9, 0.9),
    (-1, 1.5, 1.5, 1.5),
    (-1, 10, 10, 10),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient"), H)
def test_policy_clip(advantage, ratio, loss, gradient):
    """H, row 63: the gradient vanishes only where going on would be a gain already taken."""
    assert loss_and_gradient(advantage, ratio) == pytest.approx((loss, gradient))


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient"), [*H[:-1], (-1, 10, 3, 0)])
def test_dual_clip(advantage, ratio, loss, gradient):
    """H, row 64: with c = 3 only (A = -1, ratio = 10) changes, to loss 3 and gradient 0."""
    assert loss_and_gradient(advantage, ratio, dual=3.0) == pytest.approx((loss, gradient))


def test_clip_high_moves_the_upper_bound_alone():
    assert loss_and_gradient(1, 1.5, policy_high=0.28) == pytest.approx((-1.28, 0))
    assert loss_and_gradient(-1, 0.5, policy_high=0.28) == pytest.approx((0.8, 0))


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (0.5, 0, 1, 0.32, 0),
        (0.1, 0, 1, 0.405, -0.9),
        (-0.5, 0, 1, 1.125, -1.5),
        (0.5, 0, 0.3, 0.02, 0.2),
        (1.5, 0, 1, 0.32, 0),
    ],
)
def test_value_clip(value, old, target, loss, gradient):
    """I, row 53: half the larger of the two squared errors."""
    v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    ours, _ = value_loss(v, torch.full_like(v, old), torch.full_like(v, target), ONE, 0.2)
    ours.backward()
    assert v.grad is not None
    assert (float(ours.detach()), float(v.grad)) == pytest.approx((loss, gradient))


def test_value_loss_without_clip():
    values, returns = torch.tensor([[0.5, 3.0]]), torch.tensor([[1.0, 1.0]])
    loss, stats = value_loss(values, torch.zeros(1, 2), returns, torch.ones(1, 2, dtype=torch.bool), None)
    assert (float(loss), float(stats["clipfrac"])) == (0.5 * 0.25 + 0.5 * 4, 0)


def test_overflowing_ratio_stays_finite():
    """Row 28: log-ratios of +-1000 count as +-20, have no gradient, and are counted; 20 itself is not clamped, and
    what is masked is not counted."""
    logp = torch.tensor([[1000.0, -1000.0, 20.0, 1000.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    loss, stats = policy_loss(logp, torch.zeros(1, 4), torch.tensor([[-1.0, -1.0, 1.0, -1.0]]), mask, CLIP)
    loss.backward()
    assert logp.grad is not None
    assert loss.isfinite()
    assert logp.grad.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert float(stats["ratio_clamped"]) == 2
    assert float(stats["log_ratio_max"]) == 1000.0


@pytest.fixture
def toy():
    """Eight rows of different lengths, ratios on both sides of the clip range but never near its edges."""
    generator = torch.Generator().manual_seed(0)
    logp_old, advantages, values_old, returns = torch.randn(4, 8, 6, generator=generator, dtype=torch.float64)
    steps = torch.tensor([-0.5, -0.1, 0.05, 0.1, 0.6], dtype=torch.float64)
    step = steps[torch.randint(5, (8, 6), generator=generator)]
    mask = length_mask(torch.tensor([1, 2, 3, 4, 5, 6, 6, 2]), 6)
    return {
        "logp_new": logp_old + step,
        "logp_old": logp_old,
        "logp_ref": torch.randn(8, 6, generator=generator, dtype=torch.float64),
        "advantages": advantages,
        "values": values_old + step,
        "values_old": values_old,
        "returns": returns,
        "mask": mask,
    }


def all_losses(batch):
    """Sums, stats, and the gradients wrt what the networks put out."""
    new, values = (batch[name].detach().clone().requires_grad_() for name in ("logp_new", "values"))
    pg, stats = policy_loss(new, batch["logp_old"], batch["advantages"], batch["mask"], CLIP)
    vf, value_stats = value_loss(values, batch["values_old"], batch["returns"], batch["mask"], 0.2)
    kl = kl_loss(new, batch["logp_old"], batch["logp_ref"], batch["mask"])
    (pg + vf + kl).backward()
    stats = stats | {f"value_{name}": x for name, x in value_stats.items()}
    stats |= {"pg": pg.detach(), "vf": vf.detach(), "kl": kl.detach()}
    return stats, torch.stack([new.grad, values.grad])


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_any_split_into_micro_batches_gives_the_same_sums(toy, micro_batches):
    """Rows 66 and 67: losses and stats are sums, so micro-batches add up; one division remains to be made."""
    whole, gradient = all_losses(toy)
    size = 8 // micro_batches
    parts = [all_losses({name: x[i : i + size] for name, x in toy.items()}) for i in range(0, 8, size)]
    added = {
        name: torch.stack([stats[name] for stats, _ in parts]).max()
        if name in MAXIMA
        else torch.stack([stats[name] for stats, _ in parts]).sum()
        for name in whole
    }
    same(added, whole)
    torch.testing.assert_close(torch.cat([g for _, g in parts], dim=1), gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", [[2], [1, 1]])
def test_short_rows_do_not_weigh_more(split):
    """N, row 66: lengths 1 and 3 with A = +1 and -1 at ratio 1: (-1 + 3)/4 = .5; a mean of means is 0."""
    mask = length_mask(torch.tensor([1, 3]), 3)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    zeros = torch.zeros(2, 3)
    parts = zip(zeros.split(split), advantages.split(split), mask.split(split), strict=True)
    total = sum(policy_loss(z, z, a, m, CLIP)[0] for z, a, m in parts)
    assert total / mask.sum() == 0.5


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_slots_do_not_matter(toy, junk):
    """M1, M2, row 27: losses, stats and gradients are finite and unchanged whatever every tensor holds."""
    dirty = {name: x if name == "mask" else torch.where(toy["mask"], x, junk) for name, x in toy.items()}
    clean, clean_gradient = all_losses(toy)
    ours, gradient = all_losses(dirty)
    same(ours, clean)
    assert gradient.isfinite().all()
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[:, ~toy["mask"]] == 0).all()


@pytest.mark.parametrize("sides", [(3, 0), (0, 3), (2, 2)])
def test_columns_of_padding_change_nothing(toy, sides):
    """M1: a wider batch dilutes neither the losses nor the stats."""
    whole, gradient = all_losses(toy)
    wider, wide_gradient = all_losses({name: pad(x, sides) for name, x in toy.items()})
    same(wider, whole)
    assert torch.equal(wide_gradient, pad(gradient, sides))


def test_order_of_rows_and_copies(toy):
    """Permuted rows permute the gradient; a batch taken twice doubles the sums, so token means stay."""
    whole, gradient = all_losses(toy)
    order = torch.tensor([4, 2, 7, 0, 1, 6, 3, 5])
    permuted, permuted_gradient = all_losses({name: x[order] for name, x in toy.items()})
    same(permuted, whole)
    assert torch.equal(permuted_gradient, gradient[:, order])
    twice, _ = all_losses({name: torch.cat([x, x]) for name, x in toy.items()})
    same(twice, {name: x if name in MAXIMA else 2 * x for name, x in whole.items()})


def test_stats_by_hand():
    """Row 81: valid ratios .5, .5, .9, 1.5 with A = -1, -1, 1, 1: two tokens are clipped below, one above,
    and .5 (2 log(.5)^2 + log(.9)^2 + log(1.5)^2) = .5 (.960906 + .011101 + .164402).
    """
    logp = torch.tensor([[0.5, 0.5, 0.9, 1.5, 9.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True, True, False]])
    advantages = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    _, stats = policy_loss(logp, torch.zeros_like(logp), advantages, mask, CLIP)
    expected = {
        "approxkl": 0.5682045,
        "clipfrac_low": 2,
        "clipfrac_high": 1,
        "ratio": 3.4,
        "ratio_squared": 3.56,
        "ratio_clamped": 0,
        "ratio_max": 1.5,
        "log_ratio_max": 0.6931472,
    }
    assert {name: float(x) for name, x in stats.items()} == pytest.approx(expected, abs=1e-6)


def test_padding_is_not_the_largest_ratio():
    """M1: a masked slot has the ratio 1 inside the loss; it must not show when every valid ratio is below."""
    logp = torch.tensor([[0.5, 1.0]]).log()
    _, stats = policy_loss(logp, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[True, False]]), CLIP)
    assert float(stats["ratio_max"]) == pytest.approx(0.5)


LOGITS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TOKENS = torch.tensor([[0, 1, 2, 3], [4, 3, 0, 0]])
MASK = length_mask(torch.tensor([4, 2]), 4)
ROLE = Role(nn.Identity(), None, nn.Identity(), width=5)
"""Its states are the logits themselves."""


def logprobs_and_entropy(logits):
    """(2,4,5) -> twice (2,4), by the code that the trainer uses."""
    return state_logprobs(ROLE, logits, TOKENS, MASK, 1.0, with_entropy=True)


def logprobs(logits):
    return logprobs_and_entropy(logits)[0]


def test_first_gradient_is_reinforce():
    """W, row 65: before the first update the gradient is that of -sum A log pi, exactly."""
    advantages = torch.randn(2, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logp = logprobs(LOGITS).requires_grad_()
    loss, stats = policy_loss(logp, logp.detach(), advantages, MASK, CLIP)
    (ours,) = torch.autograd.grad(loss, logp)
    assert torch.equal(ours, torch.where(MASK, -advantages, 0))
    assert float(stats["approxkl"]) == float(stats["clipfrac_low"]) == float(stats["clipfrac_high"]) == 0


@pytest.mark.parametrize("steps", [0.1, 0.5])
@pytest.mark.parametrize("clip", [CLIP, ClipSettings(policy=0.2, policy_high=0.28), ClipSettings(policy=0.2, dual=3.0)])
def test_policy_gradient_by_finite_differences(steps, clip):
    """From the logits to the loss, inside and outside the clip range, away from its kinks."""
    generator = torch.Generator().manual_seed(5)
    advantages, noise = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    logp_old = logprobs(LOGITS) - steps * noise.sign()
    logits = LOGITS.clone().requires_grad_()
    assert gradcheck(
        lambda z: policy_loss(logprobs(z), logp_old, advantages, MASK, clip)[0],
        logits,
    )


def test_other_gradients_by_finite_differences():
    """Value loss with and without clipping, the entropy bonus, PPO-ptx, and the KL as a loss: its ratio has no
    gradient, so it is held at fixed values while the logits are moved."""
    generator = torch.Generator().manual_seed(6)
    values, values_old, returns, step = torch.randn(4, 2, 4, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    for clip in (None, 0.2):
        assert gradcheck(lambda v, c=clip: value_loss(v, values_old, returns, MASK, c)[0], values)
    logits = LOGITS.clone().requires_grad_()
    ref = logprobs(LOGITS.flip(-1))
    assert gradcheck(lambda z: masked_sum(logprobs_and_entropy(z)[1], MASK), logits)
    assert gradcheck(lambda z: -masked_sum(logprobs(z), MASK), logits)
    assert gradcheck(
        lambda z: kl_loss(logp := logprobs(z), logp.detach() - step, ref, MASK),
        logits,
    )


def test_kl_loss_by_hand():
    """Row 32: k2 = .5 log(pi/ref)^2 times the ratio pi/old, and the gradient ratio * log(pi/ref): with pi/ref = e and
    pi/old = 2 that is 1 and 2; with pi/ref = e^-2 and pi/old = .5, 1 and -1. The ratio itself has no gradient."""
    logp = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    old = -torch.tensor([[2.0, 0.5, 7.0]], dtype=torch.float64).log()
    ref = torch.tensor([[-1.0, 2.0, 7.0]], dtype=torch.float64)
    loss = kl_loss(logp, old, ref, torch.tensor([[True, True, False]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2)
    assert logp.grad is not None
    assert logp.grad.tolist() == [pytest.approx([2.0, -1.0, 0.0])]


def test_kl_loss_is_the_kl_also_off_policy():
    """Row 32: the tokens come from another policy than the one that is trained. With the ratio the expected gradient
    is that of KL(pi || ref); without it (all ratios 1) it is another one."""
    logits, sampler, ref = torch.randn(3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    q, ref = sampler.log_softmax(-1), ref.log_softmax(-1)
    z = logits.requires_grad_()
    logp = z.log_softmax(-1)
    (true,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), z, retain_graph=True)

    def expected_gradient(old):
        """Each token on its own, weighted by the probability with which it was sampled."""
        each = [kl_loss(*(x[t].view(1, 1) for x in (logp, old, ref)), ONE) for t in range(5)]
        return torch.autograd.grad(sum(p * x for p, x in zip(q.exp(), each, strict=True)), z, retain_graph=True)[0]

    torch.testing.assert_close(expected_gradient(q), true, rtol=0, atol=1e-12)
    assert (expected_gradient(logp.detach()) - true).abs().max() > 0.1
