"""Exponential moving average of trained weights, over rollouts (Ouyang et al. 2022: decay .992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average <- decay * average + (1 - decay) * weights, once per rollout, started at the weights as they are.

    The averages are kept in float32 on the CPU: they cost no GPU memory, and in bfloat16 most of their small steps
    would be rounded away. After n updates the start still has the weight decay^n.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.averages: dict[str, Tensor] = {name: _kept(parameter).clone() for name, parameter in parameters.items()}
        """By parameter name: all that a checkpoint needs."""

    def update(self) -> None:
        """Takes in the weights as they are now."""
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(_kept(parameter), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averages inside, and the trained weights, bit for bit, afterwards."""
        trained = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])


def _kept(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", torch.float32)
