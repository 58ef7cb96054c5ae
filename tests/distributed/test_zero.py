"""PPO on two processes under DeepSpeed or FSDP gives what one process gives, or two that share nothing; and a whole
model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.metrics import MetricsLog
from align.recipe.shipped import shipped_folder
from align.recipe.zero import read_zero
from align.records import read_manifest
from tests.distributed.conftest import ROOT, World, environment
from tests.distributed.zero_roles import HAS_LIBAIO, ROLLOUTS, ROWS, TRAINERS, new_roles, new_trainer, train, weights
from tests.stages.harness import LORA, weights_hash

WEIGHTS = 1e-5
"""Bound of differences between final weights, from sums in another order. Measured: 2e-6."""
METRICS = 5e-5
"""And of those between metrics, relative or absolute. Measured: 5e-6."""
ROLES = ("actor", "critic", "reference")
STRATEGIES = ("ddp", "zero2", "zero3")
STAGES = [(strategy, variant) for strategy in STRATEGIES for variant in ("full", "lora")]
STAGES += [(strategy, "full") for strategy in ("zero2-offload", "zero3-offload", "fsdp")]
STOPPED = [("zero2", "full"), ("zero3", "full"), ("zero3", "lora"), ("fsdp", "full")]
OPTIM = {"lr": 1e-3, "eps": 1e-5}
SETTINGS: dict[str, Any] = {
    "rollouts": 3,
    "rollout": {"prompts": 4, "responses_per_prompt": 2, "max_response_tokens": 6, "engine": "transformers"},
    "epochs": 2,
    "micro_batch_size": 4,
    "optim": OPTIM,
    "critic": {"optim": OPTIM},
    "missing_eos": {"rule": "off"},
    "checkpoint": {"every_steps": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of everything."""
    world = World(tmp_path_factory.mktemp("zero"))
    cases = [stage_case(world, strategy, variant) for strategy, variant in STAGES]
    for strategy, variant in STOPPED:
        stopped = stage_case(world, strategy, variant) | {"name": f"{strategy}-{variant}-stopped"}
        cases += [stopped | {"stop": 1, "log": "stopped"}, stopped]
    for name in {case["name"] for case in cases} | {f"{strategy}-{variant}" for strategy, variant in TRAINERS}:
        (world.folder / name).mkdir()
    (world.folder / "cases.json").write_text(json.dumps(cases))
    (world.folder / "disk").mkdir()
    on_disk = read_zero(shipped_folder("deepspeed") / "zero3_nvme.json")
    on_disk["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(world.folder / "disk")
    (world.folder / "disk.json").write_text(json.dumps(on_disk))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("zero_process.py"))
    done = subprocess.run(
        [*launch, script, str(world.folder)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return world.folder


def stage_case(world: World, strategy: str, variant: str) -> dict[str, Any]:
    """With adapters one base plays all four roles; else there are four models."""
    lora = variant == "lora"
    reward = replace(world.one("reward", lora).output(), adapter_of=world.policy.fingerprint if lora else None)
    inputs = {"policy": world.policy, "reference": world.policy, "reward": reward}
    data = {"path": world.files["sft"], "held_out": 0.2}
    return {
        "name": f"{strategy}-{variant}-stage",
        "strategy": strategy,
        "settings": SETTINGS | {"data": data} | (LORA if lora else {}),
        "inputs": {name: asdict(one) for name, one in inputs.items()},
    }


def told(folder: Path, name: str, log: str) -> list[dict[str, Any]]:
    return [json.loads((folder / name / f"{log}-{process}.json").read_text()) for process in range(2)]


def close(row: dict[str, float]) -> Any:
    return pytest.approx(row, rel=METRICS, abs=METRICS, nan_ok=True)


def flat(row: dict[str, Any]) -> dict[str, float]:
    """Its numbers, both ends of intervals, and NaN, which JSON has no number for."""
    ends = {key: value if isinstance(value, list) else [value] for key, value in row.items()}
    return {f"{key}.{index}": float(one) for key, values in ends.items() for index, one in enumerate(values)}


def gap(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert found.keys() == right.keys() and all(tensor.numel() for tensor in found.values())
    return max(float((found[name] - right[name]).abs().max()) for name in right)


@pytest.mark.parametrize(("strategy", "variant"), TRAINERS)
def test_two_processes_train_what_one_trains(strategy, variant, folder: Path):
    """On the same eight responses, of which one process has five and the other three."""
    two = told(folder, f"{strategy}-{variant}", "trainer")
    assert [one["processes"] for one in two] == [2, 2] and two[0]["metrics"] == two[1]["metrics"]
    trainer = new_trainer(new_roles(variant))
    before = weights(trainer)
    assert two[0]["metrics"] == [close(row) for row in train(trainer, range(ROWS), range(ROLLOUTS))]
    assert gap(load_file(folder / f"{strategy}-{variant}" / "weights.safetensors"), weights(trainer)) < WEIGHTS
    assert gap(before, weights(trainer)) > 100 * WEIGHTS  # what makes the bound mean something


@pytest.mark.parametrize(("strategy", "variant"), TRAINERS)
def test_a_checkpoint_goes_on_to_the_last_bit(strategy, variant, folder: Path):
    assert [one["resumed"] for one in told(folder, f"{strategy}-{variant}", "trainer")] == [True, True]


@pytest.mark.parametrize(("strategy", "variant"), TRAINERS)
def test_a_gradient_that_is_not_finite_touches_no_weight(strategy, variant, folder: Path):
    assert [one["refused"] for one in told(folder, f"{strategy}-{variant}", "trainer")] == [True, True]


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_weights_are_in_parts_between_passes(variant, folder: Path):
    """Under ZeRO-3 a process holds no weight as a whole then: of adapters' base neither, the adapters alone."""
    for one in told(folder, f"zero3-{variant}", "trainer"):
        actor = new_roles(variant)[0]
        adapters = sum(one.numel() for name, one in actor.module.named_parameters() if "lora_" in name)
        assert one["held"] == dict.fromkeys(ROLES, adapters)


def test_the_state_of_the_optimiser_is_on_a_disk_and_then_gone(folder: Path):
    """Of actor and critic each the weight, two moments and the embeddings' gradient; smaller ones stay in memory."""
    if not HAS_LIBAIO:
        pytest.skip("ZERO3-NVME IS NOT TESTED HERE: install libaio with its headers (libaio-dev) and a C++ compiler")
    assert [one["on_disk"] for one in told(folder, "zero3-nvme-wide", "trainer")] == [8, 8]
    assert not list((folder / "disk").iterdir())


def test_fsdp_divides_all_weights_but_those_with_adapters(folder: Path):
    """By rows: of one row, which a value head is, the first process has all."""
    roles = zip(ROLES, new_roles("full"), strict=True)
    whole = {name: sum(one.numel() for one in role.module.parameters()) for name, role in roles}
    held = [one["held"] for one in told(folder, "fsdp-full", "trainer")]
    assert {name: sum(one[name] for one in held) for name in ROLES} == whole
    assert held[1] == dict.fromkeys(ROLES, whole["actor"] // 2)
    adapted = sum(one.numel() for one in new_roles("lora")[0].module.parameters())
    assert [one["held"] for one in told(folder, "fsdp-lora", "trainer")] == [dict.fromkeys(ROLES, adapted)] * 2


@pytest.mark.parametrize(("strategy", "variant"), STAGES)
def test_a_stage_makes_what_processes_make_that_share_nothing(strategy, variant, folder: Path):
    """The same metrics, rollout by rollout; the same of what is measured in the end, in both processes; and a model
    that the plain library loads."""
    name, shared_nothing = f"{strategy}-{variant}-stage", f"ddp-{variant}-stage"
    two, right = told(folder, name, "stage"), told(folder, shared_nothing, "stage")
    assert two[0] == two[1] and two[0]["processes"] == 2
    assert two[0]["handover"]["largest_difference"] <= two[0]["handover"]["bound"]
    ours = [two[0]["metrics"], *metrics(folder / name)]
    theirs = [right[0]["metrics"], *metrics(folder / shared_nothing)]
    assert [flat(row) for row in ours] == [close(flat(row)) for row in theirs]
    model = folder / name / "model"
    read_manifest(model, hashes=True)
    assert gap(*(load_file(folder / one / "model" / "model.safetensors") for one in (name, shared_nothing))) < WEIGHTS
    assert all(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(model).state_dict().values())


@pytest.mark.parametrize(("strategy", "variant"), STOPPED)
def test_a_stopped_stage_goes_on_to_the_last_bit(strategy, variant, folder: Path):
    """A signal to one process after the first rollout stops both, with a checkpoint."""
    straight, stopped = f"{strategy}-{variant}-stage", f"{strategy}-{variant}-stopped"
    assert all("with a checkpoint" in one["error"] for one in told(folder, stopped, "stopped"))
    assert metrics(folder / stopped) == metrics(folder / straight)
    assert weights_hash(folder / stopped / "model") == weights_hash(folder / straight / "model")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without the clock."""
    rows = MetricsLog(folder / "metrics.jsonl").read()
    clock = {"time", "eps", "alarms"}
    return [{key: one for key, one in row.items() if key not in clock and "time/" not in key} for row in rows]
