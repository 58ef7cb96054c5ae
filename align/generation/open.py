"""Opens the engine that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from align import ranks
from align.errors import ConfigError, RolloutError, leave
from align.generation.engine import CannotRun, RolloutEngine
from align.generation.restarting import RestartingEngine
from align.generation.transformers_engine import TransformersEngine
from align.generation.watchdog import Watchdog
from align.generation.weights import effective_weights, gathered
from align.models.partitioned import is_partitioned
from align.recipe.engine_settings import EngineSettings


@dataclass(frozen=True)
class Sampled:
    """What an engine is opened for."""

    policy: Any
    """The model in memory, which may change."""
    folder: Path
    """Where it was read from: for its config."""
    dtype: torch.dtype
    """What the engine computes in."""
    max_length: int
    """Tokens of the longest prompt and response."""
    batch_size: int
    """Responses that transformers samples at a time."""
    changes_meanwhile: bool = False
    """Whether the policy is updated while a server samples from it as it was."""


def open_engine(
    settings: EngineSettings,
    what: Sampled,
    *,
    notice: Callable[[str], None],
    log: Path | None = None,
    end: Callable[[RolloutError], None] = leave,
) -> RolloutEngine:
    """The engine that a recipe asks for. `auto` is vLLM in this process where it is installed and can run the model,
    else transformers; `notice` is told why, and whatever else happens to the engine. A server writes to the file `log`;
    `end` ends this process when an engine in it hangs.

    Raises ConfigError when the engine that is asked for is not installed, cannot run the model, or cannot do with it
    what else is asked.
    """
    if settings.engine == "transformers":
        return TransformersEngine(what.policy, what.batch_size)
    if find_spec("vllm") is None:
        if settings.engine != "auto":
            raise ConfigError(
                f"engine {settings.engine}: vLLM is not installed; install it (docs/rollouts.md) or use transformers"
            )
        notice("transformers, because vLLM is not installed")
        return TransformersEngine(what.policy, what.batch_size)
    watchdog = Watchdog(settings.timeout, end)
    if settings.engine == "vllm-server":
        return _server(settings, what, watchdog, notice, log)
    # Of several processes one alone cannot open an engine: they set up vLLM's groups together.
    max_restarts = settings.max_restarts if ranks.size() == 1 else 0
    try:
        return RestartingEngine(lambda: _in_process(settings, what, watchdog), max_restarts, notice)
    except CannotRun as error:
        if settings.engine != "auto":
            raise
        notice(f"transformers, because {error}")
        return TransformersEngine(what.policy, what.batch_size)


def _in_process(settings: EngineSettings, what: Sampled, watchdog: Watchdog) -> RolloutEngine:
    from align.generation.vllm_engine import VllmEngine  # optional, and takes seconds

    return VllmEngine(
        what.policy,
        what.folder,
        dtype=what.dtype,
        max_length=what.max_length,
        max_sequences=settings.max_sequences,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory=settings.gpu_memory,
        sleep=settings.sleep,
        watchdog=watchdog,
    )


def _server(
    settings: EngineSettings, what: Sampled, watchdog: Watchdog, notice: Callable[[str], None], log: Path | None
) -> RolloutEngine:
    from align.generation.vllm_server import Timeouts, VllmServerEngine

    # Weights that are in parts are gathered by all processes, and a server is started again by one.
    is_parted = any(map(is_partitioned, what.policy.parameters()))
    return VllmServerEngine(
        what.folder,
        lambda: ((weight.name, tensor) for weight, tensor in gathered(effective_weights(what.policy))),
        dtype=what.dtype,
        max_length=what.max_length,
        max_sequences=settings.max_sequences,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory=settings.gpu_memory,
        address=settings.address,
        gpus=_server_gpus(settings),
        tensor_parallel=settings.tensor_parallel,
        transport=settings.transport,
        timeouts=Timeouts(settings.timeout, settings.timeout, settings.timeout),
        watchdog=watchdog,
        max_restarts=settings.max_restarts,
        keeps_policy=what.changes_meanwhile or is_parted,
        notice=notice,
        log=log,
    )


def _server_gpus(settings: EngineSettings) -> Sequence[int]:
    """The GPUs of this process's server, by their numbers among those that it sees. Servers of the other processes of
    this machine, which have a GPU each, are on others."""
    if not torch.cuda.is_available():
        return ()
    own, count = torch.cuda.current_device(), settings.tensor_parallel
    if settings.server_gpu is not None:
        first = settings.server_gpu + own * count
        return range(first, first + count)
    if count > 1:
        raise ConfigError("rollout.tensor_parallel: say with server_gpu where the GPUs of the server begin")
    return (own,)
