"""What `sft` does with memory, for `align plan --memory`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.job import Input
from align.pipeline.estimate.workload import Lengths, Workload, trained_model, trl_workload
from stages.sft.config import Config


def workload(
    config: Config, inputs: Mapping[str, Input], lengths: Lengths, processes: int, evaluation: Mapping[str, Any]
) -> Workload:
    """One model; rows are conversations."""
    return trl_workload(
        config,
        lengths,
        processes,
        evaluation,
        models=[trained_model(config, config.optim)],
        sequences_per_row=1,
        parts=[(0,)],
        logits="fused",
    )
