"""Parameters of which each process holds a part (DeepSpeed's ZeRO-3): made whole, a few at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
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
def whole(parameters: Iterable[Any], writer: int | None = None) -> Iterator[None]:
    """Inside, all of these parameters are whole; to be read, or written by one process for all. Where one is
    partitioned all processes have to come here, with the same parameters and in the same order. DeepSpeed keeps small
    ones whole all the time, and those are left alone: it would part with them too."""
    parted = _parted(parameters)
    if not parted:
        yield
        return
    import deepspeed  # optional

    with deepspeed.zero.GatheredParameters(parted, modifier_rank=writer):
        yield


@contextmanager
def layer_by_layer(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model computes that no engine of DeepSpeed runs yet: the weights of each layer are whole while it
    does."""
    gathered: dict[torch.nn.Module, AbstractContextManager[None]] = {}

    def gather(layer: torch.nn.Module, _: Any) -> None:
        gathered[layer] = whole(list(layer.parameters(recurse=False)))
        gathered[layer].__enter__()

    def part(layer: torch.nn.Module, *_: Any) -> None:
        gathered.pop(layer).__exit__(None, None, None)

    layers = [layer for layer in model.modules() if any(map(is_partitioned, layer.parameters(recurse=False)))]
    hooks = [layer.register_forward_pre_hook(gather) for layer in layers]
    hooks += [layer.register_forward_hook(part) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def parts_hash(model: torch.nn.Module) -> str:
    """sha256 of the partitioned parameters, each whole for a moment; of nothing where there are none."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if is_partitioned(parameter):
            with whole([parameter]):
                digest.update(name.encode())
                digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parted(parameters: Iterable[Any]) -> list[Any]:
    """Those that are not whole now."""
    return [one for one in parameters if is_partitioned(one) and one.numel() < one.ds_numel]


def _hold(parameters: Iterable[Any]) -> None:
    for one in parameters:
        one.ds_active_sub_modules.add(HELD)
