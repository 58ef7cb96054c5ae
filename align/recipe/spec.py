"""What a stage is to the pipeline: a typed config, named inputs, one output, and the name of a function.

There is no base class to inherit from. A stage is a folder `stages/<kind>/` whose `config.py` holds `Config`
and `SPEC`, and whose `run.py` holds `run(config, context) -> StageResult`. Kinds that share a loop share a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any

from align.recipe.data_settings import Role
from align.recipe.settings import Settings


def named(path: str) -> Any:
    """The object called `package.module:name`. Specifications name what is slow to import."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


class Kind(StrEnum):
    """What an artifact is. Inputs are checked against it before anything runs."""

    POLICY = "policy"
    REWARD = "reward model"


@dataclass(frozen=True)
class Slot:
    """An input of a stage, or several (`Settings.sources`). `defaults` are the stage names tried in order when the
    recipe names no source.

    A slot of kind POLICY falls back on the recipe's `model`; `same_as` falls back on another slot.
    """

    kind: Kind
    defaults: tuple[str, ...] = ()
    same_as: str | None = None


@dataclass(frozen=True)
class StageSpec:
    """The contract of a stage kind. `version` goes up whenever the same config would give another result."""

    kind: str
    version: int
    summary: str
    config: type[Settings]
    output: Kind
    run: str
    data: Role | None
    inputs: Mapping[str, Slot] = field(default_factory=dict)
    more_data: Mapping[str, Role] = field(default_factory=dict)
    """Further data, by the dotted path of its setting: checked before the run and part of the fingerprint."""
    memory: str | None = None
    """`module:function`, torch-free, `(config, inputs by name) -> list[str]`: which models the stage holds in
    memory."""
    workload: str | None = None
    """`module:function`, torch-free, `(config, inputs by name, lengths, processes, evaluation) -> Workload`: what the
    memory of the stage is estimated from (align.pipeline.estimate)."""
    distributed: bool = False
    """Whether it can train on several processes. If not, it is one whatever the recipe says."""
    trainer_config: str | None = None
    """`package.module:Class` of the TRL config that `trainer_args` is checked against, unimported."""
