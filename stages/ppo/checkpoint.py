"""PPO's checkpoints: what is trained and the optimisers as safetensors, the rest as JSON. No pickle.

All randomness of the stage is derived from (seed, rollout number), so no generator state has to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.context import Context
from align.models.roles import Role
from align.records import committed_folder
from align.training.checkpoints import checkpoint_folder, keep_newest, newest_valid
from align.training.optimisers import restore_state, state_tensors
from stages.ppo.alarms import History
from stages.ppo.inflight import Flight, State
from stages.ppo.trainer import PPOTrainer

STATE = "state.json"
AVERAGE = "average.safetensors"
IN_FLIGHT = "inflight.json"


def save_checkpoint(
    context: Context, trainer: PPOTrainer, flight: Flight | None, history: History, rollouts: int, keep: int
) -> None:
    """Commits the state after `rollouts` rollouts."""
    with committed_folder(checkpoint_folder(context.checkpoints, rollouts), rollouts=rollouts) as folder:
        for name, role in trainer.models.items():
            save_file(_trained(role), folder / f"{name}.safetensors")
            save_file(state_tensors(trainer.optimisers[name]), folder / f"{name}_optimiser.safetensors")
        if trainer.ema is not None:
            save_file(trainer.ema.averages, folder / AVERAGE)
        if flight is not None:
            (folder / IN_FLIGHT).write_text(json.dumps(asdict(flight.state)), encoding="utf-8")
        state = {
            "rollouts": rollouts,
            "num_steps": trainer.num_steps,
            "kl_coef": trainer.kl_coef,
            "loss_scale": trainer.scaler.state_dict(),
            "history": asdict(history),
        }
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    keep_newest(context.checkpoints, keep, rollouts)


def load_checkpoint(context: Context, trainer: PPOTrainer, flight: Flight | None = None) -> tuple[int, History]:
    """Restores the newest checkpoint that verifies. Returns the rollouts done, 0 when there is none."""
    found = newest_valid(context.checkpoints)
    if found is None:
        return 0, History()
    folder = found[1]
    for name, role in trainer.models.items():
        _restore(dict(role.named_parameters()), load_file(folder / f"{name}.safetensors"))
        restore_state(trainer.optimisers[name], load_file(folder / f"{name}_optimiser.safetensors"))
    if trainer.ema is not None:
        _restore(trainer.ema.averages, load_file(folder / AVERAGE))
    if flight is not None:
        flight.state = State.restored(json.loads((folder / IN_FLIGHT).read_text(encoding="utf-8")))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    trainer.num_steps, trainer.kl_coef = state["num_steps"], state["kl_coef"]
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(state["loss_scale"])
    return state["rollouts"], History(**state["history"])


def _trained(role: Role) -> dict[str, Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in role.named_parameters()}


@torch.no_grad()
def _restore(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
