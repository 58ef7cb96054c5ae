"""Settings of `align submit`: what a job asks of its machines, and what only one of the engines knows.

None of them changes a result, so all of them are outside of fingerprints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from align.recipe.settings import Settings


def _word(text: str) -> str:
    """One plain word: it goes into a line of a job script, where a space or a quote would end it."""
    if not re.fullmatch(r"[\w./:@%+=,&|*\[\]-]+", text, re.ASCII):
        raise ValueError(f"{text!r} is not one plain word: letters, digits and . / : @ % + = , & | * [ ] - _")
    return text


def _line(text: str) -> str:
    if not text.startswith("-") or not text.isprintable():
        raise ValueError(f"{text!r} is not an option: it starts with - and is one line")
    return text


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", text, re.ASCII):
        raise ValueError(f"{text!r} is not the name of an environment variable")
    return text


Word = Annotated[str, AfterValidator(_word)]
Option = Annotated[str, AfterValidator(_line)]
Variable = Annotated[str, AfterValidator(_variable)]


class ResourceSettings(Settings):
    """What the job of a stage gets."""

    nodes: PositiveInt | None = None
    """Machines. None: 1."""

    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of each machine. None: 1."""

    processes: PositiveInt | None = None
    """Processes of a stage on each machine. None: one per GPU, and one without a GPU."""

    cpus: PositiveInt | None = None
    """CPU cores of each machine. None: what the engine gives."""

    memory: PositiveInt | None = None
    """GiB of main memory of each machine. None: what the engine gives."""

    hours: PositiveFloat | None = None
    """Longest time of one start of the job, on Slurm and Kubernetes. A stage that needs longer saves, and goes on when
    the job is started again."""


@dataclass(frozen=True)
class Resources:
    """What the job of one stage gets; `gpus`, `processes`, `cpus` and `memory` (GiB) are those of each machine."""

    nodes: int
    gpus: int
    processes: int
    cpus: int | None
    memory: int | None
    hours: float | None


class SlurmSettings(Settings):
    """Slurm."""

    partition: Word | None = None
    """Partition, or several with commas."""

    account: Word | None = None
    """Account that is charged."""

    qos: Word | None = None
    """Quality of service."""

    constraint: Word | None = None
    """Features that nodes must have."""

    requeue: bool = True
    """Put the job back into the queue when it is preempted, its node fails or its time is over."""

    image: str | None = None
    """Container that stages run in (needs the pyxis plugin). The current folder is mounted at its own path."""

    mounts: list[str] = Field(default=[])
    """Further mounts of the container, as `HERE:THERE`."""

    options: list[Option] = Field(default=[])
    """Further options of sbatch, as `--exclusive`."""


class KubernetesSettings(Settings):
    """Kubernetes, with the JobSet controller, which starts a stage's Job when those before it are complete."""

    image: str | None = None
    """Container image with align in it. Required."""

    volume: str | None = None
    """PersistentVolumeClaim that holds recipe, data and runs, shared by all stages. Required."""

    mount: str = "/workspace"
    """Where it is mounted. The command runs there, with the paths that it has in the current folder here."""

    namespace: str | None = None
    """Namespace. None: kubectl's current one."""

    retries: Annotated[int, Field(ge=0)] = 3
    """How often a failed pod is started again. Preempted ones, and those that saved and stopped, do not count."""

    shared_memory: PositiveInt | None = None
    """GiB of /dev/shm. None: the node's default, 64 MiB, which is too little for NCCL and data loaders."""

    secrets: list[str] = Field(default=[])
    """Secrets whose keys become environment variables."""

    pod: dict[str, Any] = Field(default={})
    """Further fields of the pods, such as nodeSelector and tolerations."""


class SkypilotSettings(Settings):
    """SkyPilot's managed jobs: one pipeline, whose tasks run one after another, recovered when preempted."""

    infra: str | None = None
    """Where, as `aws`, `gcp/us-central1` or `k8s/my-context`. None: the cheapest that has it."""

    spot: bool = False
    """Use spot machines."""

    image: str | None = None
    """Image of the machines, as `docker:organisation/name`."""

    workdir: str | None = "."
    """Folder that is copied to the machines, and that the command runs in. None: nothing is copied."""

    mounts: dict[str, str] = Field(default={})
    """Buckets, `{path there: s3://bucket}`. The runs must lie in one, or in a volume."""

    volumes: dict[str, str] = Field(default={})
    """Volumes, `{path there: name of the volume}`."""

    runs: str | None = None
    """Folder of the runs there, inside a bucket or a volume. None: the same as here."""

    retries: Annotated[int, Field(ge=0)] = 3
    """How often a failed stage is started again. Preempted ones, and those that saved and stopped, do not count."""

    secrets: list[Variable] = Field(default=[])
    """Environment variables of this machine that stages get, such as HF_TOKEN."""

    resources: dict[str, Any] = Field(default={})
    """Further fields of `resources`, such as disk_size."""


class RaySettings(Settings):
    """A Ray cluster that sees this folder under the same path. One job runs all stages on one of its machines."""

    address: str | None = None
    """URL of the cluster's dashboard. None: RAY_ADDRESS."""

    options: list[Option] = Field(default=[])
    """Further options of `ray job submit`, as `--entrypoint-resources={"a100": 1}`."""


class SubmitSettings(ResourceSettings):
    """What `align submit` asks for. What stands here holds for every stage and engine."""

    stages: dict[str, ResourceSettings] = Field(default={})
    """What is different for one stage, `{ppo: {nodes: 2}}`."""

    gpu_type: Word | None = None
    """Type of the GPUs as the engine names it, on Slurm and SkyPilot, which requires it. Example: H100."""

    setup: list[str] = Field(default=[])
    """Lines of shell before the command, such as `module load cuda` or `source .venv/bin/activate`."""

    env: dict[Variable, str] = Field(default={})
    """Environment variables. Secrets do not belong here."""

    python: str | None = None
    """Python that has align. None: the one that submits, where the machines share this one's files; else `python`."""

    grace: Annotated[int, Field(ge=30, le=3600)] = 120
    """Seconds that a stage gets to save before it is ended."""

    slurm: SlurmSettings = SlurmSettings()
    """Slurm."""

    kubernetes: KubernetesSettings = KubernetesSettings()
    """Kubernetes."""

    skypilot: SkypilotSettings = SkypilotSettings()
    """SkyPilot."""

    ray: RaySettings = RaySettings()
    """Ray."""

    def of(self, stage: str) -> Resources:
        """What the job of a stage gets: what is said for it, else for all stages, else the default."""
        one = self.stages.get(stage, self)
        given = {
            name: getattr(self, name) if getattr(one, name) is None else getattr(one, name)
            for name in ResourceSettings.model_fields
        }
        gpus = 1 if given["gpus"] is None else given["gpus"]
        filled = {"nodes": given["nodes"] or 1, "gpus": gpus, "processes": given["processes"] or max(gpus, 1)}
        return Resources(**{**given, **filled})
