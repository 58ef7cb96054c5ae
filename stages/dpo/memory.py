"""What `dpo` does with memory, for `align plan --memory`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.job import Input
from align.pipeline.estimate.workload import Held, Lengths, Workload, trained_model, trl_workload
from stages.dpo.config import Config


def workload(
    config: Config, inputs: Mapping[str, Input], lengths: Lengths, processes: int, evaluation: Mapping[str, Any]
) -> Workload:
    """The policy and, where one is in memory while training, the frozen reference; a pair is two sequences."""
    has_reference = config.needs_reference and not config.precompute_reference and config.lora is None
    reference = [Held("reference", "policy")] if has_reference else []
    return trl_workload(
        config,
        lengths,
        processes,
        evaluation,
        models=[trained_model(config, config.optim), *reference],
        sequences_per_row=2,
        parts=[(0, 1), (0, 2)],
        logits="fused",
    )
