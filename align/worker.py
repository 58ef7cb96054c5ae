"""A process of one stage: `python -m align.worker STAGE_DIR`, started by align.pipeline.runner, or by hand with
`accelerate launch ... -m align.worker RECIPE STAGE [KEY=VALUE ...]`.

It reads job.json, runs the stage, and writes record.json last: without a record the stage does not exist.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from align.context import Context, StopFlag
from align.errors import AlignError, ConfigError, DistributedError, Problem, WriteError
from align.job import StageResult
from align.pipeline.estimate.auto import Decision, decide, is_auto
from align.pipeline.estimate.memory import Device
from align.pipeline.folders import LOG, RECORD, Order, content, read_order, write_failure
from align.pipeline.graph import wanted_launch
from align.pipeline.processes import ENVIRONMENT, die_with_parent, end
from align.pipeline.provenance import peak_memory, record_of, timestamp
from align.pipeline.runner import order_stage
from align.recipe.launch_settings import LaunchSettings
from align.recipe.load import load_recipe
from align.recipe.shipped import find_recipe
from align.recipe.spec import named
from align.records import remove_folder, write_json
from stages import load_specs


def main(arguments: list[str]) -> int:
    """Runs the stage of a folder, or of a recipe; returns the exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # When imported (peft does) it warns of a missing CPU kernel that align does not use (align.models.quantised).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Libraries import it where it is installed, and it then warns that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    die_with_parent(os.getppid())
    stop = StopFlag()
    stop.install()
    directory = None
    try:
        with _stage_folder(arguments) as directory:
            if directory is not None:
                run_stage(directory, stop)
    except AlignError as error:
        return _fail(directory, error.exit_code, str(error))
    except KeyboardInterrupt:
        return _fail(directory, 130, "stopped at once by a second Ctrl-C")
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return _fail(directory, WriteError.exit_code, f"{error.filename or directory}: the disk is full")
        return _fail(directory, 1, traceback.format_exc())
    except Exception as error:
        return _fail_unexpectedly(directory, error)
    return 0


@contextmanager
def _stage_folder(arguments: list[str]) -> Iterator[Path | None]:
    """The folder of the stage. One of a recipe is made by the first process as `align run` makes it, and the others are
    told; None: the stage is up to date."""
    if len(arguments) == 1:
        yield Path(arguments[0])
        return
    if not arguments:
        raise ConfigError(Problem("align.worker", "nothing to run", "give it a stage's folder, or RECIPE STAGE"))
    path, stage, *overrides = arguments  # as `align run -c RECIPE STAGE KEY=VALUE ...`
    recipe = load_recipe(find_recipe(Path(path))[0], overrides=overrides, requested=[stage], specs=load_specs())
    launch = wanted_launch(recipe.stages[stage].config, recipe.settings)
    if launch.processes > 1:
        os.environ.setdefault("ALIGN_WORLD_SIZE", str(launch.processes))
    _world_size()
    is_main = int(os.environ.get("RANK", "0")) == 0
    with order_stage(recipe, stage, Path("runs").resolve(), sys.argv) if is_main else nullcontext() as directory:
        if "WORLD_SIZE" in os.environ:
            from align.ranks import join, share  # loads torch

            join(launch.timeout)
            directory = share(directory)
        yield directory


def run_stage(directory: Path, stop: StopFlag) -> None:
    """Runs the stage and, on the first process, writes its record and removes its checkpoints."""
    if sys.flags.optimize:
        raise ConfigError("python -O (or PYTHONOPTIMIZE) removes checks that stages rely on; start without it")
    process, processes = int(os.environ.get("RANK", "0")), _world_size()
    order = read_order(directory)
    if processes > 1 and order.job.launch is None:
        raise ConfigError(Problem(order.job.stage, f"{order.job.kind} trains in one process, and {processes} started"))
    if "WORLD_SIZE" in os.environ:
        from align.ranks import gather, join, leave  # loads torch

        join(LaunchSettings.model_validate(order.job.launch or {}).timeout)
    config = named(order.config_class).model_validate(order.job.config)
    context = Context(order.job, stop, partial(_abort, directory), process=process, processes=processes)
    # Taken now: what the inputs hold while they are read, not what they may hold hours later.
    contents = {slot: content(Path(value.path)) for slot, value in order.job.inputs.items()}
    started = time.time()
    decision = _decide(order, config, processes) if is_auto(config) else None
    if decision is not None:
        config = decision.apply(config)
    result: StageResult = named(order.run)(config, context)
    peaks = [peak_memory()]
    if "WORLD_SIZE" in os.environ:
        peaks = gather(peaks[0])  # so all have come here: a stage is complete when it is in all processes
    if context.is_main:
        record = record_of(order, result, contents, started, peaks)
        write_json(directory / RECORD, record | ({"decided": decision.as_json()} if decision else {}))
        if context.checkpoints.exists():
            remove_folder(context.checkpoints)
    if "WORLD_SIZE" in os.environ:
        leave()


def _decide(order: Order, config: Any, processes: int) -> Decision:
    """What is left to the machine, decided by the first process for all, and said."""
    import torch

    from align.ranks import share

    device, room = Device(), psutil.virtual_memory().available // processes
    if torch.cuda.is_available():
        room, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
        device = Device(total, processes)
    is_main = os.environ.get("RANK", "0") == "0"
    decision = share(decide(load_specs()[order.job.kind], config, order.job, device, room) if is_main else None)
    if is_main:
        how = decision.gradient_checkpointing
        print(f"  {order.job.stage}: gradient checkpointing: {how} ({decision.because})", file=sys.stderr)
    return decision


def _world_size() -> int:
    """How many processes were started. Raises DistributedError if these are not as many as were asked for."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = int(os.environ.get("ALIGN_WORLD_SIZE", size))
    if size != wanted:
        raise DistributedError(
            f"{wanted} processes were asked for and {size} started; check the launcher's arguments "
            "(`accelerate launch --cpu` starts one process whatever --num_processes says)"
        )
    return size


def _abort(directory: Path, error: AlignError) -> None:
    """From any thread: the main one may be stuck."""
    os._exit(_fail(directory, error.exit_code, str(error)))


def _fail_unexpectedly(directory: Path | None, error: Exception) -> int:
    """An error of no class of ours: the end of another process, as the communication library tells it, or a bug."""
    if "torch" in sys.modules:
        from align.ranks import LostContact, as_distributed

        distributed = as_distributed(error)
        if isinstance(distributed, LostContact):
            return _log(directory, distributed.exit_code, str(distributed))
        if distributed:
            return _fail(directory, distributed.exit_code, str(distributed))
    return _fail(directory, 1, traceback.format_exc())


def _fail(directory: Path | None, exit_code: int, message: str) -> int:
    """Says what went wrong, unless another process was first."""
    if directory is None or write_failure(directory, exit_code, message):
        print(message, file=sys.stderr, flush=True)
    return _log(directory, exit_code, message)


def _log(directory: Path | None, exit_code: int, message: str) -> int:
    if directory is None:
        return exit_code
    process = f" process {os.environ['RANK']}" if "RANK" in os.environ else ""
    try:
        with (directory / LOG).open("a", encoding="utf-8") as stream:
            stream.write(f"{timestamp(time.time())}{process} exit code {exit_code}\n{message}\n")
    except OSError:
        print(f"{directory / LOG}: cannot write", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    end(main(sys.argv[1:]))
