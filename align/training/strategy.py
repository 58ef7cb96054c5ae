"""Which optimiser a role has under what the launcher was told."""

from __future__ import annotations

from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from align.models.roles import Role
from align.recipe.training_settings import OptimSettings
from align.training.fsdp import FsdpAdamW
from align.training.optimisers import DataParallelAdamW, Optimiser
from align.training.zero import ZeroAdamW, zero_stage


def new_optimiser(role: Role, settings: OptimSettings, scaler: GradScaler) -> Optimiser:
    """The optimiser of a role whose weights are divided as the launcher was told. Under ZeRO-3 and FSDP adapters are
    whole in every process, and so is their optimiser."""
    if isinstance(next(role.parameters()), DTensor):
        return FsdpAdamW(role, settings, scaler)
    stage = zero_stage()
    if stage == 0 or (stage == 3 and role.trained is not None):
        return DataParallelAdamW(role, settings, scaler)
    return ZeroAdamW(role, settings, stage)
