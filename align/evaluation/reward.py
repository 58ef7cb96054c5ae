"""How good a reward model is on held-out pairs, and whether it only counts words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from align.evaluation.statistics import mean_interval, share_interval


def pair_metrics(
    chosen: Sequence[float], rejected: Sequence[float], lengths: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Accuracy with its Wilson interval, mean margin, log loss, and the accuracy of the length-only rule.

    `lengths` are the (chosen, rejected) response lengths in tokens. A tie counts half. An accuracy no better than that
    of "the longer one wins" (or of its opposite) means that the model may have learnt length.
    """
    count = len(chosen)
    margins = [first - second for first, second in zip(chosen, rejected, strict=True)]
    right = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
    metrics: dict[str, Any] = {"pairs": count}
    metrics["accuracy"], metrics["accuracy_ci95"] = share_interval(right, count)
    metrics["margin"], metrics["margin_ci95"] = mean_interval(margins)
    metrics["log_loss"] = sum(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins) / count
    longer = sum((first > second) + 0.5 * (first == second) for first, second in lengths) / count
    metrics["length_only_accuracy"] = max(longer, 1 - longer)
    return metrics
