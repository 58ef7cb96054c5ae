"""PPO's checkpoints: both models and both optimisers as safetensors, the rest as JSON. No pickle.

All randomness of the stage is derived from (seed, rollout number), so no generator state has to be kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from safetensors.torch import load_file, save_file

from align.context import Context
from align.records import committed_folder
from align.training.checkpoints import checkpoint_folder, keep_newest, newest_valid
from stages.ppo.alarms import History
from stages.ppo.trainer import PPOTrainer

STATE = "state.json"


def save_checkpoint(context: Context, trainer: PPOTrainer, history: History, rollouts: int, keep: int) -> None:
    """Commits the state after `rollouts` rollouts."""
    with committed_folder(checkpoint_folder(context.checkpoints, rollouts), rollouts=rollouts) as folder:
        for name, model in (("actor", trainer.actor), ("critic", trainer.critic)):
            save_file(_named_tensors(model), folder / f"{name}.safetensors")
            save_file(_optimiser_tensors(trainer.optimisers[name]), folder / f"{name}_optimiser.safetensors")
        state = {"rollouts": rollouts, "num_steps": trainer.num_steps, "history": asdict(history)}
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    keep_newest(context.checkpoints, keep, rollouts)


def load_checkpoint(context: Context, trainer: PPOTrainer) -> tuple[int, History]:
    """Restores the newest checkpoint that verifies. Returns the rollouts done, 0 when there is none."""
    found = newest_valid(context.checkpoints)
    if found is None:
        return 0, History()
    folder = found[1]
    for name, model in (("actor", trainer.actor), ("critic", trainer.critic)):
        _restore_tensors(model, load_file(folder / f"{name}.safetensors"))
        _restore_optimiser(trainer.optimisers[name], load_file(folder / f"{name}_optimiser.safetensors"))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    trainer.num_steps = state["num_steps"]
    return state["rollouts"], History(**state["history"])


def _named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters once each: tied weights are one parameter."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


@torch.no_grad()
def _restore_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}


def _restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
