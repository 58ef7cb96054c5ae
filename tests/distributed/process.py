"""One process of those that run stages together: `torchrun process.py FOLDER`. Started by conftest.py.

FOLDER/cases.json says what to run, in order: a name, a kind of stage, a strategy, settings, and perhaps a step at which
the last process, and only that one, gets a signal; or a model to load. Each process leaves what it has to say beside
the stage's files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from align import ranks
from align.errors import AlignError
from align.job import Input
from align.models.opened import open_as_reward
from align.models.partitioned import whole
from align.pipeline.launch import FSDP
from align.pipeline.processes import end
from align.recipe.shipped import shipped_folder
from align.recipe.training_settings import TrainingSettings
from align.training.sharding import loading
from tests.stages.harness import Run

torch.set_num_threads(1)


def use(strategy: str, folder: Path) -> None:
    """What `accelerate launch` puts into the environment for a strategy; for one with a disk, that of `folder`."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(strategy.startswith("zero")).lower()
    file = shipped_folder("deepspeed") / f"{strategy.replace('-', '_')}.json"
    if strategy == "zero3-nvme":
        file = folder / "disk.json"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
    os.environ["ACCELERATE_USE_FSDP"] = str(strategy == "fsdp").lower()
    os.environ |= {f"FSDP_{name.removeprefix('fsdp_').upper()}": str(value) for name, value in FSDP.items()}


def run_case(folder: Path, policy: Input, case: dict[str, Any]) -> dict[str, Any]:
    """What this process has to say of a case."""
    run = Run(case["kind"], folder / case["name"], policy, case["settings"])
    told: dict[str, Any] = {"processes": ranks.size()}
    signalled = ranks.rank() == ranks.size() - 1 and "stop" in case
    try:
        result = run(signal_at(case["stop"]) if signalled else None)
        told |= {"metrics": result.metrics, "handover": result.handover}
    except AlignError as error:
        told["error"] = str(error)
    return told


def load_case(source: Input) -> dict[str, Any]:
    """What this process holds of a model that is loaded in parts with a new head, and where it is not what one process
    loads."""
    held, differing = {}, []
    try:
        torch.manual_seed(0)
        with loading(TrainingSettings()):
            parted = open_as_reward(source, "plain").model
        torch.manual_seed(0)
        plain = open_as_reward(source, "plain").model
    except AlignError as error:
        return {"error": str(error)}
    for (name, one), other in zip(parted.named_parameters(), plain.parameters(), strict=True):
        held[name] = one.numel()
        with whole([one]):
            if not torch.equal(one, other):
                differing.append(name)
    return {"held": held, "differing": differing}


def signal_at(step: int) -> Any:
    """What stands beside the metrics of a process and sends it SIGTERM at a step."""

    def at_step(context: Any, now: int) -> None:
        context.stop.install()
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return at_step


def main(folder: Path) -> None:
    """Runs all cases."""
    use("zero2", folder)
    ranks.join(120)
    asked = json.loads((folder / "cases.json").read_text())
    policy = Input(**asked["policy"])
    for case in asked["cases"]:
        (folder / case["name"]).mkdir(exist_ok=True)
        use(case["strategy"], folder)
        told = load_case(Input(**case["source"])) if "source" in case else run_case(folder, policy, case)
        log = case.get("log", "process")
        (folder / case["name"] / f"{log}-{ranks.rank()}.json").write_text(json.dumps(told))
        ranks.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
