"""Settings of the processes and machines that a stage is trained by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from align.recipe.settings import Settings, execution, refuse


class LaunchSettings(Settings):
    """The processes that a stage trains on, and how they share the work. How many there are changes nothing but the
    order in which sums are rounded."""

    processes: PositiveInt = 1
    """Processes in all, over all machines: one for each GPU. Rows of a batch are divided among them."""

    strategy: Literal["ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-nvme", "fsdp"] = "ddp"
    """ddp: each holds everything. zero1: a share of the optimiser's state; zero2: and of the gradients; zero3: and of
    the weights (DeepSpeed). offload: the shares are in main memory; nvme: on a disk. Files of `deepspeed/`. fsdp: as
    zero3, with torch alone (FSDP2)."""

    config: str | None = execution(None, file=True)
    """A file of `accelerate config` to start with, instead of `processes` and `strategy`."""

    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for another one before the stage fails: more than saving the model takes."""

    @model_validator(mode="after")
    def _one_way(self) -> LaunchSettings:
        if self.config is not None and (self.processes, self.strategy) != (1, "ddp"):
            raise ValueError("config says how many processes there are and their strategy; leave both out here")
        return self

    @property
    def is_direct(self) -> bool:
        """Whether the stage is one process that needs no launcher."""
        return self.processes == 1 and self.strategy == "ddp" and self.config is None


class NodesSettings(Settings):
    """The machines of a run. The same command is given on each of them, in a folder that they share."""

    count: PositiveInt = 1
    """Machines."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Number of this machine; 0 writes everything."""

    address: str | None = None
    """Host name or address of machine 0, as the others reach it. Required for several machines."""

    port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """The first of as many free ports of machine 0 as there are stages."""

    rendezvous: Literal["static", "c10d"] = "static"
    """How processes get their numbers. static: by the `rank` of their machine. c10d: from the machines' meeting at
    `address`; then it is enough that `rank` is 0 there and not 0 elsewhere."""

    @model_validator(mode="after")
    def _agree(self) -> NodesSettings:
        if self.rank >= self.count:
            refuse({"rank": f"{self.rank} of {self.count} machines: they are numbered from 0"})
        if self.count > 1 and self.address is None:
            refuse({"address": f"required for {self.count} machines: where the others find machine 0"})
        return self
