"""What accelerate's FSDP2 lacks for our stages: processes without GPUs, and the way back to an ordinary model."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from align import ranks


def allow_on_cpu() -> None:
    """Call it before an Accelerator is made: it offers FSDP to processes with GPUs only, though FSDP needs none."""
    state = PartialState()
    if ranks.uses_fsdp() and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


@torch.no_grad()
def leave(model: torch.nn.Module) -> None:
    """Makes a sharded model what it was before: every weight whole in every process, and no hook that parts it. All
    processes have to come here. torch shards in place, and has no way back."""
    whole: dict[DTensor, torch.nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    whole[parameter] = torch.nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                setattr(module, name, whole[parameter])
        if isinstance(module, FSDPModule):
            _forget(module)


def _forget(module: Any) -> None:
    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    vars(module).pop("generate", None)  # the trainer's: it gathers weights
    module.__class__ = type(module).__bases__[1]  # (FSDPModule, the module's own)
