"""Exponential moving average of trained weights, over rollouts (Ouyang et al. 2022: decay .992)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from align.models.partitioned import is_partitioned, share


class Ema:
    """average <- decay * average + (1 - decay) * weights, once per rollout, started at the weights as they are.

    The averages are kept in float32 on the CPU: they cost no GPU memory, and in bfloat16 most of their small steps
    would be rounded away. After n updates the start still has the weight decay^n. Of weights that are in parts each
    process averages its own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.is_sharded = any(map(is_partitioned, parameters.values()))
        """Whether `averages` are of this process's share; else they are the same in all processes."""
        self.averages: dict[str, Tensor] = {name: _kept(parameter).clone() for name, parameter in parameters.items()}
        """By parameter name: all that a checkpoint needs."""

    def update(self) -> None:
        """Takes in the weights as they are now."""
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(_kept(parameter), 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Puts the averages into the parameters, in place of the trained weights. Call it before they are made whole
        for good."""
        for name, parameter in self.parameters.items():
            share(parameter).copy_(self.averages[name])


def _kept(parameter: nn.Parameter) -> Tensor:
    return share(parameter).to("cpu", torch.float32)
