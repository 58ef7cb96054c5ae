"""Micro-batches: every row once, within both limits, and nothing else depends on them."""

import pytest
import torch

from stages.ppo.packing import micro_batches


def cut(lengths, rows, tokens):
    """Batches of rows without prompts."""
    lengths = torch.as_tensor(lengths, dtype=torch.long)
    return [batch.tolist() for batch in micro_batches(torch.zeros_like(lengths), lengths, rows, tokens)]


def test_worked_example():
    """Longest first: 9 and 8 (2 * 9 = 18 tokens; a third row would make 27), then 4, 3 and 2 (3 * 4 = 12)."""
    assert cut([3, 9, 4, 8, 2], rows=3, tokens=18) == [[1, 3], [2, 0, 4]]


def test_prompts_and_responses_are_padded_apart():
    """Rows of 5 + 1 and 1 + 5 tokens, 6 each, are 5 + 5 wide together: 20 tokens hold both, 19 do not."""
    parts = torch.tensor([5, 1]), torch.tensor([1, 5])
    assert [batch.tolist() for batch in micro_batches(*parts, rows=8, tokens=20)] == [[0, 1]]
    assert [batch.tolist() for batch in micro_batches(*parts, rows=8, tokens=19)] == [[0], [1]]


def test_without_a_limit_of_tokens_rows_stay_in_order():
    assert cut([3, 9, 4, 8, 2], rows=2, tokens=None) == [[0, 1], [2, 3], [4]]


def test_a_row_that_is_too_long_is_a_batch_of_its_own():
    assert cut([5, 50, 5, 40], rows=8, tokens=10) == [[1], [3], [0, 2]]


def test_rows_of_equal_length_keep_their_order():
    """The same rows in the same order at every call: sums are rounded in order, and runs are compared bit for bit."""
    assert cut([7] * 40, rows=16, tokens=70) == [list(range(start, start + 10)) for start in range(0, 40, 10)]


def test_no_rows():
    """A process may have none."""
    assert cut([], 4, None) == cut([], 4, 10) == []


@pytest.mark.parametrize("tokens", [None, 1, 64, 200, 10_000])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_every_row_once_and_within_the_limits(rows, tokens):
    generator = torch.Generator().manual_seed(rows)
    prompts, responses = (torch.randint(1, 90, (57,), generator=generator) for _ in range(2))
    batches = micro_batches(prompts, responses, rows, tokens)
    assert sorted(torch.cat(batches).tolist()) == list(range(57))
    for batch in batches:
        assert 1 <= len(batch) <= rows
        padded = len(batch) * int(prompts[batch].max() + responses[batch].max())
        assert tokens is None or padded <= tokens or len(batch) == 1


def test_similar_lengths_together_waste_less():
    """What it is for: rows in any order pay for the longest of their batch."""
    lengths = torch.randint(1, 500, (512,), generator=torch.Generator().manual_seed(0))

    def padding(batches):
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches) / int(lengths.sum()) - 1

    assert padding(cut(lengths, 32, 8000)) < 0.1 < 0.8 < padding(cut(lengths, 32, None))
