"""vLLM in this very process: token ids in, token ids and their log-probabilities out, on the trainer's own weights.

Import this module where the engine is opened: vLLM is optional, and importing it takes seconds.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from align import ranks
from align.errors import RolloutError
from align.generation.engine import CannotRun, Samples, Sampling
from align.generation.rest import NONE, Call, choose_rest
from align.generation.vllm_options import check_length, engine_options, group_repeats, sampling_options
from align.generation.watchdog import Watchdog
from align.generation.weights import HandOver

# Read by vLLM at its import. In this process: a policy cannot share its weights with another one.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # some of it speaks before it has read that

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about Triton and torch, for vLLM's developers
    import vllm._custom_ops as vllm_ops
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers import utils as vllm_layers
    from vllm.platforms import current_platform

DEFAULT_TIMEOUT = 600.0
"""Seconds."""


class VllmEngine:
    """Samples with vLLM's `LLM` from a policy's weights as they are at the last `sync`. One at a time in a process."""

    name = "vllm"
    independent = True

    def __init__(
        self,
        policy: Any,
        folder: Path,
        *,
        dtype: torch.dtype,
        max_length: int,
        max_sequences: int,
        kv_cache_bytes: int | None = None,
        gpu_memory: float = 0.3,
        sleep: str = "auto",
        watchdog: Watchdog | None = None,
        seed: int = 0,
    ):
        """`folder` holds the config of `policy`, a causal model or a PeftModel around one; weights are taken from
        memory. `max_length` tokens, prompt and response, fit a sequence, `max_sequences` are computed at a time. On a
        CPU the cache of keys and values takes `kv_cache_bytes`, by default as many as all sequences need; on a GPU the
        engine takes the share `gpu_memory` of it; `sleep` is what it gives up of that when it rests (choose_rest). The
        `watchdog` sees each of its steps.

        Of several processes each opens one, at the same time: vLLM sets up its own groups of processes together, though
        every engine then computes alone.

        Raises CannotRun when vLLM cannot hold the model, ConfigError when it cannot sleep as asked.
        """
        can_sleep = current_platform.is_sleep_mode_available() and current_platform.is_cumem_allocator_available()
        sleeps = choose_rest(sleep, can_sleep=can_sleep) is not NONE
        options = engine_options(
            folder,
            policy.config,
            dtype=dtype,
            max_length=max_length,
            max_sequences=max_sequences,
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory=gpu_memory,
            seed=seed,
        )
        if ranks.size() > 1:
            options["distributed_executor_backend"] = "external_launcher"  # on the GPU that is this process's
        self.max_length, self._watchdog = max_length, watchdog or Watchdog(DEFAULT_TIMEOUT)
        quiet = warnings.catch_warnings(action="ignore")  # they are for vLLM's developers
        try:
            with quiet, _plain_weights(), _keeping_our_group(), self._watchdog.watching("the start of vLLM"):
                self.llm = LLM(**options, skip_tokenizer_init=True, enable_sleep_mode=sleeps)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise _cannot_run(folder, error) from error
        model = self._model()
        load: Any = model.load_weights
        try:
            self.handover = HandOver(policy, model, load, getattr(model, "packed_modules_mapping", {}))
        except Exception as error:  # loaders raise anything
            self._shut_down()
            raise _cannot_run(folder, error) from error
        self._is_resting = False
        try:
            self.resting = choose_rest(sleep, can_sleep=can_sleep, num_shared=len(self.handover.shared))
        except BaseException:
            self.close()
            raise
        try:  # what has no kernel on this machine shows only now
            self.generate([[0]], Sampling(1, 1.0, (), 0, seed))
        except RolloutError as error:
            self.close()
            raise _cannot_run(folder, error) from error

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        """One response per prompt. Prompts that follow each other and are equal are one request for several samples.
        Each request has a seed of its own, so a response does not depend on what else is in the batch.

        After a rest in which the engine gave up its weights they are handed over again, as they are now.

        Raises ConfigError for a prompt that is too long, RolloutError when vLLM fails.
        """
        check_length(prompts, sampling, self.max_length)
        groups = group_repeats(prompts)
        settings = [
            SamplingParams(**sampling_options(sampling, count, number), flat_logprobs=True)
            for number, (_, count) in enumerate(groups)
        ]
        requests: Any = [{"prompt_token_ids": list(ids)} for ids, _ in groups]
        with self._trusted("sampling with vLLM"):
            if self._is_resting:
                self._wake(self.resting.loses_weights)
            self.llm.enqueue(requests, settings, use_tqdm=False)
            outputs = sorted(self._finished(), key=lambda output: int(output.request_id))
        found = [one for output in outputs for one in output.outputs]
        return Samples.of(
            [one.token_ids for one in found],
            [one.logprobs.logprobs for one in found],  # with logprobs=0 there is one per position
            [one.finish_reason == "stop" for one in found],
            sampling.pad_id,
        )

    def sync(self) -> None:
        """Makes the engine sample from the policy's current weights. What it has cached of prompts is of older ones.
        Raises RolloutError when vLLM fails."""
        with self._trusted("the hand-over to vLLM"):
            self._wake(True)
            self.llm.reset_prefix_cache()

    def rest(self) -> None:
        """Gives up memory, as chosen at the start. Weights that it shares with the policy are never among it."""
        if not self._is_resting:
            with self._trusted("vLLM going to sleep"):
                self._call(self.resting.down)
            self._is_resting = True

    @property
    def summary(self) -> str:
        """How weights reach the engine, and what it gives up when it rests."""
        return ", ".join(filter(None, [self.handover.summary, self.resting.summary]))

    def differing(self) -> list[str]:
        """The names of weights that the engine holds otherwise than the policy; none while it has given up its own."""
        return [] if self._is_resting and self.resting.loses_weights else self.handover.differing()

    def close(self) -> None:
        """Gives the policy memory of its own again, and the engine's back."""
        self.handover.release()
        self._shut_down()

    @contextmanager
    def _trusted(self, what: str) -> Iterator[None]:
        """Inside, `what` has to make progress, and whatever it raises is an error of the engine, which is not to be
        trusted any more."""
        try:
            with self._watchdog.watching(what):
                yield
        except Exception as error:
            raise RolloutError(f"{what} failed: {type(error).__name__}: {_first_line(error)}") from error

    def _finished(self) -> Iterator[Any]:
        """Each request's output, in the order in which they end."""
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():
            yield from (output for output in engine.step() if output.finished)
            self._watchdog.seen()

    def _wake(self, hands_over: bool) -> None:
        """Takes back what was given up, if anything was, around a hand-over."""
        if self._is_resting:
            self._call(self.resting.before)
        if hands_over:
            self.handover.sync()
        if self._is_resting:
            self._call(self.resting.after)
            self._is_resting = False

    def _call(self, calls: Sequence[Call]) -> None:
        for name, given in calls:
            getattr(self.llm, name)(**given)

    def _shut_down(self) -> None:
        with _keeping_our_group():
            self.llm.llm_engine.engine_core.shutdown()

    def _model(self) -> nn.Module:
        executor: Any = self.llm.llm_engine.model_executor
        return executor.driver_worker.worker.model_runner.model


@contextmanager
def _plain_weights() -> Iterator[None]:
    """Inside, models are built without packed copies of their weights, which vLLM makes on a CPU: they would stay as
    they are when the weights change."""
    if not current_platform.is_cpu():
        yield
        return
    with (
        patch.object(vllm_ops, "_supports_onednn", False),
        patch.object(vllm_layers, "check_cpu_sgl_kernel", lambda *_: False),
    ):
        yield


@contextmanager
def _keeping_our_group() -> Iterator[None]:
    """Inside, vLLM ends its own groups of processes, and not the one of the trainer's processes that it found."""
    if ranks.size() == 1:
        yield
        return
    end = dist.destroy_process_group
    with patch.object(dist, "destroy_process_group", lambda group=None: group and end(group)):
        yield


def _cannot_run(folder: Path, error: Exception) -> CannotRun:
    return CannotRun(f"engine vllm cannot run {folder}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
