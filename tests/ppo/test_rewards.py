"""Reward assembly and the rule for responses that did not end (row 9, oracle P6)."""

import pytest
import torch

from stages.ppo.config import MissingEosSettings
from stages.ppo.rewards import assemble, missing_eos

OLD = torch.tensor([[0.1, 0.2, 0.3, float("nan")], [0.4, float("inf"), 9.0, 9.0]])
REF = torch.zeros(2, 4)
LENGTHS = torch.tensor([3, 1])


def test_score_is_on_the_last_valid_token():
    """Rows 5 and 39: -.5 k1 on every token, EOS included, and the score at L - 1, not on the padding."""
    rewards = assemble(torch.tensor([2.0, -1.0]), OLD, REF, LENGTHS, 0.5)
    expected = torch.tensor([[-0.05, -0.1, 2 - 0.15, 0.0], [-1 - 0.2, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_the_penalty_is_signed():
    """Row 31: a token that the reference likes more is rewarded; |k1| would punish it."""
    old, ref = torch.tensor([[-2.0]]), torch.tensor([[-1.0]])
    rewards = assemble(torch.zeros(1), old, ref, torch.tensor([1]), 0.5)
    assert float(rewards) == 0.5


def test_scores_of_single_tokens():
    """Row 44: scores (B,T) are added where they are; those past the end are dropped."""
    dense = torch.tensor([[1.0, 0.0, 2.0, 7.0], [3.0, 7.0, 7.0, 7.0]])
    rewards = assemble(dense, REF, REF, LENGTHS, 0.5)
    assert rewards.tolist() == [[1.0, 0.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]]
    last_only = torch.tensor([[0.0, 0.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    of_rows = assemble(torch.tensor([2.0, 3.0]), OLD, REF, LENGTHS, 0.5)
    torch.testing.assert_close(assemble(last_only, OLD, REF, LENGTHS, 0.5), of_rows)


@pytest.mark.parametrize(
    ("rule", "expected"), [("replace", [0.5, -1.0]), ("subtract", [0.5, 1.0]), ("off", [0.5, 2.0])]
)
def test_missing_eos(rule, expected):
    """P6: scores .5 (finished) and 2 (cut), value -1."""
    settings = MissingEosSettings(rule=rule, value=-1.0)
    ours = missing_eos(torch.tensor([0.5, 2.0]), torch.tensor([True, False]), settings)
    assert ours.tolist() == expected
