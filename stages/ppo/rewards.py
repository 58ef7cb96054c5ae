"""From scores to token rewards: r_t = score_t - coef * k1_t (Ziegler et al. 2019, equation 2).

B rows, T response tokens. Scores are per token, (B,T); the score of a whole response sits on its last valid token.
Lengths (B,) count the EOS, so the score of a finished response is the reward of choosing EOS, and the choice of EOS is
charged its KL like any other token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.masked import length_mask
from stages.ppo.kl import k1
from stages.ppo.settings import MissingEosSettings, OverlongSettings


def at_the_end(scores: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Scores of whole responses (B,), lengths (B,) -> (B, width): on the last valid token, 0 elsewhere."""
    is_last = torch.arange(width, device=lengths.device) == lengths[:, None] - 1
    return torch.where(is_last, scores[:, None], 0)


def missing_eos(token_scores: Tensor, finished: Tensor, lengths: Tensor, settings: MissingEosSettings) -> Tensor:
    """What responses that did not end are worth: token scores (B,T), finished bool (B,), lengths (B,) -> (B,T).

    replace and subtract make the cut part of the problem, so the value after a cut response is 0. bootstrap is the
    opposite: no score, and the value after the cut is the critic's; both at once would count it twice. mask changes
    no score: the rows are left out of everything that is learned.
    """
    if settings.rule in {"off", "mask"}:
        return token_scores
    value = 0.0 if settings.rule == "bootstrap" else settings.value
    last = at_the_end(token_scores.new_full(lengths.shape, value), lengths, token_scores.shape[1])
    return torch.where(finished[:, None], token_scores, token_scores + last if settings.rule == "subtract" else last)


def overlong_penalty(lengths: Tensor, cap: int, settings: OverlongSettings) -> Tensor:
    """lengths (B,) -> (B,), at most 0: 0 up to cap - buffer tokens, then linearly down to -penalty at the cap (Yu et
    al. 2025, equation 13)."""
    over = (lengths - (cap - settings.buffer)) / settings.buffer
    return -settings.penalty * over.clamp(0, 1)


def assemble(token_scores: Tensor, logp_old: Tensor, logp_ref: Tensor, lengths: Tensor, coef: float) -> Tensor:
    """token_scores, logp_old, logp_ref (B,T); lengths (B,) -> rewards (B,T), 0 past a row's length."""
    valid = length_mask(lengths, logp_old.shape[1])
    return torch.where(valid, token_scores - coef * k1(logp_old, logp_ref), 0)
