"""Bytes of a model's states by strategy, against the figures of the papers."""

from __future__ import annotations

import pytest

from align.pipeline.estimate.strategies import STRATEGIES, checkpoint_bytes, states

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
    memory, weights 2000 here; stage 3 offloads those too, 2000 / 4; to disk go moments and float32 weight."""
    two, three, disk = (held(name, 4, 1000) for name in ("zero2-offload", "zero3-offload", "zero3-nvme"))
    assert (two.weights, two.gradients, two.optimiser, two.host) == (2000, 0, 0, 3500)
    assert (three.weights, three.host, three.disk) == (0, 4000, 0)
    assert (disk.weights, disk.host, disk.disk) == (0, 1000, 3000)


def test_fsdp_divides_all_in_float32():
    """On 8 processes in bfloat16: 4 bytes of weight and gradient each and 8 of moments, an eighth of each; two blocks
    of 100 numbers are whole at a time in 2 bytes, and one is reduced."""
    found = states(STRATEGIES["fsdp"], 8, 1000, 0, compute=2, largest=100, on_gpu=True)
    assert (found.weights, found.gradients, found.optimiser, found.copies) == (500, 500, 1000, 600)


def test_deepspeed_copies_its_share_of_the_weights_in_float32_too():
    """8 processes, 1000 numbers: 12 bytes each with the moments."""
    assert [held(name, 8, 1000, compute=4).optimiser for name in ("zero2", "zero3")] == [1500, 1500]


def copied(name: str, trained: int, compute: int = 2, *, frozen: float = 0, on_gpu: bool = True, largest: int = 0):
    """Copies on 8 processes, as numbers."""
    found = states(STRATEGIES[name], 8, trained, frozen, compute=compute, largest=largest, on_gpu=on_gpu)
    return found.copies / compute


def test_gradients_pass_through_buckets_of_half_a_billion():
    """On a GPU they are taken whole: two by zero2, one by zero1 and zero3; what is in one is copied once more. Of
    7.5 billion numbers half a billion is copied, of 1000 all. On a CPU 1000 numbers take 1000 twice."""
    bucket = 500_000_000
    assert copied("zero2", ZERO) == 3 * bucket
    assert copied("zero1", ZERO) == 2 * bucket
    assert copied("zero2", 1000) == 2 * bucket + 1000
    assert copied("zero2", 1000, 4, on_gpu=False) == 2000


def test_gathered_weights_give_way_to_the_copy_of_the_bucket():
    """Of a large model half a billion weights are whole at most, of a small one all, and two blocks at least; without a
    backward pass only these. The bucket of zero3 is there besides. On a CPU nothing gives way: 1000 gathered weights,
    an eighth of the 10 that are trained, and their gradients three times."""
    bucket = 500_000_000
    assert copied("zero3", ZERO) == 2 * bucket
    assert copied("zero3", 10, frozen=2 * 990) == bucket + 1000
    assert copied("zero3", 10, 4, frozen=4 * 990, on_gpu=False) == 1000 + 1.25 + 30
    assert copied("zero3", ZERO, largest=bucket) == 3 * bucket
    assert copied("zero3", 0, frozen=2 * 1000, largest=100) == 200


def test_a_loop_of_our_own_adds_up_a_few_gradients_at_a_time():
    """1000 numbers in float32 on 8 processes of a CPU, 100 at a time, blocks of 50. ddp has one copy for a moment;
    zero2 two buckets and the copy of one; zero3 a bucket and two copies, two blocks, and the first share of 125."""
    found = {
        name: states(STRATEGIES[name], 8, 1000, 0, compute=4, largest=50, bucket=100, on_gpu=False)
        for name in ("ddp", "zero2", "zero3")
    }
    assert {name: one.copies / 4 for name, one in found.items()} == {"ddp": 100, "zero2": 300, "zero3": 300 + 100 + 125}
    assert {name: one.left / 4 for name, one in found.items()} == {"ddp": 0, "zero2": 125, "zero3": 125 + 100 + 125}


def test_what_is_left_after_training():
    """In float32 on 8 processes of a CPU, 1000 numbers. ddp: its buckets. zero2: a share of the gradients. zero3: that,
    a bucket, and a share of the weights in the heap; the weights are whole beside the share of 125."""
    ddp, two, three = (
        states(STRATEGIES[name], 8, 1000, 0, compute=4, on_gpu=False) for name in ("ddp", "zero2", "zero3")
    )
    assert (ddp.left, two.left, three.left) == (4000, 500, 500 + 4000 + 500)
    assert (ddp.whole, two.whole, three.whole) == (4000, 4000, 4500)


def test_a_checkpoint_has_twelve_bytes_of_a_trained_number_and_with_deepspeed_its_weights():
    """Measured with 81.8 million numbers in float32 under zero2: 327 MB of weights, twice 491 MB of the rest."""
    sizes = [checkpoint_bytes(STRATEGIES[name], 1000, 4) for name in ("one", "ddp", "zero2", "zero3")]
    assert sizes == [12000, 12000, 16000, 12000]
