"""The lookup-table models used as oracles: same answers as the tables they hold, wherever the padding is."""

import pytest
import torch

from align.training.logprobs import response_states, state_logprobs
from tests.ppo.table_model import STATES, Batch, TableModel, World, complete_responses, sequence_logprobs


def test_the_language():
    responses = complete_responses()
    assert len(set(responses)) == 15
    uniform = torch.full((STATES, 3), 1 / 3, dtype=torch.float64).log()
    assert float(sequence_logprobs(uniform).exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize(("prompt_width", "width"), [(1, 3), (4, 3), (4, 6)])
def test_batched_logprobs_are_those_of_the_table(prompt_width, width):
    world = World.random(3)
    model, batch = TableModel(world.policy), Batch.of(complete_responses(), prompt_width, width)
    states = response_states(model, batch.input_ids, batch.attention_mask, width)
    valid = torch.arange(width) < batch.lengths[:, None]
    ours = state_logprobs(model, states[:, :-1], batch.input_ids[:, -width:], valid, 1.0)[0].sum(1)
    torch.testing.assert_close(ours.detach(), sequence_logprobs(world.policy), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.log_policy(), world.policy, rtol=0, atol=1e-12)


def test_the_optimum_evaluates_to_its_own_value():
    """V^{pi*} = V*: two different backward inductions."""
    world = World.random(4)
    torch.testing.assert_close(world.evaluate(world.policy), world.values, rtol=0, atol=1e-12)
    assert world.distance(world.policy) == 0
    assert world.expectations(world.ref)[2] == 0
