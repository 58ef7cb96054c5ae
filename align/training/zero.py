"""What DeepSpeed does for models that are computed with part by part: body and head apart, by several roles.

ZeRO-1 and 2 leave the weights whole, so only the parameters that a role trains are given to DeepSpeed. Under ZeRO-3
each process holds a part of every weight. DeepSpeed makes the weights of a module whole while it is called, forward and
backward, and every process has to call the same modules in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from align import ranks
from align.models.partitioned import is_partitioned, whole_model
from align.models.roles import Role
from align.recipe.training_settings import OptimSettings
from align.training.adamw import new_adamw
from align.training.optimisers import BUCKET
from align.training.sharding import launched_with

SCORE = "score"
"""The name of a reward model's head."""


def zero_stage() -> int:
    """The stage that the launcher was told; 0 without DeepSpeed."""
    return int(launched_with()["zero_optimization"]["stage"]) if ranks.uses_deepspeed() else 0


class ZeroAdamW:
    """AdamW of which each process has the state of its share, and steps that: an `Optimiser`.

    DeepSpeed averages gradients over the processes, where a sum is wanted. Losses cannot be multiplied by their number,
    because they may have gradients for the optimiser of another role too. So its loss scale is one over that number:
    what it divides gradients by when it clips and steps.
    """

    is_sharded = True

    def __init__(self, role: Role, settings: OptimSettings, stage: int):
        parameters = list(role.parameters())
        # DeepSpeed would copy the rest of a body that is shared, and look for gradients there.
        module = role.module if stage == 3 else nn.ParameterList(parameters)
        self.stage = stage
        self.engine = _initialize(module, optimizer=new_adamw(parameters, settings))
        self.sharded: Any = self.engine.optimizer
        self.sharded.loss_scale = 1 / ranks.size()

    def backward(self, loss: Tensor) -> None:
        self.sharded.clear_backward_seen_flag()  # as its own forward pass would
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.backward(loss / self.sharded.loss_scale, scale_wrt_gas=False)  # which it multiplies by that

    def clip(self, max_norm: float) -> float:
        self.engine.set_gradient_accumulation_boundary(True)
        if self.stage == 1:
            self.engine.allreduce_gradients()
        else:
            self.sharded.finalize_gradient_accumulation_boundary()
        self.sharded.clip_grad = max_norm  # its step clips, wherever the gradients are
        return float(self._scaled_norm()) / self.sharded.loss_scale

    def _scaled_norm(self) -> Tensor:
        if self.stage < 3:
            return self.sharded.scaled_global_norm()
        from deepspeed.runtime.utils import combine_grad_norm_groups  # optional

        return combine_grad_norm_groups(self.sharded._get_norm_groups())

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        self.sharded.zero_grad()
        self.sharded.averaged_gradients.clear()
        if self.stage == 3:
            self.sharded.grad_partitions_flat_buffer.zero_()
        else:
            self.sharded.all_grad_tensors.clear()
            if self.sharded.cpu_offload:
                torch._foreach_zero_(list(self.sharded.accumulated_grads_in_cpu.values()))

    def set_lr(self, lr: float) -> None:
        for group in self.sharded.param_groups:
            group["lr"] = lr

    def tensors(self) -> dict[str, Tensor]:
        """Of this process's share; under ZeRO-3 with the weights."""
        tensors = {}
        for index, share in enumerate(self._shares):
            with self._in_memory(index) as is_moved:
                state = dict(self.sharded.optimizer.state[share])
                if self.stage == 3:
                    state["weights"] = share.detach()
                tensors |= {f"{index}.{key}": one.clone() if is_moved else one for key, one in state.items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for index, share in enumerate(self._shares):
            mine = {key.partition(".")[2]: one for key, one in tensors.items() if key.startswith(f"{index}.")}
            with self._in_memory(index):
                if self.stage == 3:
                    share.copy_(mine.pop("weights"))
                    self.sharded._reassign_or_swap_out_partitioned_parameters(index)
                self.sharded.optimizer.state[share] = {key: one.to(share.device) for key, one in mine.items()}
        if self.stage < 3:
            self.sharded.refresh_fp32_params()

    @contextmanager
    def _in_memory(self, index: int) -> Iterator[bool]:
        """Inside, a share and its state are in memory. Says whether they were moved there from a disk, and go back."""
        is_moved = self.stage == 3 and self.sharded._swappable_optimizer_subgroup(index)
        if is_moved:
            self.sharded._optimizer_states_and_gradient_swap_in(index)
        yield is_moved
        if is_moved:
            self.sharded._optimizer_states_and_gradient_swap_out(index)

    @property
    def _shares(self) -> list[nn.Parameter]:
        """What this process steps: flat parts of the weights, float32."""
        if self.stage == 3:
            return self.sharded.fp32_partitioned_groups_flat
        return self.sharded.single_partition_of_fp32_groups


def shard_frozen(roles: Iterable[Role]) -> None:
    """Leaves each process with its part of the weights of these roles, which are not trained. Adapters on them and the
    head of a reward model stay whole: they are small, and are read without a call of their module."""
    for role in roles:
        if not is_partitioned(next(role.body.parameters())):
            with _without_small(role.module):
                _initialize(role.module)


def with_whole_head(role: Role) -> Role:
    """The same role of a causal language model, its head whole while it is active: logits are computed block by block,
    and processes have unequal numbers of blocks."""

    @contextmanager
    def switch() -> Iterator[None]:
        with role.active(), whole_model(role.head.module):  # type: ignore[attr-defined]
            yield

    return replace(role, switch=switch)


def _initialize(module: nn.Module, **arguments: Any) -> Any:
    import deepspeed  # optional

    settings = launched_with()
    zero = {"reduce_bucket_size": BUCKET} | settings["zero_optimization"]
    if zero["stage"] == 3:  # there is no one order of calls, in which weights could be fetched ahead
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    if zero["stage"] == 1:
        zero["overlap_comm"] = False  # gradients are added up once per step
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
    }
    config = settings | own | {"zero_optimization": zero}
    engine: Any = deepspeed.initialize(model=module, config=config, **arguments)[0]
    if zero["stage"] == 3:  # at a call of the whole model it would compare the order of calls over the processes
        getattr(engine.optimizer, "parameter_offload", engine.optimizer).fwd_pre_hook.remove()
    return engine


@contextmanager
def _without_small(model: nn.Module) -> Iterator[None]:
    """Inside, adapters and the head of a reward model are no part of the model."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    for module, _ in children:
        layers = module.adapter_layer_names if isinstance(module, BaseTunerLayer) else ()
        for name in (SCORE, *layers):
            module._modules.pop(name, None)
    try:
        yield
    finally:
        for module, known in children:  # in their order: it is that of the parameters
            module._modules.clear()
            module._modules.update(known)
