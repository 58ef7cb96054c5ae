"""What `base` does with memory, for `align plan --memory`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.job import Input
from align.pipeline.estimate.activations import Pass
from align.pipeline.estimate.workload import Held, Lengths, Step, Workload, evaluation_sampling
from stages.base.config import KEPT_CHECKPOINTS, Config


def workload(
    config: Config, inputs: Mapping[str, Input], lengths: Lengths, processes: int, evaluation: Mapping[str, Any]
) -> Workload:
    """One model, whose sequences are all of one length; without steps nothing but the model."""
    one = Pass(config.batch_size // processes, config.sequence_length)
    return Workload(
        [Held("trained", "policy", "all" if config.steps else "nothing")],
        [Step("trained", one, "whole")] if config.steps else [],
        [evaluation_sampling(evaluation, config.sequence_length)],
        config.steps,
        config.steps * config.batch_size * config.sequence_length,
        KEPT_CHECKPOINTS,
    )
