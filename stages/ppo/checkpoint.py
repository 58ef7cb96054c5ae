"""PPO's checkpoints: what is trained and the optimisers as safetensors, the rest as JSON. No pickle.

All randomness of the stage is derived from (seed, rollout number), so no generator state has to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import ranks
from align.context import Context
from align.models.partitioned import is_partitioned
from align.models.roles import Role
from align.training.checkpoints import ONE_PROCESS, checkpoint_folder, keep_newest, resumable
from align.training.optimisers import check_replicas
from stages.ppo.alarms import History
from stages.ppo.inflight import Flight, State
from stages.ppo.trainer import PPOTrainer

STATE = "state.json"
AVERAGE = "average"


def save_checkpoint(
    context: Context,
    trainer: PPOTrainer,
    flight: Flight | None,
    history: History,
    rollouts: int,
    keep: int,
    layout: dict[str, Any],
) -> None:
    """Commits the state after `rollouts` rollouts. The first of the processes writes what all of them hold, each its
    share of what is sharded, and what it has in flight."""
    check_replicas(trainer.models)
    target = checkpoint_folder(context.checkpoints, rollouts)
    with ranks.committed_together(target, rollouts=rollouts, layout=layout) as folder:
        if context.is_main:
            _save_shared(folder, trainer, history, rollouts)
        for name, optimiser in trainer.optimisers.items():
            if optimiser.is_sharded or context.is_main:
                save_file(optimiser.tensors(), _tensors(folder, f"{name}_optimiser", optimiser.is_sharded))
        if trainer.ema is not None and (trainer.ema.is_sharded or context.is_main):
            save_file(trainer.ema.averages, _tensors(folder, AVERAGE, trainer.ema.is_sharded))
        if flight is not None:
            _in_flight(folder).write_text(json.dumps(asdict(flight.state)), encoding="utf-8")
    if context.is_main:
        keep_newest(context.checkpoints, keep, rollouts)


def _save_shared(folder: Path, trainer: PPOTrainer, history: History, rollouts: int) -> None:
    for name, role in trainer.models.items():
        save_file({key: one.contiguous() for key, one in _trained(role).items()}, folder / f"{name}.safetensors")
    state = {
        "rollouts": rollouts,
        "num_steps": trainer.num_steps,
        "kl_coef": trainer.kl_coef,
        "loss_scale": trainer.scaler.state_dict(),
        "history": asdict(history),
    }
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")


def _tensors(folder: Path, name: str, is_sharded: bool) -> Path:
    """This process's file, or that of all."""
    return folder / f"{name}{f'-{ranks.rank()}' if is_sharded else ''}.safetensors"


def _in_flight(folder: Path) -> Path:
    """This process's file."""
    return folder / (f"inflight-{ranks.rank()}.json" if ranks.rank() else "inflight.json")


def load_checkpoint(
    context: Context, trainer: PPOTrainer, flight: Flight | None = None, layout: dict[str, Any] = ONE_PROCESS
) -> tuple[int, History]:
    """Restores the newest checkpoint that verifies. Returns the rollouts done, 0 when there is none. Raises ConfigError
    when it was written by processes of another layout."""
    found = resumable(context, layout)
    if found is None:
        return 0, History()
    folder = found[1]
    for name, role in trainer.models.items():
        _restore(_trained(role), load_file(folder / f"{name}.safetensors"))
    for name, optimiser in trainer.optimisers.items():
        optimiser.restore(load_file(_tensors(folder, f"{name}_optimiser", optimiser.is_sharded)))
    if trainer.ema is not None:
        _restore(trainer.ema.averages, load_file(_tensors(folder, AVERAGE, trainer.ema.is_sharded)))
    if flight is not None:
        flight.state = State.restored(json.loads(_in_flight(folder).read_text(encoding="utf-8")))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    trainer.num_steps, trainer.kl_coef = state["num_steps"], state["kl_coef"]
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(state["loss_scale"])
    return state["rollouts"], History(**state["history"])


def _trained(role: Role) -> dict[str, Tensor]:
    """By name; those that are partitioned are among the tensors of their optimiser."""
    return {name: one.detach() for name, one in role.named_parameters() if not is_partitioned(one)}


@torch.no_grad()
def _restore(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
