"""One process of those that train roles of PPO under DeepSpeed or FSDP: `torchrun zero_process.py FOLDER`.

Started by test_zero.py. FOLDER/cases.json says what stages to run; each process leaves what it has to say in FOLDER.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from align import ranks
from align.context import Context
from align.errors import AlignError, NumericError
from align.generation.weights import effective_weights, gathered
from align.job import Input
from align.models.partitioned import whole_model
from align.pipeline.processes import end
from align.training.masked import Processes
from align.training.strategy import new_optimiser
from stages.ppo.checkpoint import load_checkpoint, save_checkpoint
from tests.distributed.process import signal_at, use
from tests.distributed.zero_roles import ROLLOUTS, TRAINERS, new_roles, new_trainer, responses, train, weights
from tests.stages.harness import Watched, new_context

torch.set_num_threads(1)
MINE = ([0, 1, 2, 3, 4], [5, 6, 7])
"""The rows of each process: they make unequal numbers of passes."""


def train_roles(folder: Path, strategy: str, variant: str) -> dict[str, Any]:
    """Two rollouts, a checkpoint, a third one; and the third one again by a trainer that starts from the checkpoint."""
    use(strategy, folder.parent)
    mine = MINE[ranks.rank()]
    settings = {"new_optimiser": new_optimiser, "processes": Processes(ranks.total, ranks.highest)}
    trainer = new_trainer(new_roles(variant, strategy), variant, **settings)
    metrics = train(trainer, mine, range(ROLLOUTS - 1))
    held = {name: sum(held_of(one) for one in role.module.parameters()) for name, role in roles_of(trainer).items()}
    read = layers_while_read(trainer.models["actor"].module)
    context = new_context("checkpoints", folder, {}, {})
    save_checkpoint(context, trainer, None, load_checkpoint(context, trainer)[1], ROLLOUTS - 1, 1, {"zero": strategy})
    metrics += train(trainer, mine, range(ROLLOUTS - 1, ROLLOUTS))
    on_disk = len(list(folder.parent.glob(f"disk/*/*/optimizer/rank{ranks.rank()}/*.swp")))

    again = new_trainer(new_roles(variant, strategy), variant, **settings)
    done, _ = load_checkpoint(context, again, None, {"zero": strategy})
    repeated = train(again, mine, range(done, ROLLOUTS))
    trained = weights(trainer)
    same = all(torch.equal(trained[name], one) for name, one in weights(again).items())
    assert again.ema is not None and trainer.ema is not None
    same &= all(torch.equal(again.ema.averages[name], one) for name, one in trainer.ema.averages.items())
    said = {"metrics": metrics, "held": held, "resumed": same and repeated == metrics[-1:]}
    said |= {"handed over": is_handed_over(trainer), "refused": is_refused(trainer, mine, trained)}
    trainer.ema.apply()
    average = weights(trainer)
    if ranks.is_main():
        save_file(trained, folder / "weights.safetensors")
        save_file(average, folder / "average.safetensors")
    return said | {"read": read, "on_disk": on_disk}


def is_handed_over(trainer: Any) -> bool:
    """Whether an engine would be given what the actor is when it is whole."""
    model = trainer.actor.module
    given = {weight.name: one.clone() for weight, one in gathered(effective_weights(model))}
    with whole_model(model):
        expected = {weight.name: one.clone() for weight, one in gathered(effective_weights(model))}
    return given.keys() == expected.keys() and all(torch.equal(given[name], one) for name, one in expected.items())


def is_refused(trainer: Any, mine: list[int], before: dict[str, Tensor]) -> bool:
    """Whether rewards without end are refused before a weight is touched."""
    batch, scores = responses(mine)
    rollout = trainer.observe(batch, scores)
    rollout.advantages[batch.mask] = torch.inf
    try:
        trainer.improve(rollout, ROLLOUTS - 1)
    except NumericError as error:
        same = all(torch.equal(before[name], one) for name, one in weights(trainer).items())
        return same and "the actor's gradient norm is" in str(error)
    return False


def layers_while_read(model: Any) -> int:
    """Layers of which this process has a whole weight, at most, while an engine is given all of them."""
    weights = effective_weights(model)
    sizes = {one.name: getattr(one.parameter, "ds_numel", one.parameter.numel()) for one in weights}

    def whole() -> set[str]:
        return {one.layer for one in weights if held_of(one.parameter) == sizes[one.name]}

    return max(len(whole()) for _ in gathered(weights))


def held_of(weight: Any) -> int:
    """Numbers that this process has of a weight."""
    return (weight.to_local() if isinstance(weight, DTensor) else weight).numel()


def roles_of(trainer: Any) -> dict[str, Any]:
    return trainer.models | {"reference": trainer.reference}


def run_stage(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What this process has to say of a whole stage."""
    use(case["strategy"], folder.parent)
    AcceleratorState._reset_state()  # it is made once per process, and would be of the first case
    PartialState().distributed_type = DistributedType.MULTI_CPU
    inputs = {name: Input(**given) for name, given in case["inputs"].items()}
    context = new_context("ppo", folder, inputs, case["settings"])
    if ranks.rank() == ranks.size() - 1:
        if "stop" in case:
            context.metrics = Watched(context, signal_at(case["stop"]))
        if "kill" in case:
            context.metrics = Watched(context, kill_server_at(case["kill"]))
    stage = importlib.import_module("stages.ppo.run")
    try:
        result = stage.run(importlib.import_module("stages.ppo.config").Config(**case["settings"]), context)
    except AlignError as error:
        return {"error": str(error)}
    return {"metrics": result.metrics, "handover": result.handover}


def kill_server_at(step: int) -> Callable[[Context, int], None]:
    """What stands beside the metrics of a process and kills its vLLM server at a step."""

    def at_step(context: Context, now: int) -> None:
        if now == step:
            (server,) = (one for one in psutil.Process().children() if "align.generation.vllm_launch" in one.cmdline())
            server.kill()

    return at_step


def main(folder: Path) -> None:
    """All of TRAINERS and all cases."""
    use("zero2", folder)
    ranks.join(300)
    for strategy, variant in TRAINERS:
        own = folder / f"{strategy}-{variant}"
        tell(own, "trainer", train_roles(own, strategy, variant))
    for case in json.loads((folder / "cases.json").read_text()):
        own = folder / case["name"]
        tell(own, case.get("log", "stage"), run_stage(own, case))


def tell(folder: Path, log: str, said: dict[str, Any]) -> None:
    (folder / f"{log}-{ranks.rank()}.json").write_text(json.dumps(said | {"processes": ranks.size()}))
    ranks.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
