"""One folder per method. `load_specs()` is the list of kinds a recipe may use; loading it imports no torch."""

from __future__ import annotations

from align.recipe.spec import StageSpec, named

KINDS = {
    "base": "stages.base.config:SPEC",
    "sft": "stages.sft.config:SPEC",
    "reward": "stages.reward.config:SPEC",
    "dpo": "stages.dpo.config:SPEC",
    "kto": "stages.kto.config:SPEC",
    "ppo": "stages.ppo.config:PPO",
    "rloo": "stages.ppo.config:RLOO",
    "grpo": "stages.ppo.config:GRPO",
}
"""Where the contract of each kind is, in the order they usually run. A folder can hold several kinds."""


def load_specs() -> dict[str, StageSpec]:
    """Every stage kind by name."""
    return {kind: named(place) for kind, place in KINDS.items()}
