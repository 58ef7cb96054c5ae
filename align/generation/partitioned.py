"""Parameters of which each process holds a part (DeepSpeed's ZeRO-3): made whole, a few at a time, to be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

HELD = "align"
"""Stands among the modules that use a parameter: DeepSpeed does not part with one that is in use."""


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed has taken a parameter over. Its memory is DeepSpeed's, also while it is whole."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Inside, all parameters of a model are whole, and each process may call it by itself. All processes come here."""
    parted = _parted(model.parameters())
    if not parted:
        yield
        return
    import deepspeed  # optional

    with deepspeed.zero.GatheredParameters(parted):
        _hold(parted)
        try:
            yield
        finally:
            for one in parted:
                one.ds_active_sub_modules.clear()  # a pass that was computed again leaves some behind


def make_whole(model: nn.Module) -> None:
    """Makes all parameters of a model whole, for good. All processes come here."""
    parted = _parted(model.parameters())
    if parted:
        import deepspeed  # optional

        deepspeed.zero.GatheredParameters(parted).__enter__()
        _hold(parted)


@contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside, all of these parameters are whole; to be read, not written. Where one is partitioned all processes have
    to come here, with the same parameters and in the same order. DeepSpeed keeps small ones whole all the time, and
    those are left alone: it would part with them too."""
    parted = _parted(parameters)
    if not parted:
        yield
        return
    import deepspeed  # optional

    with deepspeed.zero.GatheredParameters(parted):
        yield


def _parted(parameters: Iterable[Any]) -> list[Any]:
    """Those that are not whole now."""
    return [one for one in parameters if is_partitioned(one) and one.numel() < one.ds_numel]


def _hold(parameters: Iterable[Any]) -> None:
    for one in parameters:
        one.ds_active_sub_modules.add(HELD)
