"""Parameters of which each process holds a part (DeepSpeed's ZeRO-3, FSDP): made whole, a few at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

HELD = "align"
"""Stands among the modules that use a parameter: DeepSpeed does not part with one that is in use."""


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed has taken a parameter over, whose memory is then DeepSpeed's also while it is whole; or FSDP
    has, and it is in parts."""
    return hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)


def full(tensor: Tensor) -> Tensor:
    """The whole of what FSDP has in parts: all processes come here. Anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(parameter: Any) -> Tensor:
    """What this process holds of a parameter between passes, in its own memory: a part, or all where it is whole."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


@contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Inside, all parameters of a model are whole, and each process may call it by itself. All processes come here."""
    parted = _parted(model.parameters())
    if not parted:
        with _unsharded(model):
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


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, what FSDP has in parts is whole, and passes leave it so."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not units[0], recurse=False)  # the first is the root
            unit.reshard()


def make_whole(model: nn.Module) -> None:
    """Makes all parameters of a model that DeepSpeed parted whole, for good. All processes come here."""
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
    """Those of DeepSpeed that are not whole now."""
    return [one for one in parameters if hasattr(one, "ds_id") and one.numel() < one.ds_numel]


def _hold(parameters: Iterable[Any]) -> None:
    for one in parameters:
        one.ds_active_sub_modules.add(HELD)
