"""Who holds the gradients of a role and steps its weights, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from align import ranks
from align.errors import DistributedError
from align.models.partitioned import is_partitioned
from align.models.roles import Role
from align.recipe.training_settings import OptimSettings
from align.training.adamw import new_adamw, restore_state, state_tensors

BUCKET = 2**24
"""Numbers that are sent to the other processes at a time: it bounds the memory of the copy."""


class Optimiser(Protocol):
    """The optimiser of what one role trains, and its gradients. Other roles may compute with the same body: each owns
    its own parameters only, and a loss that two roles share is given to one of them.

    A step is, in every process: `backward` per micro-batch, `clip`, `step`, `zero_grad`.
    """

    is_sharded: bool
    """Whether `tensors` are of this process's share; else they are the same in all processes."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of this process's share of the loss."""
        ...

    def clip(self, max_norm: float) -> float:
        """Makes the gradient that of all processes together, a sum, without the loss scale, and clips it by its norm.
        Returns the norm before: if that is not finite, nothing was updated yet."""
        ...

    def step(self) -> None:
        """Updates the weights, unless the scaler leaves the step out."""
        ...

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        ...

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The state of the optimiser, for a checkpoint."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        ...


NewOptimiser = Callable[[Role, OptimSettings, GradScaler], Optimiser]
"""Of a role. The scaler, of passes in float16, is that of all roles of the trainer, which updates it after a step."""


class DataParallelAdamW:
    """AdamW with all of its state in every process. Gradients are added up over the processes once per step."""

    is_sharded = False

    def __init__(self, role: Role, settings: OptimSettings, scaler: GradScaler):
        self.parameters = list(role.parameters())
        self.adamw, self.scaler = new_adamw(self.parameters, settings), scaler

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self, max_norm: float) -> float:
        add_up_gradients(self.parameters)
        self.scaler.unscale_(self.adamw)
        return float(nn.utils.clip_grad_norm_(self.parameters, max_norm))

    def step(self) -> None:
        self.scaler.step(self.adamw)

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr

    def tensors(self) -> dict[str, Tensor]:
        return state_tensors(self.adamw)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        restore_state(self.adamw, tensors)


def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The sum over all processes. One that has no gradient for a parameter adds nothing; a parameter that none has one
    for keeps none, as in one process: AdamW would decay it."""
    if ranks.size() == 1:
        return
    known = torch.tensor([parameter.grad is not None for parameter in parameters], device=parameters[0].device).float()
    dist.all_reduce(known)
    gradients = []
    for parameter, count in zip(parameters, known.tolist(), strict=True):
        if count:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def clip_shares(gradients: list[Tensor], max_norm: float) -> float:
    """Clips the shares that this process has of gradients by the norm of the whole, which is returned."""
    squares = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
    norm = float(ranks.total(squares).sqrt())
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm


def check_replicas(roles: Mapping[str, Role]) -> None:
    """Raises DistributedError when the processes do not train one and the same model, to the last bit. What is
    partitioned is not compared."""
    if ranks.size() == 1:
        return
    for name, role in roles.items():
        whole = [parameter for parameter in role.parameters() if not is_partitioned(parameter)]
        bits = torch.stack([torch.zeros((), dtype=torch.int64, device=role.device), *map(_sum_of_bits, whole)])
        if not torch.equal(ranks.highest(bits), -ranks.highest(-bits)):
            raise DistributedError(
                f"the {name}'s weights are not the same in all {ranks.size()} processes: other machines or library "
                "versions, or a fault of align; nothing is saved with them"
            )


def _sum_of_bits(parameter: nn.Parameter) -> Tensor:
    """int64 (): as a checksum."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().reshape(-1).view(integers).sum(dtype=torch.int64)


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, together at most BUCKET numbers or a single gradient."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        if not buckets or gradient.numel() > room or gradient.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(gradient)
        room -= gradient.numel()
    return buckets
