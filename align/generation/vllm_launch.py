"""The process of a vLLM server: `python -m align.generation.vllm_launch PARENT OPTIONS`, with options of `vllm serve`.

The server and the processes that it starts die with the process PARENT, however that ends. Started by
align.generation.vllm_process.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
"""Holds the key: as an argument it would be in the list of processes."""

_PR_SET_PDEATHSIG = 1


class Guard:
    """ASGI middleware: every request needs the key. vLLM itself asks for it on some paths only, and not on those that
    replace the weights."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app
        self.expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] == "lifespan" or secrets.compare_digest(self._given(scope), self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    @staticmethod
    def _given(scope: Any) -> bytes:
        return dict(scope["headers"]).get(b"authorization", b"")


def die_with(parent: int) -> None:
    """Asks Linux to kill this process once its parent is gone; exits if it already is. A server that is stopped or
    stuck in native code would not look at anything softer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(parent: int, arguments: list[str]) -> None:
    """Serves until it is told to end."""
    die_with(parent)
    # Takes seconds, and not in each process. The `vllm` command itself does not run in the build for CPUs: it looks for
    # a distribution of that name.
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    sys.argv = ["vllm", *arguments]
    serve()


if __name__ == "__mp_main__":  # in a process of the engine, which imports the main module of its parent
    die_with(os.getppid())

if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
