"""Two processes that run all cases in turn, once; and what one process makes of the same settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from align.job import Input
from align.recipe.shipped import shipped_folder
from align.recipe.zero import read_zero
from tests.distributed.zero_roles import HAS_LIBAIO
from tests.models.tiny import drop_weight, model_input, new_opened, save_foreign, save_policy
from tests.stages.harness import BASE, KINDS, LORA, Run, write_data

ROOT = Path(__file__).parents[2]
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
FULL = [(kind, strategy, False) for strategy in STRATEGIES for kind in ("base", *KINDS)]
ADAPTED = [(kind, strategy, True) for strategy in STRATEGIES for kind in KINDS]
OFFLOADED = [(kind, strategy, False) for strategy in ("zero2-offload", "zero3-offload") for kind in KINDS]
ON_DISK = [(kind, "zero3-nvme", False) for kind in KINDS] if HAS_LIBAIO else []
CASES = [*FULL, *ADAPTED, *OFFLOADED, ("sft", "zero1", False), *ON_DISK]
STOPPED = [
    ("sft", "ddp", False),
    ("reward", "zero2", True),
    ("kto", "zero2", False),
    ("dpo", "zero3", False),
    ("dpo", "fsdp", False),
    ("reward", "fsdp", True),
    ("sft", "zero2-offload", False),
    ("dpo", "zero3-offload", False),
]
PRECOMPUTED = ["ddp", "zero3"]
SAMPLED = ["zero3", "fsdp"]
QUANTISED = ["ddp", "zero2"]
NF4: dict[str, Any] = {"lora": {**LORA["lora"], "quantise": "nf4"}}


def case_name(kind: str, strategy: str, lora: bool) -> str:
    return f"{kind}-{strategy}-{'lora' if lora else 'full'}"


def write_disk(folder: Path) -> None:
    """DeepSpeed's zero3-nvme with a folder for a disk: what `tests.distributed.process.use` names."""
    (folder / "disk").mkdir()
    settings = read_zero(shipped_folder("deepspeed") / "zero3_nvme.json")
    settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder / "disk")
    (folder / "disk.json").write_text(json.dumps(settings))


def environment() -> dict[str, str]:
    """Of processes that tests start. DeepSpeed looks for ninja on the PATH."""
    path = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PATH": path, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


class World:
    """Runs of one and of two processes in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.policy: Input = save_policy(new_opened(), folder / "base" / "model")
        self.files = write_data(folder)

    def settings(self, kind: str, lora: bool = False, **changes: Any) -> dict[str, Any]:
        data = {"path": self.files[kind], "held_out": 0.2}
        return {**(BASE if kind == "base" else KINDS[kind]), "data": data, **(LORA if lora else {}), **changes}

    def one(self, kind: str, lora: bool = False) -> Run:
        """A finished run of one process, made on first use."""
        run = Run(kind, self.folder / f"one-{kind}-{lora}", self.policy, self.settings(kind, lora))
        if not run.model.exists():
            run()
        return run

    def two(self, name: str) -> Run:
        """A run of two processes by its name."""
        return Run(name.split("-")[0], self.folder / name, self.policy, {})

    def told(self, name: str, process: int) -> dict[str, Any]:
        """What a process had to say of a case."""
        return json.loads((self.folder / name / f"process-{process}.json").read_text())

    def sources(self) -> dict[str, Input]:
        """Models to be loaded in parts: one of align, one whose embeddings have to grow, and one that lacks weights."""
        damaged = self.folder / "base" / "damaged"
        shutil.copytree(self.policy.path, damaged)
        drop_weight(damaged, "model.layers.1.mlp.up_proj.weight")
        foreign = save_foreign(self.folder / "base" / "foreign", None)
        return {
            "loaded": self.policy,
            "loaded-foreign": model_input(foreign),
            "loaded-damaged": model_input(damaged),
        }

    def start(self, cases: list[dict[str, Any]]) -> None:
        """Two processes that run these cases in turn."""
        write_disk(self.folder)
        (self.folder / "cases.json").write_text(json.dumps({"policy": asdict(self.policy), "cases": cases}))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        script = Path(__file__).with_name("process.py")
        done = subprocess.run(
            [*launch, str(script), str(self.folder)],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Every case of two processes, finished. Read only."""
    world = World(tmp_path_factory.mktemp("world"))
    cases = [
        {
            "name": case_name(kind, strategy, lora),
            "kind": kind,
            "strategy": strategy,
            "settings": world.settings(kind, lora),
        }
        for kind, strategy, lora in CASES
    ]
    cases += [case for one in STOPPED for case in stopped_and_resumed(world, *one)]
    micro = world.settings("reward", micro_batch_size=1)
    cases.append({"name": "reward-ddp-micro", "kind": "reward", "strategy": "ddp", "settings": micro})
    sampled = world.settings("sft", samples_every=2)
    for strategy in SAMPLED:
        cases.append({"name": f"sft-{strategy}-sampled", "kind": "sft", "strategy": strategy, "settings": sampled})
    precomputed = world.settings("dpo", precompute_reference=True)
    for strategy in PRECOMPUTED:
        name = f"dpo-{strategy}-precomputed"
        cases.append({"name": name, "kind": "dpo", "strategy": strategy, "settings": precomputed})
    quantised = world.settings("sft", **NF4)
    for strategy in QUANTISED:
        cases.append({"name": f"sft-{strategy}-nf4", "kind": "sft", "strategy": strategy, "settings": quantised})
    for name, source in world.sources().items():
        cases.append({"name": name, "strategy": "zero3", "source": asdict(source)})
    # Last: what is refused leaves the libraries set to load models in parts.
    cases += [case for one in ON_DISK[:1] for case in stopped_and_resumed(world, *one)]
    world.start(cases)
    return world


def stopped_and_resumed(world: World, kind: str, strategy: str, lora: bool) -> list[dict[str, Any]]:
    """A case with a signal after step 3, and the same again without."""
    case = {
        "name": f"{kind}-{strategy}-stopped",
        "kind": kind,
        "strategy": strategy,
        "settings": world.settings(kind, lora),
    }
    return [{**case, "stop": 3, "log": "stopped"}, {**case, "log": "resumed"}]
