"""A vLLM server as a child process: where it listens, what it is given, and that nothing of it stays behind."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from align.generation.vllm_launch import KEY_VARIABLE

HOST = "127.0.0.1"

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # has the paths that replace weights
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process would not import the main module: see vllm_launch
    "VLLM_HOST_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Of the server's environment, whatever ours says."""

LAUNCHER_VARIABLES = {
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
"""Of ours and not of the server's: it is no member of the group of processes that trains."""

LAST_LINES, LONGEST_LINE = 12, 300
"""How much of a log goes into an error: lines, and characters of each."""

PATIENCE = 10.0
"""Seconds that processes are given to be gone before each is killed by itself."""


class ServerProcess:
    """A server with `options` of `vllm serve`. It is started by `start`, from a thread that lives as long as it shall:
    it dies with that thread. What it prints is added to the file `log`."""

    def __init__(self, options: Sequence[str], log: Path, environment: Mapping[str, str] | None = None):
        self.log, self.key = log, secrets.token_urlsafe(32)
        self.port = free_port()
        self._temporary = Path(tempfile.mkdtemp(prefix="align-vllm-"))
        self._options = [*options, "--host", HOST, "--port", str(self.port)]
        self._environment = server_environment(self.key, self._temporary) | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """The URL at which it will listen."""
        return f"http://{HOST}:{self.port}"

    @property
    def exit_code(self) -> int | None:
        """Of a server that has ended; None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Starts it, in a session of its own so that Ctrl-C does not reach it."""
        command = [sys.executable, "-m", "align.generation.vllm_launch", str(os.getpid()), *self._options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Ends it with all that it started. It holds nothing to save, and one that hangs would not listen.

        The processes under it die with it (vllm_launch). Python's own helper among them ends by itself, after it has
        removed their shared memory.
        """
        if self._process is not None:
            group = self._process.pid
            self._process.kill()
            self._process.wait()
            for process in wait_gone(group, PATIENCE):
                process.kill()
            self._process = None
        shutil.rmtree(self._temporary, ignore_errors=True)

    def members(self) -> list[psutil.Process]:
        """Its processes that run."""
        return members(self._process.pid) if self._process else []

    def last_lines(self) -> str:
        """The end of its log, without the key."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        return "\n".join(line[:LONGEST_LINE] for line in lines).replace(self.key, "[key]")


def server_environment(key: str, temporary: Path) -> dict[str, str]:
    """The environment of a server; its processes meet, and leave what they forget, in the folder `temporary`."""
    ours = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    if "OMP_NUM_THREADS" in ours:  # who counts threads does not want them bound to one core
        ours.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return ours | SETTINGS | {KEY_VARIABLE: key, "VLLM_RPC_BASE_PATH": str(temporary), "TMPDIR": str(temporary)}


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def members(group: int) -> list[psutil.Process]:
    """The processes of a process group that run. The dead whom nobody has asked for are none."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def wait_gone(group: int, seconds: float) -> list[psutil.Process]:
    """Waits until a process group has ended, at most so long. Returns who is left."""
    end = time.monotonic() + seconds
    while (left := members(group)) and time.monotonic() < end:
        time.sleep(0.2)
    return left
