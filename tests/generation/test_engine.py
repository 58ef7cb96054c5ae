"""What every engine is built from: where a response ends, and how prompts are padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.generation.engine import cut_at_stop, left_pad
from tests.generation.conftest import END_OF_TURN, EOS, PAD

TOKENS = st.integers(0, 5)
GENERATED = st.tuples(st.integers(1, 5), st.integers(1, 8)).flatmap(
    lambda shape: st.lists(st.lists(TOKENS, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
)


@settings(deadline=None)
@given(GENERATED, st.sets(TOKENS, min_size=1, max_size=3), TOKENS)
def test_nothing_is_valid_after_the_first_stop(rows, stop_ids, pad):
    """P4, rows 4, 6 and 7: for all token ids, stop sets and PAD ids, PAD among the stop tokens included: a response is
    what was generated up to its first stop token, that one included, `finished` says that there was one, and
    everything else is PAD."""
    samples = cut_at_stop(torch.tensor(rows), sorted(stop_ids), pad)
    for row, valid, finished in zip(rows, samples.rows(), samples.finished.tolist(), strict=True):
        stops = [place for place, token in enumerate(row) if token in stop_ids]
        assert valid == (row[: stops[0] + 1] if stops else row)
        assert finished == bool(stops)
        assert not any(token in stop_ids for token in valid[:-1])
    assert samples.token_ids.shape[1] == max(len(valid) for valid in samples.rows())
    is_past = torch.arange(samples.token_ids.shape[1]) >= samples.lengths[:, None]
    assert (samples.token_ids[is_past] == pad).all()


def test_a_stop_in_the_last_column_ends_a_response():
    """P5, row 7: `finished` is not "shorter than the widest": a response may end exactly at the cap, and one that is as
    wide may not have ended."""
    samples = cut_at_stop(torch.tensor([[7, 7, EOS], [7, 7, 7], [EOS, 7, 7]]), (EOS,), PAD)
    assert samples.finished.tolist() == [True, False, True]
    assert samples.lengths.tolist() == [3, 3, 1]
    assert samples.rows() == [[7, 7, EOS], [7, 7, 7], [EOS]]


def test_every_stop_token_ends_a_response():
    """P5, row 8: with two stop tokens the first of either counts, and is kept."""
    raw = torch.tensor([[7, EOS, END_OF_TURN], [END_OF_TURN, EOS, 7], [7, 7, END_OF_TURN], [7, 7, 7]])
    both = cut_at_stop(raw, (EOS, END_OF_TURN), PAD)
    assert both.rows() == [[7, EOS], [END_OF_TURN], [7, 7, END_OF_TURN], [7, 7, 7]]
    assert both.finished.tolist() == [True, True, True, False]
    one = cut_at_stop(raw, (EOS,), PAD)
    assert one.finished.tolist() == [True, True, False, False]


def test_sampled_pads_are_tokens():
    """Rows 3 and 7: a PAD that the policy sampled is a token like any other: lengths say what is valid, not ids."""
    samples = cut_at_stop(torch.tensor([[PAD, 7, PAD, EOS]]), (EOS,), PAD)
    assert samples.rows() == [[PAD, 7, PAD, EOS]]


def test_prompts_are_padded_on_the_left():
    """Row 1: the last token of every prompt is in the last column; the mask says what is a prompt, also where a prompt
    holds PAD."""
    ids, mask = left_pad([[5], [6, PAD, 7]], PAD, "cpu")
    assert ids.tolist() == [[PAD, PAD, 5], [6, PAD, 7]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_keep_their_type(dtype):
    """Token ids in, token ids out."""
    assert cut_at_stop(torch.tensor([[7, EOS]], dtype=dtype), (EOS,), PAD).token_ids.dtype is dtype
