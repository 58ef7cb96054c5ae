"""What `kto` does with memory, for `align plan --memory`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.job import Input
from align.pipeline.estimate.workload import Held, Lengths, Workload, trained_model, trl_workload
from stages.kto.config import Config


def workload(
    config: Config, inputs: Mapping[str, Input], lengths: Lengths, processes: int, evaluation: Mapping[str, Any]
) -> Workload:
    """The policy and, where one is in memory while training, the frozen reference. The answers that the KL is estimated
    on have no gradient."""
    has_reference = not config.precompute_reference and config.lora is None
    return trl_workload(
        config,
        lengths,
        processes,
        evaluation,
        models=[trained_model(config, config.optim), *([Held("reference", "policy")] if has_reference else [])],
        sequences_per_row=1,
        parts=[(0, 1)],
        logits="fused",
    )
