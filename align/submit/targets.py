"""The engines that `align submit --to` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from align.submit.engine import JobState
from align.submit.kubernetes import kubernetes_states, render_kubernetes
from align.submit.ray import ray_states, render_ray
from align.submit.script import render_script, script_states
from align.submit.skypilot import render_skypilot, skypilot_states
from align.submit.slurm import render_slurm, slurm_states
from align.submit.submission import Submission


class TargetName(StrEnum):
    """What --to takes."""

    SLURM = "slurm"
    SKYPILOT = "skypilot"
    KUBERNETES = "kubernetes"
    RAY = "ray"
    SCRIPT = "script"


@dataclass(frozen=True)
class Target:
    """One engine."""

    render: Callable[[Submission], dict[str, str]]
    """The files by name; `submit.sh` starts the jobs. Raises ConfigError for what the engine cannot do."""
    states: Callable[[Submission, Mapping[str, str]], dict[str, JobState]]
    """Where the job of each stage is, by the ids of the jobs."""
    cancel: str
    """How the user ends a job, with {id}."""
    command: str
    """The engine's own command, without which nothing can be submitted."""


TARGETS = {
    TargetName.SLURM: Target(render_slurm, slurm_states, "scancel {id}", "sbatch"),
    TargetName.SKYPILOT: Target(render_skypilot, skypilot_states, "sky jobs cancel --name {id}", "sky"),
    TargetName.KUBERNETES: Target(render_kubernetes, kubernetes_states, "kubectl delete jobset {id}", "kubectl"),
    TargetName.RAY: Target(render_ray, ray_states, "ray job stop {id}", "ray"),
    TargetName.SCRIPT: Target(render_script, script_states, "kill {id}", "bash"),
}
