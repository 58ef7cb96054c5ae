"""The policy's weights on their way to a vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from align.errors import RolloutError
from align.generation.transport import WAYS, Transport, buckets, choose_transport, offered, own_gpu
from align.generation.vllm_client import Unavailable, VllmClient
from align.generation.watchdog import Watchdog


class WeightSender:
    """Sends a policy to a server, and to the one that takes its place.

    `weights` gives the weights as they are when it is called, `asked` names the way (choose_transport), `timeout` is
    the seconds without an answer after which the server counts as hanging; in NCCL, which has none, the `watchdog` ends
    this process. With `keeps_policy`, `send` gives the weights as they were at the last `keep`, of which a copy is held
    in main memory.
    """

    def __init__(
        self,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        dtype: torch.dtype,
        asked: str,
        *,
        timeout: float,
        watchdog: Watchdog | None,
        keeps_policy: bool,
    ):
        self._weights, self.dtype, self._asked, self._timeout = weights, dtype, asked, timeout
        self._watchdog = watchdog or Watchdog(timeout)
        self._keeps_policy = keeps_policy
        self._kept: dict[str, Tensor] = {}
        self._way: Transport | None = None  # kept from server to server: a new one is where the old one was
        self._nccl: Any = None

    @property
    def summary(self) -> str:
        """How weights reach the server; known once some have."""
        assert self._way is not None
        return f"weights sent to a server through {WAYS[self._way]}"

    def keep(self) -> None:
        """Notes the weights of now, if they may change before they are sent."""
        if self._keeps_policy:
            self._kept = {
                name: weight.detach().to("cpu", self.dtype, copy=True).contiguous() for name, weight in self._weights()
            }

    def forget(self) -> None:
        """The server is gone."""
        self._nccl = None

    def send(self, client: VllmClient) -> None:
        """Gives the server the weights. Raises Unavailable when it fails, RolloutError when it misses some, ConfigError
        when they cannot go the way that was asked for."""
        if self._way is None:
            places = client.ask_workers("align_place", timeout=self._timeout)
            self._way = choose_transport(self._asked, own_gpu(), places)
        if self._way == "nccl":
            self._send_by_nccl(client)
        else:
            self._send_in_buckets(client, self._way)
        if not self._post(client, "/reset_prefix_cache", None).get("success"):
            raise Unavailable("kept what it computed with older weights")

    def _policy(self) -> Iterable[tuple[str, Tensor]]:
        return self._kept.items() if self._keeps_policy else self._weights()

    def _send_in_buckets(self, client: VllmClient, way: Transport) -> None:
        missing: list[str] = ["all"]
        device = "cuda" if way == "ipc" else "cpu"
        for number, bucket in enumerate(buckets(self._policy(), self.dtype, device)):
            with offered(bucket, way) as (method, offer):
                replies = client.ask_workers(method, offer, number == 0, timeout=self._timeout)
            missing = sorted({name for reply in replies for name in reply["missing"]})
        if missing:
            raise RolloutError(f"the vLLM server was not given {', '.join(missing[:5])} (of {len(missing)} weights)")

    def _send_by_nccl(self, client: VllmClient) -> None:
        from align.generation.vllm_nccl import connect  # loads vllm

        if self._nccl is None:
            size = client.call("GET", "/get_world_size", None, self._timeout)["world_size"]
            self._nccl = connect(lambda path, body: self._post(client, path, body), self._policy, self.dtype, size)
        with self._watchdog.watching("sending weights by NCCL"):  # of which this process is a part
            self._nccl.send_weights()

    def _post(self, client: VllmClient, path: str, body: Any) -> dict[str, Any]:
        return client.call("POST", path, body, self._timeout)
