"""Optimisers: AdamW with moments in 8 bits, on a CPU; what a machine has not is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from safetensors.torch import load_file, save_file
from torch import nn

from align.errors import ConfigError
from align.recipe.training_settings import OptimSettings
from align.training.adamw import new_adamw, restore_state, state_tensors

NUMBERS = 64 * 128
"""Of a weight that is large enough for 8 bits: from 4096 on."""


def weights() -> list[nn.Parameter]:
    """A large weight and a small one."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(64, 128, generator=generator)), nn.Parameter(torch.ones(7))]


def gradients(seed: int) -> Iterator[list[torch.Tensor]]:
    """Without end: those of both weights, with a direction of their own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield [1 + torch.randn(64, 128, generator=generator), 1 + torch.randn(7, generator=generator)]


def train(optimiser: torch.optim.Optimizer, trained: list[nn.Parameter], source: Iterator, steps: int) -> None:
    for _ in range(steps):
        for weight, gradient in zip(trained, next(source), strict=True):
            weight.grad = gradient
        optimiser.step()


def settings(kind: str) -> OptimSettings:
    return OptimSettings.model_validate({"kind": kind, "lr": 1e-2, "weight_decay": 0.1})


def test_exceptions_made_for_another_model_are_forgotten():
    """transformers' trainer has the moments of its embeddings in 32 bits: by the place of the weight, 0 of group 0."""
    layer = torch.nn.Linear(128, 128, bias=False)
    GlobalOptimManager.get_instance().register_module_override(layer, "weight", {"optim_bits": 32})
    GlobalOptimManager.get_instance().index2config[0, 0] = {"optim_bits": 32}
    optimiser = new_adamw(layer.parameters(), OptimSettings(lr=1e-3, kind="adamw-8bit"))
    layer(torch.ones(1, 128)).sum().backward()
    optimiser.step()
    assert state_tensors(optimiser)["0.state1"].dtype is torch.uint8


def test_moments_in_8_bits_take_a_quarter_and_step_nearly_the_same():
    """A weight of N numbers has two moments of one byte each and a float32 scale for every 256: 2 N + 2 * 4 N / 256
    = 2.03 N, where float32 has 8 N. Twenty steps of 0.01 move a weight by up to 0.2; the two differ by less than a
    hundredth of that on average, and the small weight, whose moments stay float32, not at all."""
    moved = {}
    for kind in ("adamw", "adamw-8bit"):
        trained = weights()
        optimiser = new_adamw(trained, settings(kind))
        train(optimiser, trained, gradients(1), 20)
        moved[kind] = [(now - before).detach() for now, before in zip(trained, weights(), strict=True)]
        sizes = {key: value.numel() * value.element_size() for key, value in state_tensors(optimiser).items()}
        held = sum(size for key, size in sizes.items() if key.startswith("0.") and "qmap" not in key) - sizes["0.step"]
        assert held == (NUMBERS * 8 if kind == "adamw" else NUMBERS * 2 + 2 * 4 * NUMBERS // 256)
    large, small = (theirs - ours for theirs, ours in zip(moved["adamw-8bit"], moved["adamw"], strict=True))
    assert float(moved["adamw"][0].abs().max()) > 0.05
    assert 0 < float(large.abs().mean()) < 2e-3
    torch.testing.assert_close(small, torch.zeros(7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_state_through_a_file_goes_on_as_if_nothing_had_been(kind, tmp_path: Path):
    """Three steps, a file, a fresh optimiser, three steps: bitwise six steps. Quantised states are in it as uint8."""
    straight = weights()
    train(new_adamw(straight, settings(kind)), straight, gradients(2), 6)

    trained, source, file = weights(), gradients(2), tmp_path / "optimiser.safetensors"
    first = new_adamw(trained, settings(kind))
    train(first, trained, source, 3)
    save_file(state_tensors(first), file)
    assert (torch.uint8 in {value.dtype for value in load_file(file).values()}) == (kind == "adamw-8bit")
    second = new_adamw(trained, settings(kind))
    restore_state(second, load_file(file))
    train(second, trained, source, 3)
    for ours, theirs in zip(trained, straight, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["paged-adamw", "paged-adamw-8bit"])
def test_paging_needs_a_gpu(kind, monkeypatch):
    """bitsandbytes would warn and hold everything in memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"optim.kind: {kind} pages memory of a GPU, and there is none"):
        new_adamw(weights(), settings(kind))
