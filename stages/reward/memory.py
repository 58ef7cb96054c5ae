"""What `reward` does with memory, for `align plan --memory`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.job import Input
from align.pipeline.estimate.workload import Lengths, Sampling, Workload, trained_model, trl_workload
from stages.reward.config import SCORING_BATCH, Config


def workload(
    config: Config, inputs: Mapping[str, Input], lengths: Lengths, processes: int, evaluation: Mapping[str, Any]
) -> Workload:
    """One model without an output head, a pair is two sequences; then the policy is opened once more to sample what the
    score is normalised on."""
    rows = min(config.normalise.samples, SCORING_BATCH)
    prompt = lengths.longest(config.max_length, (0,))
    return trl_workload(
        config,
        lengths,
        processes,
        evaluation,
        models=[trained_model(config, config.optim, has_head=False)],
        sequences_per_row=2,
        parts=[(0, 1), (0, 2)],
        logits="none",
        samplings=[Sampling(rows, prompt + config.normalise.max_response_tokens)],
        reopened="policy",
    )
