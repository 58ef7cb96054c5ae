"""What FSDP2 lacks for our stages: processes without GPUs, models whose body and head are computed apart by several
roles, and the way back to an ordinary model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from align import ranks
from align.models.lora import adapter_parameters, without_wrapper
from align.models.partitioned import share
from align.models.roles import Role
from align.training.adamw import restore_state, state_tensors
from align.training.optimisers import DataParallelAdamW, clip_shares

BODY = "states_of_body"
"""The method of a sharded model that runs its body."""


def allow_on_cpu() -> None:
    """Call it before an Accelerator is made: it offers FSDP to processes with GPUs only, though FSDP needs none."""
    state = PartialState()
    if ranks.uses_fsdp() and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def shard(role: Role) -> Role:
    """The same role, each process with its part of the weights. Those of a layer are whole while it computes; those of
    the embeddings and the head, which may be tied, from the body's pass to the end of the role's turn or of its
    backward pass. Adapters stay whole: they are small. Several roles may be on one model."""
    root: Any = without_wrapper(role.module)
    if not isinstance(root, FSDPModule):
        _divide(root, role)

    @contextmanager
    def switch() -> Iterator[None]:
        try:
            with role.active():
                yield
        finally:
            if isinstance(root, FSDPModule):
                root.reshard()

    return replace(role, body=_Body(root, role.body), switch=switch)


def _divide(root: Any, role: Role) -> None:
    mesh = init_device_mesh(role.device.type, (ranks.size(),))
    layers = [module for module in role.body.modules() if type(module).__name__ in (role.body._no_split_modules or ())]
    adapters = adapter_parameters(root)
    for module in [*layers, root]:
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=module is not root, ignored_params=adapters)
        unit.set_gradient_divide_factor(1.0)  # a sum, where FSDP would take the mean
        unit.set_force_sum_reduction_for_comms(True)
    root.set_reduce_scatter_unused_params(True)  # a pass without rows has none for the head
    setattr(root, BODY, role.body.__call__)
    register_fsdp_forward_method(root, BODY)


class _Body:
    """The body of a sharded model. FSDP has to know of its passes by way of the model, which has the other weights."""

    def __init__(self, root: Any, body: nn.Module):
        self._root, self._body = root, body

    def __call__(self, **arguments: Any) -> Any:
        return (getattr(self._root, BODY) if isinstance(self._root, FSDPModule) else self._body)(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class FsdpAdamW(DataParallelAdamW):
    """AdamW of which each process has the state of its share, and steps that: of a role that `shard` made. Gradients
    are added up over the processes in every pass."""

    is_sharded = True
    parameters: list[Any]

    def clip(self, max_norm: float) -> float:
        gradients = [one.grad.to_local() for one in self.parameters if one.grad is not None]
        return clip_shares(gradients, max_norm)

    def tensors(self) -> dict[str, Tensor]:
        """Of this process's share, with the weights."""
        weights = {f"{index}.weights": one.detach() for index, one in enumerate(self.parameters)}
        return {name: share(one).contiguous() for name, one in (state_tensors(self.adamw) | weights).items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        state = {}
        for name, one in tensors.items():
            index, _, kind = name.partition(".")
            parameter = self.parameters[int(index)]
            if kind == "weights":
                parameter.to_local().copy_(one)
            else:
                state[name] = _share_like(parameter, one) if one.ndim else one  # a number: the steps taken
        restore_state(self.adamw, state)


def _share_like(parameter: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def leave(model: nn.Module) -> None:
    """Makes a sharded model what it was before: every weight whole in every process, and no hook that parts it. All
    processes have to come here. torch shards in place, and has no way back."""
    whole: dict[DTensor, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    whole[parameter] = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                setattr(module, name, whole[parameter])
        if isinstance(module, FSDPModule):
            _forget(module)


def _forget(module: Any) -> None:
    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    for name in ("generate", BODY):  # the trainer's and ours: they gather weights
        vars(module).pop(name, None)
    module.__class__ = type(module).__bases__[1]  # (FSDPModule, the module's own)
