"""PPO on two processes under DeepSpeed or FSDP gives what one process gives, or two that share nothing; and a whole
model."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.job import Input
from align.metrics import MetricsLog
from align.records import read_manifest
from tests.distributed.conftest import ROOT, World, environment, write_disk
from tests.distributed.plain_vllm import LENGTH, PROMPT
from tests.distributed.zero_roles import HAS_LIBAIO, ROLLOUTS, ROWS, TRAINERS, new_roles, new_trainer, train, weights
from tests.models.tiny import FOR_VLLM, model_input, new_opened, save_policy
from tests.rewards.test_remote import Server, answer, lengths
from tests.stages.harness import LORA, weights_hash

WEIGHTS = 1e-5
"""Bound of differences between final weights, from sums in another order. Measured: 2e-6."""
METRICS = 5e-5
"""And of those between metrics, relative or absolute. Measured: 5e-6."""
ROLES = ("actor", "critic", "reference")
ENGINES = [("ddp", "vllm"), ("zero3", "vllm"), ("fsdp", "vllm"), ("zero3", "vllm-server")]
"""Strategies, and what each process samples with: the last stage loses a server on the way."""
STAGES = [(strategy, variant) for strategy in ("ddp", "zero2", "zero3", "fsdp") for variant in ("full", "lora")]
STAGES += [("ddp", "adapted reference"), ("fsdp", "adapted reference")]
STAGES += [("zero2-offload", "full"), ("zero3-offload", "full")]
STAGES += [("zero3-nvme", "full")] if HAS_LIBAIO else []
STAGES += ENGINES
STOPPED = [("zero2", "full"), ("zero3", "full"), ("zero3", "lora"), ("fsdp", "full")]
GIVEN_UP = ["zero3", "fsdp"]
MISMATCH = 1e-4
"""Bound of differences between log-probabilities of engine and trainer, in nats. Measured: 8e-6."""
OPTIM = {"lr": 1e-3, "eps": 1e-5}
SETTINGS: dict[str, Any] = {
    "rollouts": 3,
    "rollout": {"prompts": 4, "responses_per_prompt": 2, "max_response_tokens": 6, "engine": "transformers"},
    "epochs": 2,
    "micro_batch_size": 4,
    "optim": OPTIM,
    "critic": {"optim": OPTIM},
    "ema": 0.5,
    "missing_eos": {"rule": "off"},
    "checkpoint": {"every_steps": 1},
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Server]:
    """For each of GIVEN_UP it answers both processes before the first rollout and in it, and one of them in the
    second."""
    server = Server()
    server.script[:] = [*[lengths] * 5, answer(503)] * len(GIVEN_UP)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, endpoint: Server) -> Path:
    """What two processes made of everything."""
    world = World(tmp_path_factory.mktemp("zero"))
    cases = [stage_case(world, strategy, variant) for strategy, variant in STAGES]
    cases[-1]["kill"] = 1
    for strategy in GIVEN_UP:
        case = stage_case(world, strategy, "full") | {"name": f"{strategy}-given-up"}
        case["settings"]["reward"] = {"judge": {"url": endpoint.url, "retries": 0}, "reward": {}}
        cases.append(case)
    for strategy, variant in STOPPED:
        stopped = stage_case(world, strategy, variant) | {"name": f"{strategy}-{variant}-stopped"}
        cases += [stopped | {"stop": 1, "log": "stopped"}, stopped]
    for name in {case["name"] for case in cases} | {f"{strategy}-{variant}" for strategy, variant in TRAINERS}:
        (world.folder / name).mkdir()
    (world.folder / "cases.json").write_text(json.dumps(cases))
    write_disk(world.folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("zero_process.py"))
    done = subprocess.run(
        [*launch, script, str(world.folder)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return world.folder


def stage_case(world: World, strategy: str, variant: str) -> dict[str, Any]:
    """With adapters one base plays all four roles; else there are four models, or the reference is the base of the
    reward model's adapter. `variant` may name an engine."""
    lora = variant == "lora"
    adapted = lora or variant == "adapted reference"
    reward = replace(world.one("reward", adapted).output(), adapter_of=world.policy.fingerprint if adapted else None)
    policy, rollout = world.policy, SETTINGS["rollout"]
    if (strategy, variant) in ENGINES:
        policy = wide_policy(world)
        rollout = rollout | {"engine": variant, "kv_cache_bytes": 2**24}
    inputs = {"policy": policy, "reference": policy, "reward": reward}
    data = {"path": world.files["sft"], "held_out": 0.2}
    return {
        "name": f"{strategy}-{variant}-stage",
        "strategy": strategy,
        "settings": SETTINGS | {"data": data, "rollout": rollout} | (LORA if lora else {}),
        "inputs": {name: asdict(one) for name, one in inputs.items()},
    }


def wide_policy(world: World) -> Input:
    """A policy that vLLM can run, made on first use."""
    model = world.folder / "wide" / "model"
    return model_input(model) if model.exists() else save_policy(new_opened(config=FOR_VLLM), model)


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
    """On the same eight responses, of which one process has five and the other three. Of the average too."""
    two = told(folder, f"{strategy}-{variant}", "trainer")
    assert [one["processes"] for one in two] == [2, 2] and two[0]["metrics"] == two[1]["metrics"]
    trainer = new_trainer(new_roles(variant), variant)
    before = weights(trainer)
    assert two[0]["metrics"] == [close(row) for row in train(trainer, range(ROWS), range(ROLLOUTS))]
    assert gap(load_file(folder / f"{strategy}-{variant}" / "weights.safetensors"), weights(trainer)) < WEIGHTS
    trained = weights(trainer)
    assert trainer.ema is not None
    trainer.ema.apply()
    assert gap(load_file(folder / f"{strategy}-{variant}" / "average.safetensors"), weights(trainer)) < WEIGHTS
    assert min(gap(trained, before), gap(trained, weights(trainer))) > 50 * WEIGHTS  # the bound means something


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


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_fsdp_divides_all_weights_but_adapters(variant, folder: Path):
    """By rows: of one row, which a value head is, the first process has all."""
    adapters, whole = {}, {}
    for name, role in zip(ROLES, new_roles(variant), strict=True):
        numbers = {key: one.numel() for key, one in role.module.named_parameters()}
        whole[name] = sum(numbers.values())
        adapters[name] = sum(one for key, one in numbers.items() if "lora_" in key)
    first, second = (one["held"] for one in told(folder, f"fsdp-{variant}", "trainer"))
    assert {name: first[name] + second[name] for name in ROLES} == {n: whole[n] + adapters[n] for n in ROLES}
    assert second == dict.fromkeys(ROLES, (whole["actor"] + adapters["actor"]) // 2)


@pytest.mark.parametrize(("strategy", "variant"), TRAINERS)
def test_an_engine_is_given_the_weights_that_are_trained(strategy, variant, folder: Path):
    """A few at a time, though they are in parts and have adapters."""
    assert [one["handed over"] for one in told(folder, f"{strategy}-{variant}", "trainer")] == [True, True]


@pytest.mark.parametrize(("name", "layers"), [("zero3-full", 1), ("zero3-lora", 1), ("fsdp-full", 0)])
def test_an_engine_is_given_a_layer_at_a_time(name, layers, folder: Path):
    """ZeRO-3 makes a layer whole for that; FSDP leaves all in parts, and puts each weight together beside them."""
    assert [one["read"] for one in told(folder, name, "trainer")] == [layers] * 2


@pytest.mark.parametrize(("strategy", "variant"), ENGINES)
def test_each_process_samples_from_what_was_trained(strategy, variant, folder: Path):
    """What both engines say of all tokens that they sampled; after an update too, which changes it by far more."""
    rows = metrics(folder / f"{strategy}-{variant}-stage")
    assert max(row["samples/mismatch_max"] for row in rows) < MISMATCH
    assert rows[0]["policy/approxkl_avg"] > 100 * MISMATCH


def test_vllm_by_itself_loads_what_zero3_saved(folder: Path):
    """It says of the file what transformers says."""
    model = folder / "zero3-vllm-stage" / "model"
    script = str(Path(__file__).with_name("plain_vllm.py"))
    done = subprocess.run(
        [sys.executable, script, str(model)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    plain, ids = AutoModelForCausalLM.from_pretrained(model), torch.tensor([PROMPT])
    for _ in range(LENGTH):
        ids = torch.cat([ids, plain(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert json.loads(done.stdout.splitlines()[-1]) == ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("strategy", GIVEN_UP)
def test_an_endpoint_that_gives_up_in_one_process_ends_all(strategy, folder: Path):
    """Also before a reward model is asked that is in parts: both name the cause, with a checkpoint of the rollout
    before."""
    name = f"{strategy}-given-up"
    for one in told(folder, name, "stage"):
        assert "ppo.reward.judge: " in one["error"] and "answered 503" in one["error"]
    read_manifest(folder / name / "checkpoints" / "step-1", hashes=True)
    assert [row["step"] for row in metrics(folder / name)] == [1]


@pytest.mark.parametrize(("strategy", "variant"), STAGES)
def test_a_stage_makes_what_processes_make_that_share_nothing(strategy, variant, folder: Path):
    """The same metrics, rollout by rollout; the same of what is measured in the end, in both processes; and a model
    that the plain library loads."""
    name, shared_nothing = f"{strategy}-{variant}-stage", f"ddp-{variant.removesuffix('-server')}-stage"
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
