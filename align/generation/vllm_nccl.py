"""Weights to a vLLM server on other GPUs by NCCL, with vLLM's own weight transfer: no copy through the host.

A server that dies during a transfer leaves this process inside NCCL, where no timeout reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from align.generation.vllm_process import HOST, free_port

Post = Callable[[str, Any], Any]


def connect(
    post: Post, weights: Callable[[], Iterable[tuple[str, Tensor]]], dtype: torch.dtype, num_workers: int
) -> Any:
    """Joins a group with the server's workers; `send_weights()` of the result sends the weights of the moment. NCCL
    wants a GPU for each of them (transport.choose_transport)."""
    group = NCCLTrainerInitInfo(HOST, free_port(), num_workers + 1, rank=0)
    return WeightTransferTrainerFactory.trainer_init(group, client=_Client(post), source=_Source(weights, dtype))


class _Source(WeightSource):
    def __init__(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], dtype: torch.dtype):
        self._weights, self._dtype = weights, dtype
        # Asked for at every transfer, and never other: shapes of partitioned weights cost as much as the weights.
        self._metadata = [ParamMeta(name, dtype, tuple(weight.shape)) for name, weight in weights()]

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._weights():
            yield name, weight.detach().to("cuda", self._dtype).contiguous()


class _Client:
    """What vLLM's side of the trainer says to the server; its own client knows no key."""

    def __init__(self, post: Post):
        self._post = post

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self._post("/shutdown_weight_transfer_engine", None)

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", None)

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version} if weight_version else None)
