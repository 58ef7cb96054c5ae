"""One folder per method. `load_specs()` is the list of kinds a recipe may use; loading it imports no torch."""

from __future__ import annotations

from importlib import import_module

from align.recipe.spec import StageSpec

KINDS = ("base", "sft", "reward", "dpo", "ppo")


def load_specs() -> dict[str, StageSpec]:
    """Every stage kind by name, in the order they usually run."""
    return {kind: import_module(f"stages.{kind}.config").SPEC for kind in KINDS}
