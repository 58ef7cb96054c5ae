"""DPO and its relatives: the losses of stages/dpo/losses.py on the trainer of whole responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.evaluation.likelihood import response_logprob_sums
from align.evaluation.statistics import share_interval
from align.models.roles import Role
from align.training.responses import ResponseTrainer, Scored
from stages.dpo.config import Config
from stages.dpo.losses import LOSSES, Pairs, rewards, sft


def pair_losses(config: Config, pairs: Pairs) -> Tensor:
    """The loss of each pair (B,), with the likelihood of chosen answers as far as it is added."""
    losses = LOSSES[config.loss](pairs, **config.loss_settings)
    return losses + config.sft_share * sft(pairs) if config.sft_share else losses


def pair_rewards(config: Config, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """What the loss compares, of chosen and rejected answers (B,)."""
    return rewards(config.loss, pairs, config.loss_settings["beta"])


class PreferenceTrainer(ResponseTrainer):
    """Rows have `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    responses = ("chosen_ids", "rejected_ids")

    def __init__(self, config: Config, *arguments: Any):
        """`arguments` as those of every ResponseTrainer."""
        super().__init__(*arguments)
        self.config = config

    def row_losses(self, scored: Scored, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each pair, and its metrics."""
        pairs = Pairs(*scored.policy, *scored.tokens, *(scored.reference if scored.reference is not None else ()))
        chosen, rejected = pair_rewards(self.config, pairs)
        self.note("rewards/chosen", chosen)
        self.note("rewards/rejected", rejected)
        self.note("rewards/margins", chosen - rejected)
        self.note("rewards/accuracies", chosen > rejected)
        self.note("logps/chosen", pairs.chosen)
        self.note("logps/rejected", pairs.rejected)
        if pairs.ref_chosen is not None:
            for side, log_ratio in zip(("chosen", "rejected"), pairs.log_ratios, strict=True):
                self.note(f"log_ratios/{side}", log_ratio)
        return pair_losses(self.config, pairs)


def held_out_metrics(
    config: Config, policy: Role, reference: Role | None, rows: Sequence[Mapping[str, list[int]]], pad_id: int
) -> dict[str, Any]:
    """How often the policy ranks a held-out pair right by what the loss compares, with its interval; and, with a
    reference, how much likelier than at the start a token of chosen and of rejected answers is, in nats."""
    prompts = [row["prompt_ids"] for row in rows]
    answers = [[row[name] for row in rows] for name in PreferenceTrainer.responses]
    columns = [response_logprob_sums(policy, prompts, texts, pad_id) for texts in answers]
    columns += [[len(text) for text in texts] for texts in answers]
    if reference is not None:
        columns += [response_logprob_sums(reference, prompts, texts, pad_id) for texts in answers]
    pairs = Pairs(*(torch.tensor(column, dtype=torch.float64) for column in columns))
    chosen, rejected = pair_rewards(config, pairs)
    accuracy, interval = share_interval(int((chosen > rejected).sum()), len(rows))
    metrics: dict[str, Any] = {"accuracy": accuracy, "accuracy_ci95": interval, "pairs": len(rows)}
    if reference is not None:
        ratios = [log_ratio.sum() / count.sum() for log_ratio, count in zip(pairs.log_ratios, pairs[2:4], strict=True)]
        metrics |= {"chosen_log_ratio": float(ratios[0]), "rejected_log_ratio": float(ratios[1])}
    return metrics
