"""Inside a worker process of a vLLM server: it takes over a policy's weights. Named to the server by
`--worker-extension-cls`, and imported before the worker builds its model.

Importing this module makes vLLM keep weights as they are on a CPU. It would lay them out for faster kernels and throw
the originals away, so that new weights had nowhere to go, or a tied output layer stayed at the old ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.layers import utils as layers
from vllm.platforms import current_platform

from align.generation.transport import borrowed, gpu_id

_pack = layers.dispatch_cpu_unquantized_gemm


def _keep(layer: Any, remove_weight: bool) -> None:
    """Multiplies with the weight itself. Weights of convolutions and experts (not 2-D) have kernels of their own."""
    if layer.weight.ndim != 2:
        _pack(layer, remove_weight)
    else:
        layer.cpu_linear = torch.nn.functional.linear


if current_platform.is_cpu():
    layers.dispatch_cpu_unquantized_gemm = _keep


class WeightReceiver:
    """What vLLM adds to its worker class; the methods are called by name through /collective_rpc."""

    model_runner: Any
    device: torch.device
    weight_transfer_engine: Any

    def align_place(self) -> dict[str, Any]:
        """The GPU that it computes on, None for a CPU, and whether it was started for vLLM's transfer by NCCL."""
        return {"gpu": gpu_id(self.device), "nccl": self.weight_transfer_engine is not None}

    def align_receive(self, path: str, is_first: bool) -> dict[str, Any]:
        """Loads the weights in a safetensors file, which has them under the names of a saved model, in place.

        A policy comes in several files, the first of which `is_first`. Returns {"missing": names}: what no file of
        this policy has held yet, by vLLM's names; or {"error": what}, when trying again would not help.
        """
        return self._align_load(_saved(path), is_first)

    def align_receive_lent(self, loan: dict[str, Any], is_first: bool) -> dict[str, Any]:
        """The same for weights that lie in the memory of this GPU, lent by the trainer (transport.lent)."""
        answer = self._align_load(borrowed(loan, self.device), is_first)
        torch.cuda.synchronize(self.device)  # the trainer takes its memory back when we answer
        return answer

    def _align_load(self, weights: Iterable[tuple[str, torch.Tensor]], is_first: bool) -> dict[str, Any]:
        model = self.model_runner.get_model()
        if is_first:
            self.align_received: set[str] = set()
        wanted = {name for name, _ in model.named_parameters()}
        try:
            loaded = model.load_weights(weights)
        except Exception as error:  # loaders raise anything; sent as an answer, it keeps the server alive
            return {"error": f"{type(error).__name__}: {error}"}
        self.align_received |= wanted if loaded is None else loaded  # some models do not say what they loaded
        return {"missing": sorted(wanted - self.align_received)}


def _saved(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            yield name, file.get_tensor(name)
