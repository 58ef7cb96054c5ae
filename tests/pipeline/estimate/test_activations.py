"""The formulas of one pass, by hand for a Llama of two blocks (tests/pipeline/estimate/models.py)."""

from __future__ import annotations

import pytest
from trl.kernels import chunked_logprob
from trl.trainer import utils

from align.pipeline.estimate import activations
from align.pipeline.estimate.activations import (
    Pass,
    Width,
    fused_logits,
    holes,
    kept,
    kv_cache,
    passing,
    per_token,
    ppo_logits,
    sampling_logits,
)
from align.recipe.training_settings import LoraSettings
from align.training import logprobs, optimisers
from stages.ppo import memory as ppo
from tests.pipeline.estimate.models import TINY

FLOAT32, AUTOCAST = Width(4, 4), Width(4, 2)


def test_blocks_are_those_of_the_code_that_computes():
    """The formulas are torch-free, so they hold copies of these numbers."""
    assert (activations.MAX_TOKENS, activations.CPU_BLOCK) == (logprobs.MAX_TOKENS, logprobs.CPU_BLOCK)
    tile = (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    assert tile == (activations.TILE_TOKENS, activations.TILE_WORDS)
    assert ppo.BUCKET == optimisers.BUCKET


def test_a_token_of_a_padded_pass():
    """Norms: 40 numbers, input and normalised, 80. A block: q, k, v and output of width 8 each as k and v are repeated,
    32; one number for 2 heads, 2; gate, act(gate), up, 60; inputs 8 + 8 + 20 = 36; 130 in all. 80 + 2 * 130 = 340."""
    assert per_token(TINY, FLOAT32) == 4 * 340


def test_a_token_of_a_packed_pass():
    """Keys and values keep their width of 4, the output is there twice: 8 * 3 + 4 * 2 = 32, here the same as padded."""
    assert per_token(TINY, FLOAT32, packed=True) == 4 * 340


def test_autocast_halves_what_is_not_the_residual_stream():
    assert per_token(TINY, AUTOCAST) == 4 * 80 + 2 * 260


def test_adapters_keep_no_normalised_input_and_their_rank():
    """All 14 layers have one: norms 40, 2 * 130, and 14 * 3 numbers between A and B. On q_proj alone: 2 of 14 layers,
    so a seventh of the 36 inputs."""
    assert per_token(TINY, FLOAT32, LoraSettings(rank=3)) == 4 * (40 + 260 + 42)
    few = LoraSettings(rank=3, target_modules=["q_proj"])
    assert per_token(TINY, FLOAT32, few) == pytest.approx(4 * (40 + 2 * (94 + 36 / 7) + 6))


def test_checkpoints_keep_the_blocks_inputs_and_one_block():
    """2 blocks of 8 numbers, and half of 340."""
    one = Pass(3, 5, recomputes="full")
    assert kept(TINY, one, FLOAT32) == 15 * 4 * (16 + 170)
    assert kept(TINY, Pass(3, 5), FLOAT32) == 15 * 4 * 340
    assert passing(TINY, one, FLOAT32) == 15 * 4 * 20 * 4


def test_selective_checkpoints_keep_the_results_of_products_too():
    """Linear layers of a block give 8 + 4 + 4 + 8 + 20 + 20 + 8 = 72, attention 8 and one per head: 164 in two blocks.
    Of the block that is whole at a time, only what is made again comes on top: half of 340 - 164."""
    assert kept(TINY, Pass(3, 5, recomputes="selective"), FLOAT32) == 15 * 4 * (16 + 164 + 88)


def test_logits_of_trl():
    """On a CPU nine tiles of the vocabulary's width, 10; on a GPU one of 32768. At most 4096 tokens."""
    assert fused_logits(TINY, Pass(3, 5), FLOAT32, on_gpu=False) == 9 * 15 * 10 * 4
    assert fused_logits(TINY, Pass(8, 1024), AUTOCAST, on_gpu=True) == 4096 * 32768 * 2


def test_logits_of_ppo():
    """Up to 1024 tokens all are kept, and four blocks of 128; of more none is kept."""
    assert ppo_logits(TINY, 1000, on_gpu=False) == 4 * 10 * (1000 + 4 * 128)
    assert ppo_logits(TINY, 5000, on_gpu=True) == 4 * 10 * 4 * 1024


def test_cache_and_logits_of_sampling():
    """Llama 3 8B: 32 layers, keys of 8 heads of 128, bfloat16: 131072 bytes per token, as vLLM says it. Here 2 layers
    and keys of 4: 16 numbers per token."""
    assert kv_cache(TINY, 6, 7, 2) == 16 * 6 * 7 * 2
    assert sampling_logits(TINY, 6) == 6 * 10 * 28


def test_holes_are_two_outputs_of_each_adapted_layer_below_the_threshold():
    """Outputs of q_proj: 2 * 8. A pass so long that 8 floats of each token are 32 MiB leaves none."""
    lora = LoraSettings(target_modules=["q_proj"])
    assert holes(TINY, Pass(3, 5), FLOAT32, lora) == 2 * 4 * 15 * 16
    assert holes(TINY, Pass(1, 2**20), FLOAT32, lora) == 0
