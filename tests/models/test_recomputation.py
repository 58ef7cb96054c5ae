"""Gradient checkpointing: the same gradients from less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.models.lora import add_lora
from align.models.packed import pack, position_ids
from align.models.recomputation import recompute
from align.models.roles import Role, causal_role
from align.recipe.training_settings import LoraSettings
from tests.models.test_roles import new_model

IDS = torch.arange(5, 45).view(4, 10)
MASK = (torch.arange(10) < torch.tensor([[10], [7], [4], [2]])).long()


class Storages(TorchDispatchMode):
    """Every storage that an operation made, and whether it is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return found

    def alive(self) -> int:
        """Bytes of those that are."""
        return sum(size for storage, size in self.seen.values() if not storage.expired())


def new_role(how: str, packed: bool, lora: bool) -> tuple[Any, Role]:
    """A Llama of two layers in training mode."""
    model = new_model("Llama").train()
    model = add_lora(model, LoraSettings(rank=4, alpha=8)) if lora else model
    recompute(model, how)
    role = causal_role(model)
    if packed:
        assert pack(role.body)
    return model, role


def loss(role: Role) -> torch.Tensor:
    """Some function of all states."""
    states = role.states(IDS, MASK, position_ids(MASK))
    return (states[MASK.bool()] * torch.linspace(-1, 1, role.width)).square().sum()


def gradients(how: str, packed: bool, lora: bool) -> dict[str, torch.Tensor]:
    """By weight."""
    model, role = new_role(how, packed, lora)
    loss(role).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def kept(how: str, packed: bool) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    _, role = new_role(how, packed, lora=False)
    with Storages() as storages:
        total = loss(role)
    found = storages.alive()
    total.backward()
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradients_are_the_same_bit_for_bit(packed, lora):
    """What is computed again is computed as it was."""
    expected = gradients("none", packed, lora)
    for how in ("selective", "full"):
        found = gradients(how, packed, lora)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_selective_keeps_more_than_full_and_less_than_all(packed):
    """Full keeps the inputs of two layers, selective the results of their products too."""
    none, selective, full = (kept(how, packed) for how in ("none", "selective", "full"))
    assert full < 0.6 * none
    assert 1.2 * full < selective < 0.8 * none
