"""Weights of a policy that DeepSpeed shards over two processes, as a hand-over reads them: whole, and right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from align.generation.weights import effective_weights
from tests.generation.vllm_models import make_model
from tests.generation.zero3_step import alone

EXACT = 1e-6
"""Bound of differences between weights after a step. Measured: 3e-8, from sums in another order; the step moves weights
by up to 0.05."""


def train(folder: Path, stage: int) -> list[dict[str, Any]]:
    """What each of two processes writes down."""
    script = Path(__file__).with_name("zero3_process.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), str(stage)], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def expected(folder: Path, lora: bool) -> dict[str, torch.Tensor]:
    """The weights of one process that took the same step alone."""
    model = alone(make_model(folder, "llama", tied=False, dtype=torch.float32, lora=lora))
    return {weight.name: weight.effective() for weight in effective_weights(model)}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> list[dict[str, Any]]:
    """Under ZeRO-3."""
    found = train(tmp_path_factory.mktemp("zero3"), 3)
    assert [one["processes"] for one in found] == [2, 2]
    return found


def gap(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert found.keys() == right.keys()
    return max(float((found[name] - right[name]).abs().max()) for name in right)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_process_reads_the_weights_of_one_that_trained_alone(lora, sharded, tmp_path):
    """After a step on two rows, one in each process; with an adapter, merged. None of them is empty."""
    right = expected(tmp_path, lora)
    for process in sharded:
        read = process["lora" if lora else "full"]["read"]
        assert all(tensor.numel() for tensor in read.values())
        assert gap(read, right) < EXACT


@pytest.mark.parametrize("lora", ["full", "lora"])
def test_one_layer_is_whole_at_a_time(lora, sharded):
    """While a weight is read the only parameters with memory are its layer's, adapter included; afterwards none."""
    for process in sharded:
        layers = process[lora]["layers"]
        assert {"model.layers.0", "model.layers.1", "lm_head"} < {layer for layer, _ in layers.values()}
        assert all(is_whole == [layer] for layer, is_whole in layers.values())
        assert process[lora]["left_whole"] == 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_engine_is_written_and_shares_nothing(lora, sharded, tmp_path):
    """An engine that held zeros: every weight is seen to differ, is written, and is then the policy's."""
    right = expected(tmp_path, lora)
    for process in sharded:
        found = process["lora" if lora else "full"]
        assert "shared" not in found["summary"] and "copied" in found["summary"]
        assert set(found["stale"]) == set(right) and found["differing"] == []
        assert gap(found["engine"], right) < EXACT


def test_a_flat_buffer_of_the_optimisers_is_left_to_it(tmp_path):
    """ZeRO-2 keeps every parameter in a buffer that its optimiser writes to: none is moved into the engine's memory."""
    for process in train(tmp_path, 2):
        assert "shared" not in process["full"]["summary"] and process["full"]["differing"] == []
