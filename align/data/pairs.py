"""Scored answers to pairs of a better and a worse one, by a stated rule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from align.recipe.data_settings import PairRule

Pair = tuple[int, int]
"""Two positions in a list of answers; in a pair that is no tie, the better answer is first."""


def pairs(scores: Sequence[float], rule: PairRule) -> tuple[list[Pair], list[Pair]]:
    """The pairs that `rule` makes of K scored answers, and those of them that are ties. Higher scores are better.

    extremes: the best against the worst, one pair. best: the best against each other one, K - 1 pairs.
    all: every two, K (K - 1) / 2 pairs. Of several best (or worst) answers the first counts. A tie is a pair of equal
    scores: it says nothing about preference.
    """
    best, worst = (scores.index(of(scores)) for of in (max, min))
    if rule == "all":
        chosen = list(combinations(range(len(scores)), 2))
    elif rule == "best":
        chosen = [(best, other) for other in range(len(scores)) if other != best]
    else:
        chosen = [(best, worst if worst != best else best + 1)]
    better = [(a, b) if scores[a] > scores[b] else (b, a) for a, b in chosen if scores[a] != scores[b]]
    return better, [(a, b) for a, b in chosen if scores[a] == scores[b]]
