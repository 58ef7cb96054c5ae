"""What each GPU holds of a model's states, by how a stage's processes share them.

A trained number costs its weight, its gradient and AdamW's two moments. In bfloat16 DeepSpeed keeps weights and
gradients in 2 bytes each and a float32 weight with the moments, K = 12 bytes (Rajbhandari et al. 2020, ZeRO, section
3.1); torch's autocast keeps everything in float32 and makes 2-byte copies of the weights for each pass. N processes
divide the moments (stage 1), the gradients too (2), the weights too (3). Offloaded states are
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
"""Bytes of the float32 weight that DeepSpeed updates and rounds the others from."""
BUCKET = 500_000_000
"""Numbers that DeepSpeed gathers or reduces at a time (its defaults reduce_bucket_size and allgather_bucket_size)."""


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
    "zero3-nvme": Strategy("deepspeed", _ALL, dict.fromkeys(("optimiser", "weights"), "disk") | {"gradients": "host"}),
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
    """What is there for a moment: casts of autocast, buckets, gathered weights."""
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
) -> States:
    """Of a model with `trained` numbers and `frozen` bytes that are not trained; passes compute in `compute` bytes.
    `largest` is the number of numbers that are gathered together at least, `narrow` that of those whose moments are in
    8 bits.

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
    return States(**here, copies=_copies(strategy, trained, numbers, compute, largest))


def _copies(strategy: Strategy, trained: int, numbers: float, compute: int, largest: int) -> float:
    """Autocast casts every trained weight; ddp reduces gradients in flat buckets that hold all of them once more;
    DeepSpeed has a bucket to reduce; where weights are divided, two neighbours of the largest size are whole at once,
    the second fetched while the first computes."""
    if strategy.engine == "torch":
        return trained * ((compute if compute != 4 else 0) + (4 if strategy.several else 0))
    gathered = 2 * min(largest, numbers) * compute if "weights" in strategy.divides else 0
    return gathered + min(BUCKET, trained) * compute
