"""Scores to pairs: which ones, with numbers worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.pairs import pairs

SCORES = [3.0, 5.0, 1.0, 5.0]
"""Of four answers: 1 and 3 are the best, 2 the worst."""

EXPECTED = {
    "extremes": ([(1, 2)], []),
    "best": ([(1, 0), (1, 2)], [(1, 3)]),
    "all": ([(1, 0), (0, 2), (3, 0), (1, 2), (3, 2)], [(1, 3)]),
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_pairs_and_ties(rule: str) -> None:
    """The first of the two best answers stands for both; the two against each other are a tie."""
    better, ties = EXPECTED[rule]
    found, tied = pairs(SCORES, rule)  # type: ignore[arg-type]
    assert sorted(found) == sorted(better)
    assert tied == ties


@pytest.mark.parametrize("rule", EXPECTED)
def test_equal_scores_are_only_ties(rule: str) -> None:
    """Three equal answers: 1 tie of the extremes, 2 of the best with the others, 3 of every two."""
    assert [len(part) for part in pairs([2.0, 2.0, 2.0], rule)] == [0, {"extremes": 1, "best": 2, "all": 3}[rule]]  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 3).map(float), min_size=2, max_size=7), st.sampled_from(list(EXPECTED)))
def test_the_better_answer_is_first_and_no_pair_comes_twice(scores: list[float], rule: str) -> None:
    """For any scores: 1, K - 1 or K (K - 1) / 2 pairs and ties together."""
    better, ties = pairs(scores, rule)  # type: ignore[arg-type]
    assert all(scores[a] > scores[b] for a, b in better)
    assert all(scores[a] == scores[b] for a, b in ties)
    made = {frozenset(pair) for pair in (*better, *ties)}
    count = len(scores)
    assert len(made) == len(better) + len(ties)
    assert len(made) == {"extremes": 1, "best": count - 1, "all": count * (count - 1) // 2}[rule]
