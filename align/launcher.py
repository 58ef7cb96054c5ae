"""`accelerate launch` for a stage: `python -m align.launcher --config_file FILE -m align.worker STAGE_DIR`.

The same processes with the same environment. What it adds is the end: when one of them was killed and nobody is left to
say so, it does, and it ends with the stage's exit code and without a traceback of its own.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from align.errors import DistributedError
from align.pipeline.folders import read_failure, write_failure


def main(arguments: list[str]) -> int:
    """Starts the processes and waits for them; returns the exit code of the stage."""
    directory = Path(arguments[-1])
    # It reports every process that it ends after the first failed one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        return read_failure(directory) or _report(directory, error)
    except (RendezvousError, dist.DistError) as error:
        return _say(directory, DistributedError.exit_code, f"the machines did not find each other: {error}")
    return 0


def _report(directory: Path, error: ChildFailedError) -> int:
    """Says how a stage ended whose processes could not."""
    killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
    if killed:
        rank, number = next(iter(killed.items()))  # the first that was seen
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        message = f"process {rank} was killed by {signal.Signals(number).name}{hint}"
        code = 128 + number
    else:
        message, code = "a process on another machine ended; see what was said there", DistributedError.exit_code
    return _say(directory, code, message)


def _say(directory: Path, code: int, message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    write_failure(directory, code, message)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
