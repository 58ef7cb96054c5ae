"""What passes between the pipeline and a stage's process: plain records, kept as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    adapter_of: str | None = None
    """Fingerprint of the model that `adapter/` in the folder was trained on; None when all weights were trained."""
    quantise: str | None = None
    """How that model's weights were held while the adapter was trained; None: in full."""


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
    cache: str = ""
    """Folder that runs share, of what can be made again at any time. Empty: `cache/` in the stage's own folder."""
    data_reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By setting, what the plan found in its data (align.pipeline.data): for its record, no part of the identity."""
    launch: dict[str, Any] | None = None
    """How its processes are started: align.recipe.settings.LaunchSettings. None: the kind knows one process only."""


@dataclass(frozen=True)
class StageResult:
    """What a stage reports when its artifact is committed.

    `metrics` holds final numbers; an interval is a second key with the suffix `_ci95`, a [low, high] pair.
    `handover` is the result of the hand-over check (align.models.handover).
    """

    metrics: dict[str, Any]
    handover: dict[str, Any]
