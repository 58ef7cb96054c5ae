"""Which models are in memory, and which role is played by which of them. Torch-free: `align plan` says it, `run` obeys.

A frozen base can play several roles: as it is (the reference), or through an adapter (actor, critic, and any reward
model that was trained as an adapter on this very base).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.job import Input
from stages.ppo.config import Config

FIXED = ("policy", "reference")


@dataclass(frozen=True)
class Layout:
    """How each role is played."""

    trains_adapter: bool
    """The actor is an adapter on the policy's frozen base; else all its weights are trained."""
    critic: str
    """none, separate, adapter or shared-head."""
    reference_is_base: bool
    """The policy's frozen base, adapters off, is the reference; else the reference is a frozen model of its own."""
    adapter_rewards: tuple[str, ...]
    """Reward inputs that are adapters on the frozen base, or on the reference when all weights are trained."""
    own_rewards: tuple[tuple[str, ...], ...]
    """Reward inputs that are models of their own; the names of inputs that are one and the same are together."""


def layout(config: Config, inputs: Mapping[str, Input]) -> Layout:
    """The roles of a stage. Which models are the same is decided by fingerprint, never by name."""
    trains_adapter = config.lora is not None
    policy, reference = inputs["policy"], inputs["reference"]
    reference_is_base = trains_adapter and reference.fingerprint == policy.fingerprint
    frozen, quantise = (policy, config.lora.quantise) if config.lora else (reference, None)
    rewards = [name for name in inputs if name not in FIXED]
    on_frozen = tuple(
        name for name in rewards if inputs[name].adapter_of == frozen.fingerprint and inputs[name].quantise == quantise
    )
    return Layout(
        trains_adapter,
        _critic(config),
        reference_is_base,
        on_frozen,
        _alike([name for name in rewards if name not in on_frozen], inputs),
    )


def _alike(names: Sequence[str], inputs: Mapping[str, Input]) -> tuple[tuple[str, ...], ...]:
    """The names, those of the same model together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(inputs[name].fingerprint, []).append(name)
    return tuple(tuple(group) for group in groups.values())


def _critic(config: Config) -> str:
    if not config.has_critic:
        return "none"
    if config.critic.kind == "auto":
        return "separate" if config.lora is None else "adapter"
    return config.critic.kind


def describe(config: Config, inputs: Mapping[str, Input]) -> list[str]:
    """The models in memory, one line each, for `align plan`."""
    roles = layout(config, inputs)
    on_frozen = [f"{name} (adapter)" for name in roles.adapter_rewards]
    quantised = f" in {config.lora.quantise}" if config.lora and config.lora.quantise else ""
    frozen = f" (adapter; base frozen{quantised})" if roles.trains_adapter else ""
    parts = [f"{inputs['policy'].source}: actor{frozen}"]
    if roles.critic in {"adapter", "shared-head"}:
        parts.append(f"critic ({'adapter' if roles.critic == 'adapter' else 'a head on the actor'})")
    if roles.reference_is_base:
        parts.append("reference (base alone)")
    if roles.trains_adapter:
        parts += on_frozen
    lines = [", ".join(parts)]
    if not roles.reference_is_base:
        own = [f"{inputs['reference'].source}: reference (frozen)"]
        lines.append(", ".join(own + ([] if roles.trains_adapter else on_frozen)))
    if roles.critic == "separate":
        lines.append("critic")
    return lines + [f"{inputs[names[0]].source}: {', '.join(names)} (frozen)" for names in roles.own_rewards]
