"""How weights travel to the workers of a server: which ways there are between two places, and what goes over them.

Only JSON goes to the server: names, shapes, the path of a file in memory, or where in a GPU's memory to look.
"""

from __future__ import annotations

import base64
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from align.errors import ConfigError

Transport = Literal["memory", "ipc", "nccl"]

WAYS: dict[Transport, str] = {"memory": "memory", "ipc": "the GPU's memory (CUDA IPC)", "nccl": "NCCL"}

BUCKET_BYTES = 512 * 2**20
"""Weights that are on their way at a time."""

HANDLE = (
    "tensor_offset",
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
"""What torch's `rebuild_cuda_tensor` needs to find a flat tensor of another process, by its own names. The handles are
bytes."""


def choose_transport(asked: str, ours: str | None, theirs: Sequence[Mapping[str, Any]]) -> Transport:
    """The way from the policy on the GPU `ours` (None: a CPU) to workers, of which each says its "gpu" and whether it
    was started for "nccl". `auto`: CUDA IPC on one GPU, NCCL between GPUs, else memory.

    Raises ConfigError for a way that does not exist between them.
    """
    gpus = [place.get("gpu") for place in theirs]
    takes_nccl = all(place.get("nccl") for place in theirs)
    is_same = ours is not None and set(gpus) == {ours}
    is_apart = ours is not None and None not in gpus and len({ours, *gpus}) == len(gpus) + 1
    if asked == "memory" or (asked == "ipc" and is_same) or (asked == "nccl" and is_apart and takes_nccl):
        return asked  # type: ignore[return-value]  # is one of them
    if asked == "auto":
        return "ipc" if is_same else "nccl" if is_apart and takes_nccl else "memory"
    if asked == "nccl" and is_apart:
        raise ConfigError(
            "rollout.transport nccl: the server was started without --weight-transfer-config "
            """'{"backend": "nccl"}' (docs/rollouts.md)"""
        )
    wanted = "the same GPU" if asked == "ipc" else "a GPU for each of them"
    where = ", ".join(gpu or "the CPU" for gpu in gpus)
    raise ConfigError(
        f"rollout.transport {asked} needs {wanted}: the policy is on {ours or 'the CPU'}, the server on {where}; use "
        "auto"
    )


def gpu_id(device: torch.device) -> str | None:
    """The number that a GPU has everywhere on its machine; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def own_gpu() -> str | None:
    """The GPU that this process computes on."""
    return gpu_id(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None


def visible_gpus(numbers: Sequence[int], num_gpus: int, visible: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a process that is to see these of our `num_gpus` GPUs; `visible` is ours.
    Raises ConfigError when one does not exist."""
    if max(numbers) >= num_gpus:
        wanted = " to ".join(str(number) for number in sorted({min(numbers), max(numbers)}))
        raise ConfigError(
            f"rollout.server_gpu: the server wants GPU {wanted}; this process sees {num_gpus}, the first of which is 0"
        )
    names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    return ",".join(names[number].strip() for number in numbers)


def buckets(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Weights in `dtype` on a device, BUCKET_BYTES at a time or one that is larger. Tied ones are copied."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        tensor = weight.detach().to(device, dtype).contiguous()
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
        is_tied = any(tensor.data_ptr() == other.data_ptr() for other in bucket.values())
        bucket[name] = tensor.clone() if is_tied else tensor  # safetensors refuses two names for one memory
        size += tensor.nbytes
    yield bucket


@contextmanager
def offered(bucket: Mapping[str, Tensor], transport: Transport) -> Iterator[tuple[str, Any]]:
    """The method of a worker that takes these weights, and what it is given. They are there to be taken inside."""
    if transport == "ipc":
        with lent(bucket) as loan:
            yield "align_receive_lent", loan
    else:
        with memory_file(safetensors.torch.save(dict(bucket))) as path:
            yield "align_receive", path


@contextmanager
def memory_file(content: bytes) -> Iterator[str]:
    """The path of a file in memory, for processes of this user on this machine. It is gone when we are: no name of it
    is left in a folder, whatever happens."""
    number = os.memfd_create("align-weights")
    with os.fdopen(number, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{number}"


@contextmanager
def lent(bucket: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Where on this GPU weights of one dtype lie, for other processes on it: they may read them inside."""
    flat = torch.cat([tensor.flatten() for tensor in bucket.values()])
    torch.cuda.synchronize()
    _, arguments = reduce_tensor(flat)
    shapes = {name: list(tensor.shape) for name, tensor in bucket.items()}
    yield {"shapes": shapes, "dtype": str(flat.dtype).removeprefix("torch."), "handle": to_json(arguments)}
    del flat
    torch.cuda.ipc_collect()  # what the others have let go


def borrowed(loan: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Weights that another process on this GPU lends, by name: views of its memory."""
    sizes = {name: torch.Size(shape) for name, shape in loan["shapes"].items()}
    dtype = getattr(torch, loan["dtype"])
    flat = rebuild_cuda_tensor(
        tensor_cls=Tensor,
        tensor_size=torch.Size([sum(size.numel() for size in sizes.values())]),
        tensor_stride=(1,),
        storage_cls=torch.storage.TypedStorage,
        dtype=dtype,
        storage_device=device.index,
        requires_grad=False,
        **from_json(loan["handle"]),
    )
    yield from split(flat, sizes)


def split(flat: Tensor, sizes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that lie in a flat one, one after the other."""
    parts = flat.split([size.numel() for size in sizes.values()])
    for (name, size), part in zip(sizes.items(), parts, strict=True):
        yield name, part.view(size)


def to_json(arguments: Sequence[Any]) -> dict[str, Any]:
    """The fields of HANDLE out of the arguments that torch would pickle for `rebuild_cuda_tensor`."""
    named = dict(zip(inspect.signature(rebuild_cuda_tensor).parameters, arguments, strict=True))
    given = {name: named[name] for name in HANDLE}
    return {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value for name, value in given.items()
    }


def from_json(handle: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields again, and no others."""
    return {name: base64.b64decode(handle[name]) if isinstance(handle[name], str) else handle[name] for name in HANDLE}
