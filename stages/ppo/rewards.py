"""From scores to token rewards: r_t = -coef * k1_t + 1[t == L-1] * score (Ziegler et al. 2019, equation 2).

B rows, T response tokens. L counts the EOS, so the score of a finished response is the reward of choosing
EOS, and the choice of EOS is charged its KL like any other token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.masked import length_mask
from stages.ppo.config import MissingEosSettings
from stages.ppo.kl import k1


def assemble(scores: Tensor, logp_old: Tensor, logp_ref: Tensor, lengths: Tensor, coef: float) -> Tensor:
    """scores (B,), or (B,T) with one per token; logp_old, logp_ref (B,T); lengths (B,) -> rewards (B,T).

    Rewards past a row's length are 0.
    """
    width = logp_old.shape[1]
    if scores.dim() == 1:
        is_last = torch.arange(width, device=lengths.device) == lengths[:, None] - 1
        scores = torch.where(is_last, scores[:, None], 0)
    return torch.where(length_mask(lengths, width), scores - coef * k1(logp_old, logp_ref), 0)


def missing_eos(scores: Tensor, finished: Tensor, settings: MissingEosSettings) -> Tensor:
    """What responses that did not end are worth: scores (B,), finished bool (B,) -> (B,).

    The rule makes the cut part of the problem, so the value after a cut response is 0 and is not
    bootstrapped.
    """
    if settings.rule == "off":
        return scores
    replaces = settings.rule == "replace"
    return torch.where(finished, scores, settings.value if replaces else scores + settings.value)
