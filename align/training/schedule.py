"""Learning-rate schedules as a pure function of the step."""

from __future__ import annotations

import math

from align.recipe.training_settings import OptimSettings


def learning_rate_factor(settings: OptimSettings, step: int, total: int) -> float:
    """What the peak learning rate is multiplied by at `step` of `total`, counted from 0.

    The warm-up rises linearly to 1; after it, linear and cosine reach 0 at `total`, which is never run, so that the
    last step still learns.
    """
    warmup = settings.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1.0, total - warmup)
    return 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
