"""From scores to advantages, by the rules and the estimator that the recipe names. The maths of each is in rewards.py
and advantages.py."""

from __future__ import annotations

import torch
from torch import Tensor

from align.training.masked import Reduce, whiten
from stages.ppo.advantages import gae, group_relative, leave_one_out, length_lambda, reward_to_go
from stages.ppo.config import Config
from stages.ppo.rewards import at_the_end, missing_eos, overlong_penalty
from stages.ppo.rollout import Responses


def shape(config: Config, token_scores: Tensor, responses: Responses) -> tuple[Tensor, Tensor]:
    """The rules for scores: clip, missing EOS, overlong penalty, in this order, so that a cut response never loses less
    than one that ends at the cap. token_scores (B,T) -> the same, and which rows (B,) are learned from."""
    lengths, width = responses.lengths, responses.width
    if config.score_clip is not None:
        token_scores = token_scores.clamp(-config.score_clip, config.score_clip)
    shaped = missing_eos(token_scores, responses.finished, lengths, config.missing_eos)
    if config.overlong is not None:
        penalty = overlong_penalty(lengths, config.rollout.max_response_tokens, config.overlong)
        shaped = shaped + at_the_end(penalty.to(shaped.dtype), lengths, width)
    everything = torch.ones_like(responses.finished)
    return shaped, responses.finished if config.missing_eos.rule == "mask" else everything


def estimate(
    config: Config, rewards: Tensor, values: Tensor | None, responses: Responses, counted: Tensor, reduce: Reduce
) -> tuple[Tensor, Tensor | None]:
    """Advantages (B,T), 0 where nothing is learned, and the critic's targets (B,T), None without a critic.

    rewards (B,T); values (B,T+1) of the states before each token and after the last, None without a critic; `counted`
    (B,) are the rows that are learned from. Targets are never whitened.
    """
    mask, group = responses.mask, config.rollout.responses_per_prompt
    targets = None
    if config.estimator == "rloo":
        advantages = leave_one_out(rewards, mask, group, counted)
    elif config.estimator == "grpo":
        advantages = group_relative(rewards, mask, group, config.divide_by_std, counted)
    elif config.estimator == "reinforce++":
        advantages = reward_to_go(rewards, mask, config.gamma)
    else:
        assert values is not None
        advantages, targets = _with_critic(config, rewards, values, responses)
    learned = mask & counted[:, None]
    if config.whiten_advantages:
        advantages = whiten(advantages, learned, reduce)
    return torch.where(learned, advantages, 0), targets


def _with_critic(config: Config, rewards: Tensor, values: Tensor, responses: Responses) -> tuple[Tensor, Tensor]:
    bootstrap = None
    if config.missing_eos.rule == "bootstrap":
        after = values.gather(1, responses.lengths[:, None])[:, 0]
        bootstrap = torch.where(responses.finished, 0, after)
    given = (rewards, values[:, :-1], responses.mask, config.gamma)
    lam_value = config.lam if config.lam_value is None else config.lam_value
    lam = config.lam if config.lam_length is None else length_lambda(responses.lengths, config.lam_length)
    advantages, _ = gae(*given, lam, bootstrap)
    return advantages, gae(*given, lam_value, bootstrap)[1]
