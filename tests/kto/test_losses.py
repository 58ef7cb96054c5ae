"""KTO's loss, its weights and its mismatched pairs, worked by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from datasets import Dataset as Table
from torch import Tensor

from stages.kto.losses import class_weights, kl_estimate, kto, mismatches
from stages.kto.trainer import auc, with_mismatches


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_worked_example():
    """beta 0.1, z0 = 1: a good answer with h = 2 has 1 - s(0.1 (2 - 1)) = 0.475021, a bad one with h = -2 has 1 - s(0.1
    (1 + 2)) = 0.425557; weights multiply."""
    losses = kto(column(2, -2), torch.tensor([True, False]), column(1)[0], 0.1, 1.0, 1.0)
    assert losses.tolist() == pytest.approx([0.475021, 0.425557], abs=1e-6)
    weighted = kto(column(2, -2), torch.tensor([True, False]), column(1)[0], 0.1, 3.0, 0.5)
    assert weighted.tolist() == pytest.approx([3 * 0.475021, 0.5 * 0.425557], abs=1e-6)


def test_at_the_start():
    """h = 0 and z0 = 0: every answer has 1/2, and the gradient is beta / 4 towards good answers and away from bad."""
    log_ratios = column(0, 0).requires_grad_()
    losses = kto(log_ratios, torch.tensor([True, False]), column(0)[0], 0.1, 1.0, 1.0)
    assert losses.tolist() == [0.5, 0.5]
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratios)
    assert gradient.tolist() == pytest.approx([-0.025, 0.025])


def test_the_gain_saturates_in_both_directions():
    """Little is learnt from answers far from z0 on either side: the gradient at |h - z0| = 100 is below 1e-5 of that at
    0, while DPO's stays beta on the wrong side."""
    log_ratios = column(-100, 1, 102).requires_grad_()
    losses = kto(log_ratios, torch.tensor([True] * 3), column(1)[0], 0.2, 1.0, 1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratios)
    assert gradient[[0, 2]].abs().max() < 1e-5 * gradient[1].abs()


def test_a_bad_value_is_not_hidden():
    """A NaN log-ratio makes a NaN loss, for the guard to find. (TRL's KTO takes the mean of what is not NaN.)"""
    assert kto(column(float("nan")), torch.tensor([True]), column(0)[0], 0.1, 1.0, 1.0).isnan().all()


@pytest.mark.parametrize(
    ("log_ratios", "expected"),
    [
        ([1.0, 3.0], 2.0),
        ([-1.0, -3.0], 0.0),  # a KL is not negative
        ([4.0, float("nan"), 0.0], 2.0),  # a prompt without another answer does not count
        ([float("nan")], 0.0),
    ],
)
def test_kl_estimate(log_ratios, expected):
    values = column(*log_ratios).requires_grad_()
    estimate = kl_estimate(values)
    assert float(estimate) == expected
    assert not estimate.requires_grad


def test_class_weights():
    """1 good among 4: 4 / 2 = 2 and 4 / 6; the sums over either class are 2, and the mean weight is 1."""
    assert class_weights(1, 3) == pytest.approx((2, 2 / 3))
    assert class_weights(5, 5) == (1, 1)


def test_mismatches_have_another_prompt_and_spread():
    """Two answers to each of 30 prompts, as of preferences: none is matched with an answer to its own prompt, and most
    answers are taken once. (By the neighbour, half of all would be answers to the same prompt.)"""
    prompts = [number // 2 for number in range(60)]
    partners = mismatches(prompts, seed=3)
    assert all(partner is not None and prompts[partner] != prompts[row] for row, partner in enumerate(partners))
    assert Counter(partners).most_common(1)[0][1] <= 3
    assert len(set(partners)) >= 55
    assert mismatches(prompts, seed=3) == partners != mismatches(prompts, seed=4)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [([], []), (["a"], [None]), (["a", "a"], [None, None]), (["a", "b"], [1, 0])],
)
def test_few_rows(prompts, expected):
    assert mismatches(prompts, seed=0) == expected


def test_one_prompt_among_many_of_another():
    """Nine answers to one prompt and one to another: the nine share it."""
    assert set(mismatches(["a"] * 9 + ["b"], seed=1)[:9]) == {9}


def test_mismatched_answers_fit():
    """prompt_ids + mismatched_ids has at most max_length tokens, or there is none: the model may have no more room."""
    rows = Table.from_list(
        [
            {"prompt_ids": [1, 2], "response_ids": [3], "is_good": True},
            {"prompt_ids": [4], "response_ids": [5, 6, 7], "is_good": False},
        ]
    )
    assert [row["mismatched_ids"] for row in with_mismatches(rows, 4, seed=0)] == [[], [3]]
    assert [row["mismatched_ids"] for row in with_mismatches(rows, 5, seed=0)] == [[5, 6, 7], [3]]


def test_answers_to_one_prompt_have_no_mismatch():
    rows = Table.from_list([{"prompt_ids": [1], "response_ids": [2], "is_good": good} for good in (True, False)])
    assert list(with_mismatches(rows, 9, seed=0)["mismatched_ids"]) == [[], []]


def test_auc():
    """Good 3, 1, 1; bad 2, 1: right are 3 > 2, 3 > 1; ties are two of 1 = 1; wrong two of 1 < 2. (2 + 2 / 2) / 6."""
    assert auc(column(3, 1, 1), column(2, 1)) == pytest.approx(0.5)
    assert auc(column(2), column(1)) == 1
