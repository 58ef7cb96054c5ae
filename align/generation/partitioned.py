"""Parameters of which each process holds a part (DeepSpeed's ZeRO-3): made whole, a few at a time, to be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed has taken a parameter over. Its memory is DeepSpeed's, also while it is whole."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside, all of these parameters are whole; to be read, not written. Where one is partitioned all processes have
    to come here, with the same parameters and in the same order. DeepSpeed keeps small ones whole all the time, and
    those are left alone: it would part with them too."""
    parted = [one for one in parameters if is_partitioned(one) and one.numel() < one.ds_numel]
    if not parted:
        yield
        return
    import deepspeed  # optional

    with deepspeed.zero.GatheredParameters(parted):
        yield
