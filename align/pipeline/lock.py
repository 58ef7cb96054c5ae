"""One run per folder at a time, or several of one stage each: locks that the system releases when the last process
holding them is gone."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from align.errors import Interrupted, WriteError
from align.records import sweep


@contextmanager
def lock_run(run_dir: Path, stage: str | None = None) -> Iterator[list[int]]:
    """Holds the run's folder, or with `stage` this stage of it, beside others that hold other stages. Gives the file
    descriptors, which workers inherit: what is held stays locked while any of them lives. Raises Interrupted at once if
    another run holds it.
    """
    with ExitStack() as held:
        descriptors = [_open(run_dir, ".lock", held)]
        _take(descriptors[0], run_dir, fcntl.LOCK_SH if stage else fcntl.LOCK_EX)
        if stage:
            descriptors.append(_open(run_dir, f".lock-{stage}", held))
            _take(descriptors[1], run_dir / stage, fcntl.LOCK_EX)
        else:
            sweep(run_dir)  # nobody else is writing here
        yield descriptors


def _open(run_dir: Path, name: str, held: ExitStack) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise WriteError(f"{run_dir}: cannot write: {error.strerror or error}") from error
    held.callback(os.close, descriptor)
    return descriptor


def _take(descriptor: int, held: Path, kind: int) -> None:
    """Locks the file and writes into it who holds it."""
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        raise Interrupted(f"{held} is in use by {holder}; wait for it or use --run NAME") from error
    except OSError as error:
        raise WriteError(f"{held}: cannot lock it: {error.strerror or error}") from error


def _holder(descriptor: int) -> str:
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {facts['pid']} on {facts['host']} (since {facts['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
