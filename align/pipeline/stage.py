"""What a stage is to the pipeline: a typed config, named inputs, one output, and the name of a function to run.

There is no base class to inherit from. A stage is a folder `stages/<kind>/` whose `config.py` holds `Config` and
`SPEC`, and whose `run.py` holds `run(config, context) -> StageResult`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from align.recipe.settings import Role, Settings


class Kind(StrEnum):
    """What an artifact is. Inputs are checked against it before anything runs."""

    POLICY = "policy"
    REWARD = "reward model"


@dataclass(frozen=True)
class Slot:
    """An input of a stage. `defaults` are the stage names tried in order when the recipe does not name a source.

    A slot of kind POLICY falls back on the recipe's `model`; `same_as` falls back on another slot of the stage.
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
    trainer_config: str | None = None
    """`package.module:Class` of the TRL config that `trainer_args` is checked against, read without importing it."""


@dataclass(frozen=True)
class Input:
    """A resolved input: a committed model folder and what identifies it."""

    kind: str
    path: str
    fingerprint: str
    source: str
    """Name of the stage that made it, or the hub id or folder given by the user."""
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Job:
    """All that a stage's process needs, as plain JSON (job.json). Paths are absolute."""

    stage: str
    kind: str
    version: int
    fingerprint: str
    seed: int
    directory: str
    config: dict[str, Any]
    inputs: dict[str, Input]
    evaluation: dict[str, Any]
    track: list[str]
    identity: dict[str, Any]
    """What the fingerprint is the hash of; `align plan` compares it field by field."""


@dataclass(frozen=True)
class StageResult:
    """What a stage reports when its artifact is committed.

    `metrics` holds final numbers; an interval is a second key with the suffix `_ci95` and a [low, high] value.
    `handover` is the result of the hand-over check (align.models.handover).
    """

    metrics: dict[str, Any]
    handover: dict[str, Any]
