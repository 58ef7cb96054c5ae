"""Settings of what generates responses, and of the measurement at the end of a stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from align.recipe.data_settings import Data
from align.recipe.settings import Settings, execution, function, refuse


class EngineSettings(Settings):
    """What generates responses."""

    engine: Literal["auto", "vllm", "vllm-server", "transformers"] = "auto"
    """vllm: vLLM in the stage's own process, on the policy's weights. vllm-server: vLLM in processes of its own, that
    are started again when they die. transformers: its generation, which needs nothing more. auto: vllm where it is
    installed and can run the model, else transformers; the stage says which."""

    max_sequences: PositiveInt = execution(256)
    """Responses that vLLM works on at a time."""

    kv_cache_bytes: PositiveInt | None = execution(None)
    """Memory for vLLM's cache of keys and values. None: on a CPU what `max_sequences` of the longest need, on a GPU
    what `gpu_memory` leaves."""

    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = execution(0.3)
    """Share of the GPU's memory that vLLM may use: its weights, where they are not shared, and its cache."""

    sleep: Literal["auto", "none", "cache", "all"] = execution("auto")
    """vllm, on a GPU: what it gives up of that while the policy is trained. cache: the cache of keys and values. all:
    also its weights, which is impossible where they are shared with the policy. auto: all where no weight is shared,
    else cache; on a CPU, where vLLM cannot, none."""

    address: str | None = execution(None)
    """vllm-server: URL of a server that runs already; its key is read from VLLM_API_KEY. None: one is started on this
    machine, open to it alone, and ended with the stage."""

    server_gpu: Annotated[int, Field(ge=0)] | None = execution(None)
    """vllm-server: first GPU that a server of the stage's own runs on, by its number among those that the stage sees.
    Servers of further processes take those after it. None: the policy's own."""

    tensor_parallel: PositiveInt = execution(1)
    """vllm-server: GPUs (on a CPU: processes) that a server of the stage's own divides each layer over, for a policy
    that one of them cannot hold. On GPUs `server_gpu` says where they begin."""

    transport: Literal["auto", "memory", "ipc", "nccl"] = execution("auto")
    """vllm-server: how weights get there. memory: through memory of the machine, from any device to any. ipc: through
    the memory of the GPU that policy and server are both on. nccl: from GPU to GPU. auto: ipc on one GPU, nccl between
    GPUs, else memory; the stage says which."""

    timeout: PositiveFloat = execution(600.0)
    """Seconds without a response (vllm-server) or a step (vllm) after which the engine counts as hanging. A server is
    started again; an engine in the stage's process ends it."""

    max_restarts: Annotated[int, Field(ge=0)] = execution(3)
    """How often in a row vLLM is started again when it fails, with the current policy, before the stage gives up."""

    @model_validator(mode="after")
    def _divides_its_own_server(self) -> EngineSettings:
        if self.tensor_parallel > 1 and self.engine != "vllm-server":
            refuse({"tensor_parallel": f"of `engine: vllm-server`; engine {self.engine} computes on one device"})
        if self.tensor_parallel > 1 and self.address is not None:
            refuse({"tensor_parallel": "the server at `address` was started with its own --tensor-parallel-size"})
        return self


class EvaluationSettings(EngineSettings):
    """How policies are measured at the end of their stage, on held-out prompts."""

    gold: str | None = function()
    """`module:function` of a gold scorer `(prompts, responses) -> list of floats in 0..1` that no stage
    trains on."""

    data: Data | None = None
    """Prompts that every stage is measured on and none may train on. None: each stage's own held-out
    prompts."""

    prompts: PositiveInt = 256
    """Held-out prompts sampled from. Fewer are used when the held-out split has fewer."""

    max_response_tokens: PositiveInt = 256
    """Longest response sampled."""

    batch_size: PositiveInt = 64
    """Prompts sampled at a time."""

    engine: Literal["auto", "vllm", "vllm-server", "transformers"] = execution("transformers")
    """What samples, as rollout.engine; vLLM takes half a minute to start. ppo, rloo and grpo sample with their rollout
    engine, which is open already."""
