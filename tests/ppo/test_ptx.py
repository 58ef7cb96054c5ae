"""Demonstrations in PPO's steps: their order, their batches, and where PPO-ptx comes to rest."""

from itertools import chain

import pytest
import torch

from align.training.masked import masked_sum
from stages.ppo.advantages import leave_one_out
from stages.ppo.packing import visited
from stages.ppo.ptx import Demonstrations
from tests.ppo.bandit import SCORES, Draws, descend, tilted

PAD = 9


def steps(total, count, num, seed=0):
    return [visited(total, count, step, lambda number: seed + number) for step in range(num)]


@pytest.mark.parametrize(("total", "count"), [(7, 3), (7, 7), (3, 7), (1, 2), (12, 4)])
def test_all_rows_are_visited_once_per_pass(total, count):
    """Also when a step reaches into the next pass, or over several."""
    order = list(chain.from_iterable(steps(total, count, 3 * total)))
    assert len(order) == 3 * total * count
    for start in range(0, len(order), total):
        assert sorted(order[start : start + total]) == list(range(total))


def test_passes_are_in_fresh_orders_that_follow_from_the_seed():
    first, second = steps(20, 20, 2)
    assert first != second
    assert steps(20, 20, 2) == [first, second]
    assert steps(20, 20, 1, seed=5) != [first]


ROWS = [([1, 2, 3], [4, 5]), ([6], [7]), ([1, 6], [2, 3, 4])]


def demonstrations(batch_size=3, **more):
    return Demonstrations(ROWS, batch_size, seed=0, pad_id=PAD, **more)


def test_a_batch_looks_like_sampled_responses():
    """Prompts on the left, responses on the right, masks from lengths; every response has ended."""
    batch = demonstrations().batch(0)
    assert batch.width == 3
    assert batch.finished.all()
    for row in range(3):
        length = int(batch.lengths[row])
        prompt = batch.input_ids[row, :3][batch.attention_mask[row, :3].bool()].tolist()
        response = batch.tokens[row, :length].tolist()
        assert (prompt, response) in ROWS
        assert (batch.tokens[row, length:] == PAD).all()
        assert (batch.attention_mask[row, 3:] == batch.mask[row]).all()
    assert sorted(batch.lengths.tolist()) == [1, 2, 3]


def test_a_batch_follows_from_the_step():
    """What resuming relies on: no state is kept between calls."""
    one, other = demonstrations(2), demonstrations(2)
    later = [one.batch(step) for step in range(5)][4]
    assert torch.equal(other.batch(4).input_ids, later.input_ids)


def test_processes_share_a_batch():
    """Each takes its part of the same rows: together they have what one process alone has."""
    alone = demonstrations().batch(1)
    parts = [demonstrations(process=process, num_processes=2).batch(1) for process in range(2)]
    assert [len(part.lengths) for part in parts] == [2, 1]
    shared = [tuple(row[row != PAD].tolist()) for part in parts for row in part.input_ids]
    assert sorted(shared) == sorted(tuple(row[row != PAD].tolist()) for row in alone.input_ids)


# Demonstrations of the bandit's actions, after a prompt of one token: six of action 0, three of 1, one of 2.
ACTIONS = Demonstrations([([5], [action]) for action in [0] * 6 + [1] * 3 + [2]], 10, seed=0, pad_id=0)


def resting_point(coef):
    """Descends the expected gradient of PPO's loss (k1 in the reward, beta 1) plus the likelihood of a whole pass over
    the demonstrations, per token. The baseline of the others in a group of two is no bias."""
    batch = ACTIONS.batch(3)

    def gradient(logits):
        draws = Draws(logits, 2)
        likelihood = masked_sum(draws.policy[batch.tokens], batch.mask) / batch.lengths.sum()
        return draws.gradient(leave_one_out(draws.rewards(1.0), draws.mask, 2), extra=-coef * likelihood)

    return descend(gradient, rate=1.0 if coef < 5 else 0.3, steps=300)


FIXED_POINTS = {
    0.0: [0.179000, 0.291944, 0.529056],
    0.5: [0.306441, 0.306377, 0.387182],
    1.0: [0.374521, 0.317040, 0.308439],
    5.0: [0.529147, 0.320570, 0.150283],
}


@pytest.mark.parametrize("coef", FIXED_POINTS)
def test_fixed_points(coef):
    """PTX, row 80: the maximum of J + coef * E_D[log pi] with D = [.6, .3, .1]. There pi (r - log(pi/ref) - J) + coef
    (D - pi) = 0; without demonstrations it is pi*, with ever more of them D."""
    ours = resting_point(coef)
    assert ours.tolist() == pytest.approx(FIXED_POINTS[coef], abs=1e-6)
    if coef == 0:
        assert ours.tolist() == pytest.approx(tilted(SCORES, 1.0).tolist(), abs=1e-8)


def test_what_demonstrations_cost_and_keep():
    """E15: the larger the coefficient, the higher the likelihood of demonstrations and the lower the reward."""
    policies = torch.tensor(list(FIXED_POINTS.values()), dtype=torch.float64)
    shares = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    assert ((policies.log() @ shares).diff() > 0).all()
    assert ((policies @ SCORES).diff() < 0).all()
