"""Losses of preference pairs: pure functions of summed log-probabilities, one number for each pair.

B pairs. c and r are the chosen and the rejected response to one prompt, h(y) = log pi(y) - log ref(y) the log-ratio of
a response, in nats, h = h(c) - h(r), s the logistic function. Each loss is minimised. `beta` is the paper's, under
whatever name it has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Pairs(NamedTuple):
    """Log-probabilities of B pairs, each (B,): sums over the tokens of a response, its end of turn included."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    """Lengths of the responses."""
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    """Under the reference; None where the loss has none."""
    ref_rejected: Tensor | None = None

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """h(c) and h(r)."""
        assert self.ref_chosen is not None and self.ref_rejected is not None
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """h = h(c) - h(r)."""
        chosen, rejected = self.log_ratios
        return chosen - rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """log pi per token of either response."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def sigmoid(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7): -log s(beta h). With labels that are wrong with probability e, conservative
    DPO (Mitchell 2023): -(1 - e) log s(beta h) - e log s(-beta h), smallest at beta h = logit(1 - e), not at
    infinity."""
    return _smoothed(beta * pairs.margin, label_smoothing)


def robust(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e), whose mean
    over labels that are flipped with probability e < 1/2 is DPO's loss on the right labels. It may be negative."""
    reward = beta * pairs.margin
    right, wrong = -logsigmoid(reward), -logsigmoid(-reward)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, beta: float) -> Tensor:
    """max(0, 1 - beta h): SLiC's loss (Zhao et al. 2023) of log-ratios, as in RSO (Liu et al. 2023)."""
    return torch.relu(1 - beta * pairs.margin)


def ipo(pairs: Pairs, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): (h - 1/(2 beta))^2, of sums over tokens as in the paper."""
    return (pairs.margin - 1 / (2 * beta)) ** 2


def exo(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """EXO of pairs (Ji et al. 2024, eq. 16): KL(p || q), p = (s(beta h), s(-beta h)) and q = (1 - e, e)."""
    reward = beta * pairs.margin
    right, wrong = logsigmoid(reward), logsigmoid(-reward)
    return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (wrong - math.log(label_smoothing))


def apo_zero(pairs: Pairs, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7, plus 1): 1 - s(beta h(c)) + s(beta h(r)). Chosen answers become more
    likely and rejected ones less: for chosen answers that are better than the policy's own."""
    chosen, rejected = pairs.log_ratios
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(pairs: Pairs, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8, plus 1): s(beta h(c)) + 1 - s(beta h). Both become less likely, the
    rejected answer more so: for chosen answers that are worse than the policy's own."""
    chosen, _ = pairs.log_ratios
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * pairs.margin)


def sppo(pairs: Pairs, beta: float) -> Tensor:
    """SPPO with certain labels (Wu et al. 2024, eq. 4.7 with P = 1 and 0, eta = 1/beta):
    (h(c) - 1/(2 beta))^2 + (h(r) + 1/(2 beta))^2."""
    chosen, rejected = pairs.log_ratios
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def aot(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """Alignment by optimal transport, paired (Melnyk et al. 2024): the policy's log pi(c) - log pi(r), sorted over the
    micro-batch, against the reference's, sorted: one distribution above the other, rank by rank."""
    assert pairs.ref_chosen is not None and pairs.ref_rejected is not None
    ours, theirs = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return _smoothed(beta * (ours.sort().values - theirs.sort().values), label_smoothing)


def aot_unpaired(pairs: Pairs, beta: float, label_smoothing: float) -> Tensor:
    """Alignment by optimal transport, unpaired (Melnyk et al. 2024): h of the chosen answers, sorted over the
    micro-batch, against h of the rejected ones, sorted. Which answers had the same prompt plays no part."""
    chosen, rejected = pairs.log_ratios
    return _smoothed(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


def simpo(pairs: Pairs, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): -log s(beta (log pi(c)/|c| - log pi(r)/|r|) - gamma). No reference."""
    chosen, rejected = pairs.means
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(pairs: Pairs, beta: float) -> Tensor:
    """The odds-ratio part of ORPO (Hong et al. 2024, eq. 7; its lambda is beta): -beta log s(log odds(c) - log odds(r))
    of odds p / (1 - p), p = exp(log pi(y)/|y|). ORPO adds the likelihood of chosen answers: `sft_weight` 1."""
    chosen, rejected = pairs.means
    return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def cpo(pairs: Pairs, beta: float) -> Tensor:
    """The preference part of CPO (Xu et al. 2024): -log s(beta (log pi(c) - log pi(r))), DPO with a uniform
    reference. CPO adds the likelihood of chosen answers: `sft_weight` 1."""
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected))


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        robust,
        hinge,
        ipo,
        exo,
        apo_zero,
        apo_down,
        sppo,
        aot,
        aot_unpaired,
        simpo,
        orpo,
        cpo,
    )
}


def sft(pairs: Pairs) -> Tensor:
    """Negative log-likelihood of the chosen answer per token, -log pi(c)/|c|: what RPO (Pang et al. 2024, eq. 1) and
    ORPO add. CPO's paper has the sum over tokens."""
    return -pairs.means[0]


def rewards(loss: str, pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """What the loss compares, of the chosen and of the rejected answers: beta h with a reference; without one beta log
    pi (cpo), beta log pi per token (simpo), log odds (orpo)."""
    if loss == "simpo":
        return beta * pairs.means[0], beta * pairs.means[1]
    if loss == "orpo":
        return _log_odds(pairs.means[0]), _log_odds(pairs.means[1])
    if loss == "cpo":
        return beta * pairs.chosen, beta * pairs.rejected
    chosen, rejected = pairs.log_ratios
    return beta * chosen, beta * rejected


def _smoothed(reward: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(reward) - label_smoothing * logsigmoid(-reward)


def _log_odds(mean: Tensor) -> Tensor:
    """log p - log(1 - p) of p = exp(mean). A p of 1 to the last bit counts as the largest number below."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))
