"""Bytes of a model's states by strategy, against the figures of the papers."""

from __future__ import annotations

import pytest

from align.pipeline.estimate.strategies import STRATEGIES, states

ZERO = 7_500_000_000
GB = 10**9


def held(name: str, processes: int = 64, trained: int = ZERO, frozen: float = 0, compute: int = 2):
    return states(STRATEGIES[name], processes, trained, frozen, compute=compute)


@pytest.mark.parametrize(("name", "gigabytes"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_the_table_of_zero(name, gigabytes):
    """Rajbhandari et al. 2020, figure 1: 7.5 billion numbers, 64 GPUs, K = 12."""
    found = held(name)
    assert (found.weights + found.gradients + found.optimiser) / GB == pytest.approx(gigabytes, abs=0.05)


def test_one_process_in_float32_has_sixteen_bytes_of_a_trained_number():
    found = held("one", 1, 1000, 70, 4)
    assert (found.weights, found.gradients, found.optimiser, found.copies) == (4070, 4000, 8000, 0)


def test_what_autocast_and_ddp_copy():
    """2 bytes of casts; 4 more of flat buckets."""
    assert held("one", 1, 1000).copies == 2000
    assert held("ddp", 8, 1000).copies == 6000


def test_offloaded_states_are_elsewhere():
    """Of 1000 numbers in bfloat16 on 4 processes: moments and float32 weight 12000 / 4 and gradients 2000 / 4 in main
    memory, weights 2000 here; stage 3 offloads those too, 2000 / 4; to disk go moments and weights."""
    two, three, disk = (held(name, 4, 1000) for name in ("zero2-offload", "zero3-offload", "zero3-nvme"))
    assert (two.weights, two.gradients, two.optimiser, two.host) == (2000, 0, 0, 3500)
    assert (three.weights, three.host, three.disk) == (0, 4000, 0)
    assert (disk.weights, disk.host, disk.disk) == (0, 500, 3500)


def test_gathered_weights_are_two_blocks():
    """On 8 processes in bfloat16: two blocks of 100 numbers are whole at a time, a bucket of 1000 is reduced."""
    found = states(STRATEGIES["zero3"], 8, 1000, 0, compute=2, largest=100)
    assert (found.weights, found.gradients, found.optimiser, found.copies) == (250, 250, 1500, 2400)


def test_fsdp_divides_all_in_float32():
    """On 8 processes in bfloat16: 4 bytes of weight and gradient each and 8 of moments, an eighth of each; two blocks
    of 100 numbers are whole at a time in 2 bytes, and one is reduced."""
    found = states(STRATEGIES["fsdp"], 8, 1000, 0, compute=2, largest=100)
    assert (found.weights, found.gradients, found.optimiser, found.copies) == (500, 500, 1000, 600)
