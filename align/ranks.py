"""The processes of one stage: joining them, what they share, and what is said when one is lost.

Without a launcher there is one process, and everything here is trivial. What fails in one process ends it, and the
others then lose contact with it: so a stage ends with its cause, and nothing has to be agreed on before it may fail.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from align.errors import AlignError, DistributedError
from align.records import committed_folder

LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "connection refused")
"""What the communication libraries say when another process is gone."""
LATE = ("timed out", "timeout")


class LostContact(DistributedError):
    """Another process is gone. It has said why, or its launcher will."""


def join(timeout: float) -> None:
    """Joins the processes that a launcher started; alone, does nothing. A process that gets no answer from another for
    `timeout` seconds fails. Raises DistributedError when their number is not the launcher's."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" not in os.environ or (wanted == 1 and not uses_deepspeed()):
        return
    from accelerate import PartialState

    # DeepSpeed calls collectives by names that torch is about to drop; said at every step, it hides what matters.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # by itself "cpu:0", which torch cannot load tensors to
    if on_cpu and uses_deepspeed():
        _deepspeed_on_cpu()
    if uses_fsdp() and os.environ.get("FSDP_VERSION") != "2":
        raise DistributedError("FSDP is started in its first version; set `fsdp_version: 2` in the accelerate config")
    # By itself accelerate gives weights to the first process only, and each of them checks what it has loaded.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # Before anything of accelerate: made by itself, on a CPU, each process would train alone.
    PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout))
    if size() != wanted:
        raise DistributedError(f"{wanted} processes were started and {size()} found each other")


def leave() -> None:
    """Ends the communication, when all processes have come here: one that is simply gone makes others abort."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def uses_deepspeed() -> bool:
    """Whether the launcher was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def uses_fsdp() -> bool:
    """Whether the launcher was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def wait() -> None:
    """Returns when all processes have come here."""
    share(None)


def share(value: Any) -> Any:
    """The value that process 0 gives, in every process."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=_device())
    dist.all_reduce(torch.zeros((), device=_device()))  # the broadcast alone does not hold process 0 back
    return values[0]


def gather(value: Any) -> list[Any]:
    """The value that each process gives, in every process."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    if size() == 1:
        return flag
    found = torch.tensor(float(flag), device=_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def total(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def highest(numbers: torch.Tensor) -> torch.Tensor:
    """The maximum of each number of a tensor over all processes."""
    return _reduced(numbers, dist.ReduceOp.MAX)


@contextmanager
def failing_together(*kinds: type[AlignError]) -> Iterator[None]:
    """What is raised inside by any process, if it is of these kinds, is raised by all: the first process's of those
    that have one. So all can save what they have before they end. Inside, what needs all of them comes before what can
    fail in one."""
    error = None
    try:
        yield
    except kinds as one:
        error = one
    errors = [error] * size()
    if size() > 1:
        dist.all_gather_object(errors, error)
    for one in errors:
        if one is not None:
            raise one


@contextmanager
def committed_together(target: Path, **manifest: Any) -> Iterator[Path]:
    """align.records.committed_folder for a folder that every process writes its own files into. Process 0 commits it
    when all have written theirs."""
    if not is_main():
        yield Path(share(None))
        wait()
    else:
        with committed_folder(target, **manifest) as folder:
            yield Path(share(str(folder)))
            wait()
    wait()


def as_distributed(error: BaseException) -> DistributedError | None:
    """What an error of the communication libraries means; None for any other error."""
    text = str(error).lower()
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo" in text):
        return None
    if any(sign in text for sign in LATE):
        return DistributedError(
            f"process {rank()} of {size()} got no answer from another one within launch.timeout: that one hangs or is "
            "much slower; run the same command to continue"
        )
    return LostContact(f"process {rank()} of {size()} lost contact with another one")


def _reduced(numbers: torch.Tensor, how: Any) -> torch.Tensor:
    if size() == 1:
        return numbers
    found = numbers.to(_device(), copy=True)
    dist.all_reduce(found, how)
    return found.to(numbers.device)


def _deepspeed_on_cpu() -> None:
    """Over gloo alone: its own kernels for shared memory are compiled first, which takes minutes, and then spin."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # optional

    deepspeed.ops.__compatible_ops__.clear()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
