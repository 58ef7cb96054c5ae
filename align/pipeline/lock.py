"""One run per folder at a time: a lock that the system releases when the last process holding it is gone."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from align.errors import Interrupted, WriteError


@contextmanager
def lock_run(run_dir: Path) -> Iterator[int]:
    """Holds the run's folder. Gives the file descriptor, which workers inherit: the run stays locked while
    any of them lives. Raises Interrupted at once if another run holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise WriteError(f"{run_dir}: cannot write: {error.strerror or error}") from error
    try:
        _take(descriptor, run_dir)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, run_dir: Path) -> None:
    """Locks the file and writes into it who holds it."""
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        raise Interrupted(f"{run_dir} is in use by {holder}; wait for it or use --run NAME") from error
    except OSError as error:
        raise WriteError(f"{run_dir}: cannot lock it: {error.strerror or error}") from error


def _holder(descriptor: int) -> str:
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {facts['pid']} on {facts['host']} (since {facts['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
