"""Processes of stages: what is in their environment; they do not outlive their parent, and signals reach those that can
save."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from typing import NoReturn

import psutil

_PR_SET_PDEATHSIG = 1

ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Of processes that load models, unless set: nothing calls home, tokenizers do not fork threads under data loaders, and
the only progress bar is ours."""


def die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process once its parent is gone; exits if it already is.

    SIGKILL, because a process stuck in native code would not look at anything softer. Artifacts and
    checkpoints are whole or absent whenever it comes.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end(code: int) -> NoReturn:
    """Ends this process without the interpreter's own end: a thread of a library that wakes up during that (gloo's,
    FSDP's) would abort it, and a stage that is complete would have failed."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def signal_workers(pid: int, number: int, *, launched: bool) -> None:
    """Sends a signal to the stage's process, or to those that a launcher started.

    Not to the launcher itself, which would die and take them along before they save, and not to the whole
    process group: helpers of a stage (data loaders, engines) must live until it has saved.
    """
    try:
        process = psutil.Process(pid)
        workers = process.children() if launched else [process]
        if not workers:
            process.kill()  # a launcher may wait for another machine where it sees no signal; nothing can be lost yet
        for worker in workers:
            worker.send_signal(number)
    except psutil.NoSuchProcess:
        return
