"""One process of a policy that DeepSpeed shards: takes a step, and writes down what a hand-over makes of it.

Started by test_zero3.py: `python -m torch.distributed.run ... zero3_process.py FOLDER STAGE`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

from align.generation.weights import HandOver, effective_weights, gathered
from align.models.lora import without_wrapper
from tests.generation.vllm_models import make_model
from tests.generation.zero3_step import LEARNING_RATE, batch

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # else gradients are clipped to a norm of 1
    "zero_optimization": {"stage3_param_persistence_threshold": 0},  # else parameters as small as these stay whole
}


def observe(model: Any) -> dict[str, Any]:
    """The weights that a hand-over reads and, for each of them, the layers that have a whole parameter meanwhile."""
    weights = effective_weights(model)
    layer_of = {part: weight.layer for weight in weights for part in weight.parts}
    read, layers = {}, {}
    for weight, tensor in gathered(weights):
        read[weight.name] = tensor.clone()
        layers[weight.name] = (
            weight.layer,
            sorted({layer_of[one] for one in without_wrapper(model).parameters() if one.numel()}),
        )
    return {"read": read, "layers": layers, "left_whole": sum(one.numel() for one in model.parameters())}


def hand_over(model: Any, folder: Path) -> dict[str, Any]:
    """An engine's weights after a hand-over, and how they got there. The engine is a model under the same names."""
    engine = make_model(folder / "engine", "llama", tied=False, dtype=torch.float32, seed=9)
    places = dict(engine.named_parameters())

    @torch.no_grad()
    def load(pairs) -> None:
        for name, tensor in pairs:
            places[name].copy_(tensor)

    over = HandOver(model, engine, load, {})
    with torch.no_grad():
        for parameter in places.values():
            parameter.zero_()
    stale = over.differing()
    over.sync()
    return {"summary": over.summary, "stale": stale, "differing": over.differing(), "engine": engine.state_dict()}


def main(folder: Path, stage: int) -> None:
    """Once for a policy that is trained in full, once with an adapter."""
    # Its kernels for shared memory would be compiled, which takes minutes; without them it uses gloo alone.
    deepspeed.ops.__compatible_ops__.clear()
    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    settings = SETTINGS | {"zero_optimization": SETTINGS["zero_optimization"] | {"stage": stage}}
    found: dict[str, Any] = {"processes": torch.distributed.get_world_size()}
    for lora in (False, True):
        model = make_model(folder / f"{rank}", "llama", tied=False, dtype=torch.float32, lora=lora)
        optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=settings)
        ids = batch()[rank : rank + 1]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        found["lora" if lora else "full"] = observe(model) | hand_over(model, folder / f"{rank}")
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
