"""vLLM as a server: token ids and their log-probabilities over HTTP, from processes that may die and come back.

The server is a child of ours, on 127.0.0.1 and behind a key; or one that runs already, at `address`. Weights reach it
by the way that `transport` names. When it dies, hangs or breaks, the server is started again, given the policy again
and asked again with the same seeds; the responses are the same (up to rounding, which depends on what else happens to
be in a batch).

A server of one's own, on this machine and of the same user, with the key in VLLM_API_KEY here and there:

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --tokens-only --host 127.0.0.1
        --worker-extension-cls align.generation.vllm_worker.WeightReceiver
        --middleware align.generation.vllm_launch.Guard
        --logprobs-mode processed_logprobs --generation-config vllm
    and, to be sent weights from another GPU by NCCL: --weight-transfer-config '{"backend": "nccl"}'
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig

from align.errors import ConfigError, RolloutError
from align.generation.engine import Samples, Sampling
from align.generation.transport import own_gpu, visible_gpus
from align.generation.vllm_client import Response, Unavailable, VllmClient, to_samples
from align.generation.vllm_launch import KEY_VARIABLE
from align.generation.vllm_options import check_length, engine_options, flags, group_repeats, server_options
from align.generation.vllm_process import ServerProcess
from align.generation.vllm_sender import WeightSender
from align.generation.watchdog import Watchdog

Result = TypeVar("Result")

MOST_REQUESTS = 256
"""Requests under way at a time."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds without an answer after which a server counts as hanging."""

    start: float = 600.0
    """Until it is ready."""
    answer: float = 600.0
    """Until all responses to one prompt are complete."""
    sync: float = 300.0
    """Until it has loaded BUCKET_BYTES of weights."""


class VllmServerEngine:
    """Samples with a vLLM server from a policy's weights as they are at the last `sync`."""

    name = "vllm-server"
    independent = True

    def __init__(
        self,
        folder: Path,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        *,
        dtype: torch.dtype,
        max_length: int,
        max_sequences: int,
        seed: int = 0,
        kv_cache_bytes: int | None = None,
        gpu_memory: float = 0.3,
        address: str | None = None,
        gpus: Sequence[int] = (),
        tensor_parallel: int = 1,
        transport: str = "auto",
        timeouts: Timeouts = Timeouts(),
        watchdog: Watchdog | None = None,
        max_restarts: int = 3,
        keeps_policy: bool = False,
        log: Path | None = None,
        notice: Callable[[str], None] = lambda text: None,
    ):
        """Starts the server and gives it the policy.

        `folder` holds the config of the policy; `weights` gives its effective weights as they are when it is called,
        by their names in a saved model, tied ones once or twice. `max_length` tokens, prompt and response, fit a
        sequence, `max_sequences` are computed at a time. On a CPU the cache of keys and values takes `kv_cache_bytes`,
        by default as many as all sequences need; on a GPU the engine takes the share `gpu_memory` of it. `gpus` are the
        numbers of the GPUs that it sees, among ours (none: all); it divides each layer over `tensor_parallel` of them.
        Weights go there by the way `transport` (choose_transport). The `watchdog` ends this process when it hangs in
        NCCL, which has no timeout.

        A server that fails is started again at most `max_restarts` times in a row; `notice` is given a line about each.
        It is given the policy as it is then; with `keeps_policy` as it was at the last `sync`, of which a copy is kept
        in main memory, so that `generate` may run in a thread while the policy is updated. What a server prints goes to
        the file `log`, by default a temporary one that is kept if the server failed.

        Raises RolloutError when the server does not start or does not take the weights, ConfigError when they cannot go
        that way.
        """
        _check_transport(transport)
        self._sender = WeightSender(
            weights, dtype, transport, timeout=timeouts.sync, watchdog=watchdog, keeps_policy=keeps_policy
        )
        self.max_length, self.max_sequences = max_length, max_sequences
        self.timeouts, self.max_restarts, self._notice = timeouts, max_restarts, notice
        self._address = address
        self._removes_log = address is None and log is None
        self.log = _temporary_log() if self._removes_log else log or Path(os.devnull)
        options = engine_options(
            folder,
            AutoConfig.from_pretrained(folder),
            dtype=dtype,
            max_length=max_length,
            max_sequences=max_sequences,
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory=gpu_memory,
            seed=seed,
            tensor_parallel=tensor_parallel,
        )
        self._options = flags(options | server_options(transport))
        self._environment = _environment(folder, gpus)
        self.server: ServerProcess | None = None
        self._client: VllmClient | None = None
        self._is_current = self._is_closed = False
        # A server dies with the thread that starts it, which may not be one that samples once and ends.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="vllm-server")
        self._ending = RLock()
        atexit.register(self.close)
        self._begin()

    @property
    def summary(self) -> str:
        """How weights reach the server."""
        return self._sender.summary

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        """One response per prompt. Prompts that follow each other and are equal are one request for several samples.
        Each request has a seed of its own, so a response does not depend on what else is in the batch.

        Raises ConfigError for a prompt that is too long, RolloutError when the server gave up, NumericError when it
        computes what is not finite.
        """
        check_length(prompts, sampling, self.max_length)
        groups = list(_at_most(group_repeats(prompts), self.max_sequences))
        answers = self._surviving(lambda: self._ask(groups, sampling))
        return to_samples([one for answer in answers for one in answer], sampling)

    def sync(self) -> None:
        """Gives the server the policy's current weights. Raises RolloutError when it gave up or does not take them."""
        self._is_current = False
        self._sender.keep()
        self._surviving(lambda: None)

    def rest(self) -> None:
        """Nothing to do: what it holds is the server's."""

    def differing(self) -> list[str]:
        """Nothing: what the server holds is not read back. A weight that it was not given is an error of `sync`."""
        return []

    def close(self) -> None:
        """Ends the server, unless it is somebody else's. A `generate` that is under way raises RolloutError."""
        atexit.unregister(self.close)
        self._is_closed = True
        self._starter.shutdown()  # from now on none can be started
        self._kill()
        if self._removes_log:
            self.log.unlink(missing_ok=True)

    def _surviving(self, action: Callable[[], Result]) -> Result:
        """What `action` returns with a server that runs and has the current policy, however often that takes one."""
        for restarts_left in reversed(range(self.max_restarts + 1)):
            try:
                if self._client is None:
                    self._start()
                if not self._is_current:
                    self._sender.send(self.client)
                    self._is_current = True
                return action()
            except Unavailable as failure:
                if self._is_closed:
                    raise RolloutError("the vLLM server was ended while it sampled") from None
                if not restarts_left:
                    raise self._given_up(failure) from None
                self._kill()
                self._notice(f"the vLLM server {failure}; starting it again")
        raise AssertionError("unreachable")

    def _given_up(self, failure: Unavailable) -> RolloutError:
        """Ends the server; the error has its last words, if it is ours."""
        end = "" if self.server is None else f"; its log {self.log} ends:\n{self.server.last_lines()}"
        self._removes_log = False  # it is worth keeping
        self._kill()
        return RolloutError(f"the vLLM server{'' if self._address is None else f' at {self._address}'} {failure}{end}")

    def _begin(self) -> None:
        """The first start, which is not tried again: the settings may be wrong."""
        try:
            self._start()
            self.sync()
        except Unavailable as failure:
            error = self._given_up(failure)
            self.close()
            raise error from None
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        """Starts a server, or looks for the one that is somebody else's, and waits until it is ready."""
        if self._address is None:
            self.server = ServerProcess(self._options, self.log, self._environment)
            self._starter.submit(self.server.start).result()
        key = self.server.key if self.server else os.environ.get(KEY_VARIABLE, "")
        self._client = VllmClient(self.server.address if self.server else self._address or "", key)
        end = time.monotonic() + self.timeouts.start
        while not self._is_ready():
            if time.monotonic() > end:
                raise Unavailable(f"was not ready within {self.timeouts.start:g} s")
            time.sleep(0.25)

    def _is_ready(self) -> bool:
        if self.server and self.server.exit_code is not None:
            raise Unavailable(f"ended while it started (exit code {self.server.exit_code})")
        return self.client.is_ready()

    def _kill(self) -> None:
        """Ends the server, and with it all that waits for it. One of somebody else's is left by itself."""
        with self._ending:
            if self.server is not None:
                self.server.kill()
            if self._client is not None:
                self._client.close()
            self.server = self._client = None
            self._sender.forget()
            self._is_current = False

    @property
    def client(self) -> VllmClient:
        """Who asks the server. Raises Unavailable when that was ended."""
        if self._client is None:
            raise Unavailable("was ended")
        return self._client

    def _ask(self, groups: Sequence[tuple[Sequence[int], int]], sampling: Sampling) -> list[list[Response]]:
        """The responses to each prompt that is asked so often."""
        most = max(count for _, count in groups)
        under_way = max(1, 2 * self.max_sequences // most)  # twice what is computed: the server never waits for us
        pool = ThreadPoolExecutor(min(under_way, MOST_REQUESTS, len(groups)))
        try:
            answers = [
                pool.submit(self._sample, ids, count, sampling, number) for number, (ids, count) in enumerate(groups)
            ]
            for answer in wait(answers, return_when=FIRST_EXCEPTION).done:
                answer.result()  # raises what went wrong first, while others are still under way
            return [answer.result() for answer in answers]
        except Unavailable:
            raise
        except BaseException:  # what is left of a round that was broken off would be in the way of the next one
            self._kill()
            raise
        finally:  # without waiting: requests to a server that hangs end when it is killed
            pool.shutdown(wait=False, cancel_futures=True)

    def _sample(self, ids: Sequence[int], count: int, sampling: Sampling, number: int) -> list[Response]:
        return self.client.sample(ids, count, sampling, number, self.timeouts.answer)


def _at_most(groups: Sequence[tuple[Sequence[int], int]], most: int) -> Iterator[tuple[Sequence[int], int]]:
    """Groups of at most so many: the server computes no more samples for one request."""
    for ids, count in groups:
        for first in range(0, count, most):
            yield ids, min(most, count - first)


def _check_transport(transport: str) -> None:
    if transport in {"ipc", "nccl"} and own_gpu() is None:
        raise ConfigError(f"rollout.transport {transport}: the policy is on the CPU; use auto or memory")


def _environment(folder: Path, gpus: Sequence[int]) -> dict[str, str]:
    """What a server of ours finds in its environment besides what is in this one."""
    environment = {"HF_HUB_OFFLINE": "1"} if folder.is_dir() else {}
    if gpus:
        visible = visible_gpus(gpus, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        environment["CUDA_VISIBLE_DEVICES"] = visible
    return environment


def _temporary_log() -> Path:
    number, name = tempfile.mkstemp(prefix="align-vllm-", suffix=".log")
    os.close(number)
    return Path(name)
