"""Losses of preference pairs against numbers worked by hand: s is the logistic function, h the margin of log-ratios.

The example: log pi -20 and -30, log ref -22 and -28 (chosen, rejected), 10 and 12 tokens, beta 0.1. So h(c) = 2,
h(r) = -2, h = 4, and beta h = 0.4 with -log s(0.4) = 0.513015, -log s(-0.4) = 0.913015.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from stages.dpo.config import LOSS_SETTINGS, WITHOUT_REFERENCE, Config
from stages.dpo.losses import LOSSES, Pairs, aot, aot_unpaired, rewards, sft, sigmoid
from stages.dpo.trainer import pair_losses


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


EXAMPLE = Pairs(column(-20), column(-30), column(10), column(12), column(-22), column(-28))
START = Pairs(column(-22), column(-28), column(10), column(12), column(-22), column(-28))
"""The policy is the reference."""


@pytest.mark.parametrize(
    ("loss", "settings", "expected"),
    [
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.0}, 0.513015),
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, 0.553015),  # 0.9 * 0.513015 + 0.1 * 0.913015
        ("robust", {"beta": 0.1, "label_smoothing": 0.1}, 0.463015),  # (0.9 * 0.513015 - 0.1 * 0.913015) / 0.8
        ("hinge", {"beta": 0.1}, 0.6),  # 1 - 0.4
        ("ipo", {"beta": 0.1}, 1.0),  # (4 - 5)^2; with means over tokens it would be 21.467778
        # p = (s(0.4), s(-0.4)) = (0.598688, 0.401312): p log(p / 0.9) + (1 - p) log((1 - p) / 0.1)
        ("exo", {"beta": 0.1, "label_smoothing": 0.1}, 0.313594),
        ("apo_zero", {"beta": 0.1}, 0.900332),  # s(-0.2) + s(-0.2) = 2 * 0.450166
        ("apo_down", {"beta": 0.1}, 0.951146),  # s(0.2) + s(-0.4) = 0.549834 + 0.401312
        ("sppo", {"beta": 0.1}, 18.0),  # (2 - 5)^2 + (-2 + 5)^2
        ("aot", {"beta": 0.1, "label_smoothing": 0.0}, 0.513015),  # of one pair both are DPO
        ("aot_unpaired", {"beta": 0.1, "label_smoothing": 0.1}, 0.553015),
        ("simpo", {"beta": 2.0, "gamma": 1.0}, 0.693147),  # 2 * (-2 - -2.5) - 1 = 0
        ("orpo", {"beta": 1.0}, 0.451932),  # log odds of e^-2 and e^-2.5 differ by 0.559763
        ("cpo", {"beta": 0.1}, 0.313262),  # -log s(0.1 * 10)
    ],
)
def test_worked_example(loss, settings, expected):
    assert float(LOSSES[loss](EXAMPLE, **settings)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("robust", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),  # 1 / (4 beta^2)
        ("exo", -math.log(2) - 0.5 * math.log(0.999 * 0.001)),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("sppo", 500_000.0),  # 2 / (4 * 0.001^2)
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
    ],
)
def test_at_the_start(loss, expected):
    """Policy = reference, every other setting its default: all log-ratios are 0."""
    assert float(pair_losses(Config(loss=loss), START)) == pytest.approx(expected, rel=1e-12)


def gradients(loss: str, **settings: float) -> tuple[float, float]:
    """d loss / d log pi of the chosen and of the rejected answer, at the start."""
    chosen, rejected = START.chosen.clone().requires_grad_(), START.rejected.clone().requires_grad_()
    pairs = START._replace(chosen=chosen, rejected=rejected)
    losses = pair_losses(Config(loss=loss, **settings), pairs)
    found = torch.autograd.grad(losses.sum(), (chosen, rejected))
    return float(found[0]), float(found[1])


@pytest.mark.parametrize(
    ("loss", "settings", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, (-0.05, 0.05)),  # beta / 2
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.25}, (-0.025, 0.025)),  # (1 - 2 e) beta / 2
        ("robust", {"beta": 0.1, "label_smoothing": 0.25}, (-0.1, 0.1)),  # beta / 2 / (1 - 2 e)
        ("hinge", {"beta": 0.1}, (-0.1, 0.1)),
        ("ipo", {"beta": 0.1}, (-10.0, 10.0)),  # 1 / beta
        ("apo_zero", {"beta": 0.1}, (-0.025, 0.025)),  # beta / 4
        ("apo_down", {"beta": 0.1}, (0.0, 0.025)),  # beta / 4 - beta / 4: the chosen answer rests, at first
        ("sppo", {"beta": 0.1}, (-10.0, 10.0)),
        ("sigmoid", {"beta": 0.1, "sft_weight": 2.0}, (-0.25, 0.05)),  # 2 / 10 tokens more
    ],
)
def test_gradient_at_the_start(loss, settings, expected):
    """Which way each loss pushes, and how hard."""
    assert gradients(loss, **settings) == pytest.approx(expected, abs=1e-12)


def test_robust_loss_undoes_flipped_labels():
    """(1 - e) L_robust(c, r) + e L_robust(r, c) = L_DPO(c, r), for any margin: the expectation over noisy labels."""
    torch.manual_seed(0)
    chosen, rejected, zero = torch.randn(2, 50, dtype=torch.float64) * 9, column(*[0.0] * 50), column(*[1.0] * 50)
    pairs = Pairs(chosen[0], chosen[1], zero, zero, rejected, rejected)
    flipped = Pairs(chosen[1], chosen[0], zero, zero, rejected, rejected)
    for share in (0.1, 0.3):
        mixed = (1 - share) * LOSSES["robust"](pairs, 0.1, share) + share * LOSSES["robust"](flipped, 0.1, share)
        torch.testing.assert_close(mixed, sigmoid(pairs, 0.1, 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "settings", "margin"),
    [
        ("sigmoid", {"beta": 0.5, "label_smoothing": 0.1}, 4.394449),  # logit(0.9) / 0.5
        ("exo", {"beta": 0.5, "label_smoothing": 0.1}, 4.394449),  # KL(p || q) is 0 at p = q
        ("ipo", {"beta": 0.5}, 1.0),  # 1 / (2 beta), for which pi(c) = s(1) under a uniform reference
    ],
)
def test_where_the_loss_is_smallest(loss, settings, margin):
    """A finite margin, on one pair that is always labelled the same way: DPO would go to infinity."""
    zero = column(0.0)
    h = column(0.0).requires_grad_()
    optimiser = torch.optim.LBFGS([h], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = LOSSES[loss](Pairs(h, zero, zero + 1, zero + 1, zero, zero), **settings).sum()
        value.backward()
        return value

    optimiser.step(closure)
    assert float(h.detach()) == pytest.approx(margin, abs=1e-5)


def test_optimal_transport_compares_ranks():
    """Two pairs whose policy margins are (1, 5) and reference margins (3, 2): sorted, 1 against 2 and 5 against 3; the
    log-ratios of chosen answers are (0, 6) and of rejected ones (2, 3): sorted, 0 against 2 and 6 against 3."""
    pairs = Pairs(column(1, 7), column(0, 2), column(1, 1), column(1, 1), column(1, 1), column(-2, -1))
    logistic = torch.nn.functional.logsigmoid
    torch.testing.assert_close(aot(pairs, 1.0, 0.0), -logistic(column(-1, 2)))
    torch.testing.assert_close(aot_unpaired(pairs, 1.0, 0.0), -logistic(column(-2, 3)))


@pytest.mark.parametrize(
    ("loss", "beta", "expected"),
    [
        ("sigmoid", 0.1, (0.2, -0.2)),
        ("cpo", 0.1, (-2.0, -3.0)),
        ("simpo", 2.0, (-4.0, -5.0)),
        ("orpo", 0.1, (-1.854587, -2.414350)),  # log(e^-2 / (1 - e^-2)), log(e^-2.5 / (1 - e^-2.5))
    ],
)
def test_rewards(loss, beta, expected):
    """What each loss compares."""
    found = [float(one) for one in rewards(loss, EXAMPLE, beta)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_odds_of_a_certain_answer_are_finite():
    """A policy that gives an answer the probability 1 to the last bit has a loss and a gradient."""
    certain = EXAMPLE._replace(chosen=column(0.0).requires_grad_())
    loss = LOSSES["orpo"](certain, 0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), certain.chosen)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_sft_is_per_token():
    """-(-20) / 10."""
    assert float(sft(EXAMPLE)) == 2.0


def test_settings_are_the_arguments():
    """The torch-free table of what a loss takes says what its function takes, and each loss has a gradient."""
    for name, loss in LOSSES.items():
        assert list(inspect.signature(loss).parameters)[1:] == list(LOSS_SETTINGS[name])
    assert list(LOSSES) == list(LOSS_SETTINGS)
    assert set(WITHOUT_REFERENCE) == {name for name in LOSSES if _works_without_reference(name)}


def _works_without_reference(name: str) -> bool:
    alone = EXAMPLE._replace(ref_chosen=None, ref_rejected=None)
    try:
        LOSSES[name](alone, **LOSS_SETTINGS[name])
    except AssertionError:
        return False
    return True
