"""What each GPU holds of a model's states, by how a stage's processes share them.

A trained number costs its weight, its gradient and AdamW's two moments. In bfloat16 DeepSpeed keeps weights and
gradients in 2 bytes each and a float32 weight with the moments, K = 12 bytes (Rajbhandari et al. 2020, ZeRO, section
3.1); torch's autocast keeps everything in float32 and makes 2-byte copies of the weights for each pass. N processes
divide the moments (stage 1), the gradients too (2), the weights too (3); FSDP divides all. Offloaded states are
in the machine's main memory (Ren et al. 2021, ZeRO-Offload) or on its disk (Rajbhandari et al. 2021, ZeRO-Infinity).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOMENTS = 8
"""Bytes of AdamW's two moments of a number, float32."""
MOMENTS_8BIT = 2 + 2 * 4 / 256
"""In 8 bits, each with a float32 scale for every 256 (Dettmers et al. 2022)."""
MASTER = 4
"""Bytes of a float32 weight: the one that DeepSpeed updates and rounds the others from. Where shares are float32 ZeRO-3
means to update those and have no other, but it compares their device with the name of one, which are never equal."""
BUCKET = 500_000_000
"""Gradients that DeepSpeed collects before it reduces them (its default reduce_bucket_size). It takes memory for so
many at once, of which a CPU gives what is written to."""
REUSED = 500_000_000
"""Weights that ZeRO-3 leaves whole: those that it needs again within a billion numbers (its default
stage3_max_reuse_distance), which are the last half billion of the forward pass."""


@dataclass(frozen=True)
class Strategy:
    """Which states are divided by the number of processes, and where they are."""

    engine: str = "torch"
    """torch or deepspeed."""
    divides: frozenset[str] = frozenset()
    """Of: optimiser, gradients, weights."""
    offloads: Mapping[str, str] = field(default_factory=dict)
    """Where states go that are not on the GPU, by their name: host or disk."""
    several: bool = True
    """Whether more than one process takes part."""


_OPTIMISER = frozenset({"optimiser"})
_BOTH = _OPTIMISER | {"gradients"}
_ALL = _BOTH | {"weights"}
_HOST = {"optimiser": "host", "gradients": "host"}
STRATEGIES: dict[str, Strategy] = {
    "one": Strategy(several=False),
    "ddp": Strategy(),
    "zero1": Strategy("deepspeed", _OPTIMISER),
    "zero2": Strategy("deepspeed", _BOTH),
    "zero3": Strategy("deepspeed", _ALL),
    "zero2-offload": Strategy("deepspeed", _BOTH, _HOST),
    "zero3-offload": Strategy("deepspeed", _ALL, {**_HOST, "weights": "host"}),
    "zero3-nvme": Strategy("deepspeed", _ALL, {**_HOST, "weights": "host", "optimiser": "disk"}),
    "fsdp": Strategy(divides=_ALL),
}
"""By the name that a recipe and a table call it."""


def chosen(launch: Mapping[str, Any] | None) -> tuple[int, str]:
    """Processes of a stage and the name of its strategy, from how it is launched (align.job.Job). With an accelerate
    config of the user's own: of one process."""
    if launch is None or launch["config"] is not None or (launch["processes"] == 1 and launch["strategy"] == "ddp"):
        return 1, "one"
    return launch["processes"], launch["strategy"]


@dataclass(frozen=True)
class States:
    """Bytes of one model's states for one process: on its device, and its share of main memory and disk."""

    weights: float
    gradients: float
    optimiser: float
    copies: float
    """What is there besides while training: casts of autocast, buckets, gathered weights."""
    left: float = 0.0
    """What of gradients and copies is there after training."""
    whole: float = 0.0
    """Of the weights while they are whole: beside the share of this process, where they are divided."""
    host: float = 0.0
    disk: float = 0.0


def states(
    strategy: Strategy,
    processes: int,
    trained: int,
    frozen: float,
    *,
    compute: int,
    largest: int = 0,
    narrow: int = 0,
    bucket: int | None = None,
    on_gpu: bool = True,
) -> States:
    """Of a model with `trained` numbers and `frozen` bytes that are not trained; passes compute in `compute` bytes.
    `largest` is the number of numbers that are gathered together at least, `narrow` that of those whose moments are in
    8 bits, `bucket` that of gradients that a loop of our own adds up at a time (None: the library does).

    Example: 7.5 billion numbers on 64 GPUs in bfloat16 take 31.4, 16.6 and 1.9 GB with zero1, zero2 and zero3
    (ZeRO, figure 1; its ddp has 2-byte weights and a float32 copy, torch's has float32 weights and casts).
    """
    deepspeed = strategy.engine == "deepspeed"
    size = compute if deepspeed else 4
    bytes_of = {
        "weights": trained * size + frozen,
        "gradients": trained * size,
        "optimiser": trained * (MOMENTS + (MASTER if deepspeed else 0)) - narrow * (MOMENTS - MOMENTS_8BIT),
    }
    here = dict.fromkeys(bytes_of, 0.0) | {"host": 0.0, "disk": 0.0}
    for name, amount in bytes_of.items():
        share = amount / processes if name in strategy.divides else amount
        here[strategy.offloads.get(name, name)] += share
    numbers = trained + frozen / size
    whole = bytes_of["weights"] + (here["weights"] if "weights" in strategy.divides else 0)
    if strategy.engine == "torch" and "weights" in strategy.divides:
        # FSDP reduces a layer at a time; two neighbours are whole, the second fetched while the first computes.
        return States(**here, copies=(2 * min(largest, numbers) + min(largest, trained)) * compute, whole=whole)
    if not deepspeed:
        # ddp reduces gradients in flat buckets, which hold all of them once more and live as long as the model; our own
        # loop has one, for a moment.
        buckets = 4.0 * min(bucket or trained, trained) if strategy.several else 0.0
        casts = trained * (compute if compute != 4 else 0)
        return States(**here, copies=casts + buckets, left=0.0 if bucket else buckets, whole=whole)
    lasting, passing = _deepspeed_copies(strategy, trained, numbers, largest, processes, bucket, on_gpu)
    left = lasting * compute + (here["gradients"] if "gradients" in strategy.divides else 0)
    return States(**here, copies=(lasting + passing) * compute, left=left, whole=whole)


def checkpoint_bytes(strategy: Strategy, trained: int, compute: int, narrow: int = 0) -> int:
    """Of a checkpoint: float32 weights and moments. DeepSpeed writes the weights of the passes besides, where they are
    not divided."""
    again = strategy.engine == "deepspeed" and "weights" not in strategy.divides
    return round(trained * (MASTER + MOMENTS + (compute if again else 0)) - narrow * (MOMENTS - MOMENTS_8BIT))


def _deepspeed_copies(
    strategy: Strategy,
    trained: int,
    numbers: float,
    largest: int,
    processes: int,
    bucket: int | None,
    on_gpu: bool,
) -> tuple[float, float]:
    """Numbers in what is there to the end of the stage, and for a moment.

    Gradients are moved into a bucket and copied once more to be reduced. ZeRO-3 has one bucket for good; ZeRO-2, whose
    files say overlap_comm, fills a second one meanwhile, and lets both go after each backward pass. Weights that are
    gathered are let go while the bucket fills: two neighbours of the largest size are whole at least, the second
    fetched while the first computes; what is needed again soon, by a backward pass, stays, but not in a loop of our
    own, whose order of calls DeepSpeed does not know.

    On a CPU gloo scatters a copy of what it is given, and weights that ZeRO-3 lets go stay in the heap: those that it
    gathered, and, to the end, the first shares, which it moved into one buffer.
    """
    parts_weights = "weights" in strategy.divides
    reused = REUSED if trained and bucket is None else 0
    gathered = min(numbers, max(2 * largest, reused)) if parts_weights else 0
    if not trained:
        return 0, gathered
    bucket = bucket or BUCKET
    buckets = bucket * (2 if strategy.divides == _BOTH else 1)
    taken = buckets if on_gpu else min(buckets, trained)
    copied = min(bucket, trained)
    if not parts_weights:
        return 0, taken + copied
    if on_gpu:
        return taken, max(gathered, copied)
    return taken + trained / processes, gathered + 2 * copied
