"""What `gradient_checkpointing: auto` means on the machine that a stage starts on. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.job import Job
from align.pipeline.estimate.memory import Device
from align.pipeline.estimate.stage import MARGIN, Estimator, with_gradient_checkpointing
from align.pipeline.graph import Node
from align.recipe.spec import StageSpec

GIB = 2**30


@dataclass(frozen=True)
class Decision:
    """What was decided, and from what."""

    gradient_checkpointing: str
    needs: int | None
    """Bytes that a process is estimated to need without; None: unknown."""
    room: int
    """Bytes that there are for it."""
    because: str

    def apply(self, config: Any) -> Any:
        """The stage's settings with it."""
        return with_gradient_checkpointing(config, self.gradient_checkpointing)

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def is_auto(config: Any) -> bool:
    """Whether there is something to decide."""
    return getattr(config, "gradient_checkpointing", None) == "auto"


def decide(spec: StageSpec, config: Any, job: Job, device: Device, room: int) -> Decision:
    """none where the stage is estimated to need at most MARGIN of the `room` of one process without, else full. Full
    also where nothing can be estimated: slower, but it does not run out of memory."""
    with Estimator(Path(job.directory).parents[2]) as estimator:
        known = estimator.know(Node(job.stage, spec, config, config.data, {}), job)
    if isinstance(known, str):
        return Decision("full", None, room, f"the memory it needs cannot be estimated: {known}")
    needs = round(known.estimate(device, config=with_gradient_checkpointing(config, "none")).memory.peak)
    how = "none" if needs <= MARGIN * room else "full"
    return Decision(how, needs, room, f"without, {needs / GIB:.2f} GiB of {room / GIB:.2f} GiB are needed")
