"""A trainer of PPO with tiny roles and fixed responses, which one process and two can train alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.generation.engine import Samples
from align.models.adapters import AdaptedBase
from align.models.packed import pack
from align.models.partitioned import whole_model
from align.models.roles import Role, causal_role
from align.models.value import ValueHead, separate_critic, shared_head
from align.recipe.training_settings import LoraSettings, OptimSettings
from align.training import fsdp
from align.training.zero import shard_frozen, with_whole_head
from stages.ppo.config import Config
from stages.ppo.rewards import at_the_end
from stages.ppo.rollout import Responses, join
from stages.ppo.settings import CriticSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.models.tiny import CONFIG, new_opened

TRAINERS = [("zero1", "full"), ("zero2", "full"), ("zero2", "lora"), ("zero3", "full"), ("zero3", "lora")]
TRAINERS += [(strategy, variant) for strategy in ("zero2-offload", "zero3-offload") for variant in ("full", "lora")]
TRAINERS += [("fsdp", "full"), ("fsdp", "lora")]
TRAINERS += [(strategy, "shared head") for strategy in ("zero1", "zero2", "zero3", "fsdp")]
HAS_LIBAIO = Path("/usr/include/libaio.h").exists()
TRAINERS += [("zero3-nvme", "wide")] if HAS_LIBAIO else []
ROWS, WIDTH, ROLLOUTS = 8, 7, 3


def new_roles(variant: str, strategy: str = "ddp") -> tuple[Role, Role, Role]:
    """Actor, critic and reference: three models, of which the critic may be a head on the actor's states; or adapters
    on one base and that base. wide: with embeddings that make half a model larger than the MiB from which DeepSpeed
    moves it to a disk."""
    config = CONFIG.model_copy(update={"embeddings": 20_000}) if variant == "wide" else CONFIG
    if variant == "lora":
        base = AdaptedBase(new_opened().model, LoraSettings(rank=4, alpha=8))
        actor, critic, reference = base.actor(), base.critic(None), base.base_role()
        if strategy == "fsdp":
            actor.checkpoint_gradients()
    else:
        actor, body = causal_role(new_opened(0, config).model.train()), new_opened(1, config).model.base_model
        shares = variant == "shared head"
        critic = shared_head(actor) if shares else separate_critic(body, ValueHead(actor.width))
        reference = causal_role(new_opened(0, config).model.eval().requires_grad_(False))
        actor.checkpoint_gradients()
    for role in (actor, critic, reference):
        pack(role.body)
    if strategy == "fsdp":
        return fsdp.shard(actor), fsdp.shard(critic), fsdp.shard(reference)
    if strategy.startswith("zero3"):
        shard_frozen([reference])
        actor, reference = with_whole_head(actor), with_whole_head(reference)
    return actor, critic, reference


def new_trainer(roles: tuple[Role, Role, Role], variant: str, **settings: Any) -> PPOTrainer:
    """Norms are clipped, and several passes make a step. A shared head is warmed up in the first rollout."""
    optim = OptimSettings(lr=1e-3, max_grad_norm=0.5)
    rollout = RolloutSettings(prompts=ROWS, max_response_tokens=WIDTH)
    steps = {"rollouts": ROLLOUTS, "rollout": rollout, "epochs": 2, "micro_batch_size": 2}
    shares = variant == "shared head"
    critic = CriticSettings(optim=optim, kind="shared-head" if shares else "auto")
    config = Config(**{**steps, "optim": optim, "critic": critic, "ema": 0.5})
    return PPOTrainer(config, *roles, seed=0, warmup=int(shares), **settings)


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Of all that is trained, whole."""
    found = {}
    for name, role in trainer.models.items():
        with whole_model(role.module):
            found |= {f"{name}.{key}": one.detach().clone() for key, one in role.named_parameters()}
    return found


def train(trainer: PPOTrainer, rows: Sequence[int], rollouts: Iterable[int]) -> list[dict[str, float]]:
    """Learns from some rows of the same responses, over and over."""
    batch, scores = responses(rows)
    return [trainer.improve(trainer.observe(batch, scores), index) for index in rollouts]


def responses(rows: Sequence[int]) -> tuple[Responses, Tensor]:
    """Some of ROWS random responses to random prompts, of other lengths each, and their scores."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([1 + row % WIDTH for row in range(ROWS)])
    ids = torch.randint(5, 200, (ROWS, WIDTH), generator=generator)
    prompts = [torch.randint(5, 200, (1 + row % 5,), generator=generator).tolist() for row in range(ROWS)]
    width = int(lengths[rows].max())
    samples = Samples(ids[rows, :width], lengths[rows], torch.ones(len(rows), dtype=torch.bool))
    scores = at_the_end(torch.linspace(-1, 1, ROWS)[rows], lengths[rows], width)
    return join([prompts[row] for row in rows], samples, 0, "cpu"), scores
