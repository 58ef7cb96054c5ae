"""The way of weights to a server: which one there is between two places, and what is said on it."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from align.errors import ConfigError
from align.generation.transport import HANDLE, choose_transport, from_json, split, to_json, visible_gpus


def place(gpu: str | None, nccl: bool = True) -> dict[str, Any]:
    """What a worker says of itself."""
    return {"gpu": gpu, "nccl": nccl}


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        (None, [place(None)], "memory"),
        (None, [place("A")], "memory"),
        ("A", [place(None)], "memory"),
        ("A", [place("A")], "ipc"),
        ("A", [place("A"), place("B")], "memory"),
        ("A", [place("B")], "nccl"),
        ("A", [place("B"), place("C")], "nccl"),
        ("A", [place("B"), place("B")], "memory"),
        ("A", [place("B", nccl=False)], "memory"),
    ],
)
def test_auto_takes_the_shortest_way_there_is(ours, theirs, chosen):
    """CUDA IPC needs one GPU for all, NCCL one for each and a server that was started for it; memory always works."""
    assert choose_transport("auto", ours, theirs) == chosen
    assert choose_transport(chosen, ours, theirs) == chosen
    assert choose_transport("memory", ours, theirs) == "memory"


@pytest.mark.parametrize(
    ("asked", "ours", "theirs", "told"),
    [
        ("ipc", "A", [place("B")], "ipc needs the same GPU: the policy is on A, the server on B; use auto"),
        ("ipc", "A", [place(None)], "ipc needs the same GPU: the policy is on A, the server on the CPU"),
        ("nccl", "A", [place("A")], "nccl needs a GPU for each of them: the policy is on A, the server on A"),
        ("nccl", None, [place("B")], "nccl needs a GPU for each of them: the policy is on the CPU, the server on B"),
        ("nccl", "A", [place("B", nccl=False)], "nccl: the server was started without --weight-transfer-config"),
    ],
)
def test_a_way_that_there_is_not_is_refused(asked, ours, theirs, told):
    with pytest.raises(ConfigError, match=rf"rollout\.transport {told}"):
        choose_transport(asked, ours, theirs)


def test_a_server_sees_the_gpu_that_it_was_given():
    """Numbers count among the GPUs that this process sees, which may be few of the machine's."""
    assert visible_gpus([1], 2, None) == "1"
    assert visible_gpus([1], 2, "4,6") == "6"
    assert visible_gpus([1, 2], 3, "4,6,7") == "6,7"
    with pytest.raises(ConfigError, match=r"the server wants GPU 1 to 2; this process sees 2"):
        visible_gpus([1, 2], 2, "4,6")


def test_a_handle_goes_through_json():
    """What torch would pickle for its `rebuild_cuda_tensor`, by the names that it has there: the fields that find the
    memory come out as they went in, bytes included, and nothing else goes along."""
    arguments = {name: f"not for JSON: {name}" for name in inspect.signature(rebuild_cuda_tensor).parameters}
    handle = {
        "tensor_offset": 0,
        "storage_handle": bytes(range(256)),
        "storage_size_bytes": 512,
        "storage_offset_bytes": 1024,
        "ref_counter_handle": b"/torch_1_2",
        "ref_counter_offset": 3,
        "event_handle": b"",
        "event_sync_required": True,
    }
    sent = json.loads(json.dumps(to_json(tuple({**arguments, **handle}.values()))))
    assert from_json(sent | {"dtype": "evil"}) == handle
    assert sent.keys() == set(HANDLE)


def test_weights_are_found_in_one_flat_tensor():
    """In the order in which they were joined."""
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([6.0]), "c": torch.arange(7.0, 11).view(4, 1)}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    found = dict(split(flat, {name: weight.shape for name, weight in weights.items()}))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
