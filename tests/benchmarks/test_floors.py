"""The arithmetic of the floors, by worked numbers and against torch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.floors import Machine, Shape, Work, floors, rollout_floor

TINY = Shape(layers=1, hidden=2, inner=3, query=2, key_value=1, vocabulary=5)


def test_weights() -> None:
    """Query 2x2, key and value 2x1 each, output 2x2, three of 2x3: 4 + 4 + 4 + 18 = 30; head 2x5 = 10."""
    assert (TINY.body, TINY.head) == (30, 10)


def test_forward() -> None:
    """3 tokens: 2*30*3 = 180. Token t attends to t tokens, in two products of 2*2t: 8 (1+2+3) = 48. Logits of two
    tokens: 2*10*2 = 40."""
    assert TINY.forward(3) == 180 + 48
    assert TINY.forward(3, predicted=2) == 180 + 48 + 40


def test_decoding_is_the_forward_pass_in_pieces() -> None:
    """Operations do not depend on whether tokens come one by one or all at once."""
    assert sum(TINY.decode(context) for context in (1, 2, 3)) == TINY.forward(3, predicted=3)


def test_decode_reads_weights_once_and_each_rows_cache() -> None:
    """40 weights, and keys and values of 1 number each at 3 places in 5 rows: 4 (40 + 5*2*3) = 280 bytes."""
    assert TINY.decode_bytes([3] * 5) == 280


def test_rollout() -> None:
    """2 rows, prompts of 3, responses of 2: both prompts with one token's logits, 2 (228 + 20) = 496, and one token
    more at context 4: 2 (80 + 32) = 224 operations, or 4 (40 + 2*2*4) = 224 bytes at half the speed: 448 seconds."""
    assert rollout_floor(TINY, Machine(1, float("inf")), [3, 3], [2, 2]) == 496 + 224
    assert rollout_floor(TINY, Machine(1, 0.5), [3, 3], [2, 2]) == 496 + 448


def test_rollout_of_unequal_lengths() -> None:
    """Prompts of 3 and 1, responses of 1 and 3. Prompts with a token's logits: 228 + 20 and 68 + 20, in all 336. The
    first row has ended with that; the second goes on at contexts 2 and 3: 80 + 16 and 80 + 24 operations; or
    4 (40 + 2*2) and 4 (40 + 2*3) bytes at half the speed: 352 and 368 seconds."""
    assert rollout_floor(TINY, Machine(1, float("inf")), [3, 1], [1, 3]) == 336 + 96 + 104
    assert rollout_floor(TINY, Machine(1, 0.5), [3, 1], [1, 3]) == 336 + 352 + 368


def test_phases() -> None:
    """1 row, 2+1 tokens: body pass 228, with logits of one token 248. Score 228; observe 2*248 + 228 = 724; learn
    3*2*(248+228) = 2856 in two epochs, and 2 models * 4 steps * 7 numbers * 4 bytes * 40 weights = 8960 bytes."""
    found = floors(TINY, Machine(1, 1), Work(rows=1, prompt=2, response=1, epochs=2, minibatches=2))
    assert found == {"rollout": 2 * 30 * 2 + 24 + 20, "score": 228, "observe": 724, "learn": 2856 + 8960, "sync": 0}


def test_torch_counts_the_same() -> None:
    """On sequences of one token, where a full and a causal attention are the same."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = "eager"  # torch does not count the others on CPU
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(7, 1, dtype=torch.long), use_cache=False)
    rotary = counter.get_flop_counts()["LlamaForCausalLM.model.rotary_emb"]
    expected = 7 * Shape.of(config.to_dict()).forward(1, predicted=1)
    assert counter.get_total_flops() - sum(rotary.values()) == pytest.approx(expected)
