"""What vLLM is told, in this process and as a server: the same, so that both sample the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from align.errors import ConfigError
from align.generation.engine import Sampling, request_seed

CACHE_BLOCK = 128
"""Tokens for which vLLM reserves memory at a time on a CPU; fewer on a GPU."""

PROMPT_TOKENS = 4096
"""Tokens of prompts that vLLM reads in a step on a CPU."""


def engine_options(
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    max_length: int,
    max_sequences: int,
    kv_cache_bytes: int | None,
    gpu_memory: float,
    seed: int,
    tensor_parallel: int = 1,
) -> dict[str, Any]:
    """How an engine is opened on the model of `folder`, which has this config. Each layer is divided over
    `tensor_parallel` devices. On each of them the cache of keys and values takes `kv_cache_bytes`; by default, on a
    CPU, as many as all sequences need; on a GPU the engine takes the share `gpu_memory` of it."""
    on_gpu = torch.cuda.is_available()
    options = {
        "model": str(folder),
        "load_format": "dummy",  # a weight that is not handed over is random, and cannot go unnoticed
        "dtype": str(dtype).removeprefix("torch."),
        "generation_config": "vllm",  # not what the checkpoint would like
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled, after temperature
        "max_model_len": max_length,
        "max_num_seqs": max_sequences,
        "seed": seed,
        "tensor_parallel_size": tensor_parallel,
    }
    if not on_gpu:
        options |= cpu_options(max_length)
    if on_gpu and kv_cache_bytes is None:
        return options | {"gpu_memory_utilization": gpu_memory}
    needed = -(-cache_bytes(config, dtype, max_length, max_sequences) // tensor_parallel)
    return options | {"kv_cache_memory_bytes": kv_cache_bytes or needed}


def server_options(transport: str) -> dict[str, Any]:
    """What a server is told beyond what every engine is."""
    options: dict[str, Any] = {
        "worker_extension_cls": "align.generation.vllm_worker.WeightReceiver",
        "middleware": "align.generation.vllm_launch.Guard",
        "tokens_only": True,
        "disable_uvicorn_access_log": True,
    }
    if transport == "nccl" or (transport == "auto" and torch.cuda.is_available()):
        options["weight_transfer_config"] = '{"backend": "nccl"}'
    return options


def flags(options: dict[str, Any]) -> list[str]:
    """Options as vLLM's command line takes them."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def cpu_options(max_length: int) -> dict[str, Any]:
    """What is added on a CPU. Compiling a model takes half a minute. And prompts are read whole: for one that is read
    in parts vLLM rewinds the request's random generator, which only CUDA's can."""
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_length, PROMPT_TOKENS),
    }


def sampling_options(sampling: Sampling, count: int, number: int) -> dict[str, Any]:
    """How `count` responses to the prompt of request `number` are sampled."""
    return {
        "n": count,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # what ends a response is in stop_ids
        "seed": request_seed(sampling.seed, number),
        "logprobs": 0,
        "detokenize": False,
    }


def check_length(prompts: Sequence[Sequence[int]], sampling: Sampling, max_length: int) -> None:
    """Raises ConfigError when a prompt and its response may exceed the tokens that fit a sequence."""
    longest = max(map(len, prompts))
    if longest + sampling.max_tokens > max_length:
        raise ConfigError(
            f"rollout: a prompt of {longest} tokens and a response of {sampling.max_tokens} do not fit the engine's "
            f"{max_length} (shorten prompts, or raise the engine's length)"
        )


def group_repeats(prompts: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], int]]:
    """Each run of equal prompts as one of them and how many there are."""
    return [(ids, len(list(run))) for ids, run in groupby(prompts)]


def cache_bytes(config: Any, dtype: torch.dtype, max_length: int, max_sequences: int) -> int:
    """Bytes of keys and values of so many sequences: 2 x layers x key-value heads x their size for each token, and
    memory for whole blocks of tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = -(-max_length // CACHE_BLOCK) * CACHE_BLOCK * max_sequences
    return tokens * 2 * text.num_hidden_layers * heads * size * dtype.itemsize
