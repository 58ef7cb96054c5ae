"""Opens the models of a stage, each weight once, and gives every role its own (see layout.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from align import ranks
from align.context import Context
from align.data.render import Renderer
from align.evaluation.scorer import RewardModel, shares_tokenizer
from align.job import Input
from align.models.adapters import AdaptedBase
from align.models.handover import verify_tokenizer
from align.models.load import HIGHEST_FIELD, load_tokenizer, local_folder
from align.models.opened import Opened, open_policy, open_reward
from align.models.packed import pack
from align.models.roles import Role, causal_role, offloaded, reward_role
from align.models.value import critic_from_policy, critic_from_reward, shared_head
from align.training import fsdp
from align.training.precision import training_dtype
from align.training.zero import shard_frozen, with_whole_head, zero_stage
from stages.ppo.config import Config
from stages.ppo.layout import Layout, layout


@dataclass
class Models:
    """What a stage holds in memory, by role."""

    policy: Opened
    """The model that generates: all of the actor's weights, or the base with the actor's adapter at rest."""
    actor: Role
    critic: Role | None
    reference: Role
    rewards: dict[str, RewardModel]
    """By the name of the input."""
    critic_is_informed: bool
    """Whether the critic starts from a reward model, so that its first values mean something."""
    max_training_score: float | None
    """The highest score that the reward model gave to a response it was trained on, where the reward is one model's
    that knows it."""


def open_models(config: Config, context: Context, device: torch.device) -> Models:
    """Loads, attaches and moves everything. Raises ArtifactError when a model is not what its stage saved."""
    assert config.data is not None
    roles = layout(config, context.job.inputs)
    opening = _Opening(config, config.data.template, context, device, roles)
    policy = opening.policy()
    actor, frozen, reference = opening.actor_and_reference(policy)
    rewards = {name: opening.adapter_reward(frozen, name) for name in roles.adapter_rewards}
    for names in roles.own_rewards:
        rewards |= dict.fromkeys(names, opening.own_reward(names[0]))
    critic, informed = opening.critic(policy, actor, frozen, rewards)
    for role in (actor, critic):
        if role is not None and config.gradient_checkpointing != "none":
            role.checkpoint_gradients(config.gradient_checkpointing)
    for role in (actor, critic, reference, *(reward.role for reward in rewards.values())):
        if role is not None:
            pack(role.body)
    return Models(policy, actor, critic, reference, rewards, informed, _max_training_score(config, context))


def shard(models: Models) -> None:
    """Under ZeRO-3: leaves each process with its part of the weights that are not trained; those that are trained are
    the optimiser's to shard. Only adapters, which are small, and the heads of reward models stay whole. Under FSDP: of
    all weights but adapters."""
    if ranks.uses_fsdp() and ranks.size() > 1:
        models.actor, models.reference = fsdp.shard(models.actor), fsdp.shard(models.reference)
        models.critic = models.critic and fsdp.shard(models.critic)
        own = {id(reward): replace(reward, role=fsdp.shard(reward.role)) for reward in models.rewards.values()}
        models.rewards = {name: own[id(reward)] for name, reward in models.rewards.items()}
        return
    if zero_stage() != 3:
        return
    rewards = [reward.role for reward in models.rewards.values()]
    bases = [models.actor] if models.actor.trained else []
    shard_frozen([*bases, models.reference, *rewards])
    models.actor, models.reference = with_whole_head(models.actor), with_whole_head(models.reference)


@dataclass
class _Opening:
    config: Config
    template: Literal["auto", "chat", "plain"]
    context: Context
    device: torch.device
    roles: Layout

    def policy(self) -> Opened:
        lora = self.config.lora
        if lora is None:
            policy = open_policy(self.context.input("policy"), self.template)
        else:  # a frozen base is held in the dtype it is computed in
            dtype = training_dtype(self.config.precision)
            policy = open_policy(self.context.input("policy"), self.template, dtype, lora.quantise)
        policy.model.to(self.device)
        return policy

    def actor_and_reference(self, policy: Opened) -> tuple[Role, AdaptedBase | None, Role]:
        """The actor, the frozen base that adapters can be put on, and the reference."""
        fp32_head, lora = self.config.fp32_lm_head, self.config.lora
        if lora is not None:
            base = AdaptedBase(policy.model, lora)
            policy.model = base.model
            if self.roles.reference_is_base:
                return base.actor(fp32_head), base, base.base_role()
            return base.actor(fp32_head), base, self._waiting(causal_role(self._reference_model()), "reference")
        actor = causal_role(policy.model.train(), fp32_head)
        base = AdaptedBase(self._reference_model(), None) if self.roles.adapter_rewards else None
        reference = base.base_role() if base else causal_role(self._reference_model())
        return actor, base, self._waiting(reference, "reference")

    def _reference_model(self) -> Any:
        model = open_policy(self.context.input("reference"), self.template).model
        return model.to(self.device).eval().requires_grad_(False)

    def adapter_reward(self, base: AdaptedBase | None, name: str) -> RewardModel:
        assert base is not None
        source = self.context.input(name)
        tokenizer = load_tokenizer(source)
        renderer = Renderer(tokenizer, self.template)
        verify_tokenizer(tokenizer, renderer, Path(local_folder(source)), source.source)
        role = base.reward(name, source)
        return RewardModel(role if self.roles.trains_adapter else self._waiting(role, "reference"), tokenizer, renderer)

    def own_reward(self, name: str) -> RewardModel:
        opened = open_reward(self.context.input(name), self.template)
        opened.model.to(self.device).eval().requires_grad_(False)
        role = self._waiting(reward_role(opened.model), "reward")
        return RewardModel(role, opened.tokenizer, opened.renderer)

    def critic(
        self, policy: Opened, actor: Role, base: AdaptedBase | None, rewards: dict[str, RewardModel]
    ) -> tuple[Role | None, bool]:
        """The critic and whether it starts from a reward model."""
        kind = self.roles.critic
        if kind == "none":
            return None, False
        if kind == "shared-head":
            return shared_head(actor), False
        if kind == "adapter":
            assert base is not None
            teacher = next(iter(self.roles.adapter_rewards), None)
            return base.critic(teacher), teacher is not None
        source = self._teacher(policy, rewards)
        if source is not None:
            critic = critic_from_reward(source, policy.tokenizer, torch.float32)
        else:
            critic = critic_from_policy(self.context.input("policy"), policy.tokenizer, torch.float32)
        return critic.to(self.device), source is not None

    def _teacher(self, policy: Opened, rewards: dict[str, RewardModel]) -> Input | None:
        """The first reward model with the policy's tokenizer."""
        name = next((name for name, reward in rewards.items() if shares_tokenizer(reward, policy)), None)
        return None if name is None else self.context.input(name)

    def _waiting(self, role: Role, name: str) -> Role:
        """The frozen role, in CPU memory between its passes if the recipe says so."""
        return offloaded(role, self.device) if name in self.config.offload else role


def _max_training_score(config: Config, context: Context) -> float | None:
    if len(config.reward) != 1:
        return None
    (term, settings) = next(iter(config.reward.items()))
    names = list(settings.inputs(term))
    if len(names) != 1 or settings.weight != 1:
        return None
    saved = json.loads((Path(local_folder(context.input(names[0]))) / "config.json").read_text(encoding="utf-8"))
    return saved.get(HIGHEST_FIELD)
