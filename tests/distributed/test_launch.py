"""A whole run on two processes through the real commands: `align run`, and `accelerate launch` by hand."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.recipe.shipped import shipped_folder
from tests.distributed.conftest import World, environment
from tests.stages.harness import weights_hash

BASE = {"vocabulary": 300, "context": 64, "hidden": 32, "layers": 2, "heads": 2, "steps": 2}
"""A model of a few thousand weights that has learnt next to nothing."""
PPO = {
    "rollouts": 2,
    "rollout": {"prompts": 4, "max_response_tokens": 6, "engine": "transformers"},
    "epochs": 1,
    "minibatches": 1,
}
CHAINS = {"static": ("zero2", "sft", "reward", "ppo"), "c10d": ("fsdp", "sft", "dpo")}
"""How two machines find each other: a strategy, and stages after `base`."""
ALIGN = [sys.executable, "-m", "align"]


def run(folder: Path, *command: str) -> str:
    """All output of a command that ends well."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def made(folder: Path, stage: str = "sft") -> Path:
    (found,) = (folder / "runs" / "two" / stage).iterdir()
    return found


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same recipe in two folders: run by `align run`, and by hand with an accelerate config."""
    recipe = {
        "name": "two",
        "model": world.policy.path,
        "launch": {"processes": 2, "strategy": "zero2"},
        "evaluation": {"prompts": 4, "max_response_tokens": 6},
        "sft": world.settings("sft", max_steps=2),
    }
    folders = [tmp_path_factory.mktemp(name) for name in ("runner", "hand")]
    for folder in folders:
        (folder / "align.yaml").write_text(yaml.safe_dump(recipe))
    run(folders[0], *ALIGN, "run", "sft")
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(shipped_folder("deepspeed") / "zero2.json")},
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": 0,
    }
    (folders[1] / "accelerate.yaml").write_text(yaml.safe_dump(config))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    run(folders[1], *launch, "-m", "align.worker", "align.yaml", "sft")
    return folders


def test_by_hand_is_what_the_runner_does(folders: list[Path]):
    """The same folder, fingerprint and weights, to the last bit; the runner takes it for its own."""
    ours, theirs = (made(folder) for folder in folders)
    assert ours.name == theirs.name
    assert weights_hash(ours / "model") == weights_hash(theirs / "model")
    for stage in (ours, theirs):
        record = json.loads((stage / "record.json").read_text())
        assert record["world_size"] == 2
        assert record["handover"]["largest_difference"] <= record["handover"]["bound"]
    assert "up to date" in run(folders[1], *ALIGN, "plan", "sft")


def test_how_many_processes_there_were_is_not_in_the_fingerprint(folders: list[Path]):
    """What two made is up to date for a recipe that asks for one."""
    assert "up to date" in run(folders[0], *ALIGN, "plan", "sft", "launch.processes=1", "launch.strategy=ddp")


def test_a_world_that_is_smaller_than_asked_for_is_refused(folders: list[Path]):
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "-m", "align.worker", "align.yaml", "sft", "name=other"]
    done = subprocess.run(command, cwd=folders[1], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "2 processes were asked for and 1 started" in done.stderr
    assert not (folders[1] / "runs" / "other").exists()


@pytest.mark.parametrize("rendezvous", CHAINS)
def test_two_machines_meet_and_run_a_chain(rendezvous, world: World, tmp_path: Path):
    """Two launchers. The second waits while the first trains `base` alone, as the recipe says; then each stage has a
    process on each of them."""
    strategy, *stages = CHAINS[rendezvous]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = {
        "name": "two",
        "launch": {"processes": 2, "strategy": strategy},
        "nodes": {"count": 2, "address": "127.0.0.1", "port": port, "rendezvous": rendezvous},
        "evaluation": {"prompts": 4, "max_response_tokens": 6},
        "base": {**BASE, "data": world.settings("sft")["data"], "launch": {"processes": 1}},
        **{stage: world.settings(stage, max_steps=2) for stage in stages if stage != "ppo"},
        "ppo": {**PPO, "data": world.settings("sft")["data"]},
    }
    (tmp_path / "align.yaml").write_text(json.dumps(recipe))
    command = [*ALIGN, "run", "base", *stages]
    machines = [
        subprocess.Popen(
            [*command, f"nodes.rank={rank}"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    shown = [machine.communicate(timeout=600)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], shown
    records = [json.loads((made(tmp_path, stage) / "record.json").read_text()) for stage in ("base", *stages)]
    assert [record["world_size"] for record in records] == [1, *[2] * len(stages)]
    assert all(record["handover"]["largest_difference"] <= record["handover"]["bound"] for record in records[1:])
