"""From scores to token rewards: where scores sit, the KL, responses that did not end (P6), and long ones (row 45)."""

import pytest
import torch

from align.training.masked import length_mask, masked_sum, moments, whiten
from stages.ppo.advantages import gae
from stages.ppo.rewards import assemble, at_the_end, missing_eos, overlong_penalty
from stages.ppo.settings import MissingEosSettings, OverlongSettings

OLD = torch.tensor([[0.1, 0.2, 0.3, float("nan")], [0.4, float("inf"), 9.0, 9.0]])
REF = torch.zeros(2, 4)
LENGTHS = torch.tensor([3, 1])


def test_score_is_on_the_last_valid_token():
    """Rows 5 and 39: -.5 k1 on every token, EOS included, and the score at L - 1, not on the padding."""
    rewards = assemble(at_the_end(torch.tensor([2.0, -1.0]), LENGTHS, 4), OLD, REF, LENGTHS, 0.5)
    expected = torch.tensor([[-0.05, -0.1, 2 - 0.15, 0.0], [-1 - 0.2, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_the_penalty_is_signed():
    """Row 31: a token that the reference likes more is rewarded; |k1| would punish it."""
    old, ref = torch.tensor([[-2.0]]), torch.tensor([[-1.0]])
    rewards = assemble(torch.zeros(1, 1), old, ref, torch.tensor([1]), 0.5)
    assert float(rewards) == 0.5


def test_scores_of_single_tokens():
    """Row 44: scores of tokens stay where they are, also next to that of the response; those past the end are
    dropped."""
    dense = torch.tensor([[1.0, 0.0, 2.0, 7.0], [3.0, 7.0, 7.0, float("nan")]])
    rewards = assemble(dense, REF, REF, LENGTHS, 0.5)
    assert rewards.tolist() == [[1.0, 0.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0]]
    both = assemble(dense + at_the_end(torch.tensor([10.0, 20.0]), LENGTHS, 4), REF, REF, LENGTHS, 0.5)
    assert both.tolist() == [[1.0, 0.0, 12.0, 0.0], [23.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("rule", "cut"),
    [
        ("replace", [0.0, -1.0, 0.0]),
        ("subtract", [0.3, 1.0, 0.0]),
        ("off", [0.3, 2.0, 0.0]),
        ("bootstrap", [0.0, 0.0, 0.0]),
        ("mask", [0.3, 2.0, 0.0]),
    ],
)
def test_missing_eos(rule, cut):
    """P6, rows 9 to 11: a response that ended keeps its scores; of a cut one, replace and bootstrap drop those of
    single tokens too, subtract lowers the last one."""
    scores = torch.tensor([[0.1, 0.2, 0.5], [0.3, 2.0, 0.0]])
    settings = MissingEosSettings(rule=rule, value=-1.0)
    ours = missing_eos(scores, torch.tensor([True, False]), torch.tensor([3, 2]), settings)
    torch.testing.assert_close(ours, torch.tensor([[0.1, 0.2, 0.5], cut]))


@pytest.mark.parametrize("rule", ["replace", "bootstrap"])
def test_a_replaced_score_leaves_no_trace(rule):
    """M2: a reward that has no answer for a cut response (NaN) does not matter under a rule that drops it."""
    scores = torch.tensor([[float("nan"), float("nan")]])
    settings = MissingEosSettings(rule=rule)
    assert missing_eos(scores, torch.tensor([False]), torch.tensor([2]), settings).isfinite().all()


def test_bootstrap_counts_the_cut_once():
    """Row 10 and A2: with V = [.5, .6, .7], .8 after the cut and lambda .95, a cut response that scored 5 gets the
    advantages of r = 0: [.28525, .195, .1]. With the penalty of -1 on top, the cut would count twice: -.9 at its end.
    """
    values, after = torch.tensor([[0.5, 0.6, 0.7]]), torch.tensor([0.8])
    lengths, mask = torch.tensor([3]), torch.ones(1, 3, dtype=torch.bool)
    scores = at_the_end(torch.tensor([5.0]), lengths, 3)

    def advantages(rule):
        rewards = missing_eos(scores, torch.tensor([False]), lengths, MissingEosSettings(rule=rule))
        return gae(rewards, values, mask, 1.0, 0.95, after)[0][0].tolist()

    assert advantages("bootstrap") == pytest.approx([0.28525, 0.195, 0.1])
    assert advantages("replace")[-1] == pytest.approx(-0.9)


def test_overlong_penalty():
    """Row 45: the published cap of 20480 tokens with a buffer of 4096: nothing up to 16384, then linear to -1. A longer
    response than the cap cannot lose more."""
    lengths = torch.tensor([1, 16384, 16385, 18432, 20480, 30000])
    ours = overlong_penalty(lengths, 20480, OverlongSettings(buffer=4096))
    assert ours.tolist() == pytest.approx([0, 0, -1 / 4096, -0.5, -1, -1])
    half = overlong_penalty(lengths, 20480, OverlongSettings(buffer=4096, penalty=0.5))
    assert half.tolist() == pytest.approx([x / 2 for x in ours.tolist()])


def test_why_rewards_are_not_whitened():
    """V, row 43: two responses of 10 and 30 tokens both score 2. Mean 4/40 = .1, variance 8/40 - .01 = .19; dividing
    the deviations by .43589 and putting the mean back turns every 0 into -.129416 and both 2s into 4.458899, so the
    returns are 4.458899 - 9 * .129416 = 3.294157 and 4.458899 - 29 * .129416 = .705843; with scores of -2 the long
    one would win. It is an artefact of length, so it is not offered."""
    lengths = torch.tensor([10, 30])
    mask = length_mask(lengths, 30)
    for score, returns in ((2.0, [3.294157, 0.705843]), (-2.0, [-3.294157, -0.705843])):
        rewards = at_the_end(torch.full((2,), score, dtype=torch.float64), lengths, 30)
        whitened = whiten(rewards, mask) + moments(rewards, mask).mean
        assert masked_sum(whitened, mask, dim=1).tolist() == pytest.approx(returns, abs=1e-6)
