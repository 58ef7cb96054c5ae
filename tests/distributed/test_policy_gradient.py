"""ppo, rloo and grpo on two processes: the trainer computes what one process computes, and stages stop, go on and end
together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.job import Input
from align.metrics import JsonLines
from align.records import read_manifest
from align.training.masked import ALONE
from tests.distributed.conftest import ROOT, environment
from tests.distributed.policy_gradient import STAGE, TRAINERS, prepare, run_stage, train
from tests.stages.harness import KINDS, LORA, weights_hash, write_data

METRICS = 1e-4
"""Bound of relative differences between metrics. Measured: 2e-5, from sums in another order."""
WEIGHTS = 1e-5
"""And between final weights, which the training moves by up to 0.03. Measured: 4e-6."""
CLOCK = {"time", "eps"}


FATAL = """
import os, signal
from pathlib import Path

def dies_once(batch):
    mark = Path("killed")
    if len(batch.responses) > 1 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [-0.1 * len(text) for text in batch.responses]
"""
"""A reward function that kills the second process the first time that it scores responses."""


class Pair:
    """What two processes left in a folder."""

    def __init__(self, folder: Path, policy: Input, data: str):
        self.folder, self.policy, self.data = folder, policy, data
        self.told: list[dict[str, Any]] = [json.loads((folder / f"told-{n}.json").read_text()) for n in range(2)]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Lines of a stage's metrics.jsonl without the clock."""
        rows = JsonLines(self.folder / name / "metrics.jsonl").read()
        return [{k: v for k, v in row.items() if k not in CLOCK and not k.startswith("time/")} for row in rows]

    def hash(self, name: str) -> str:
        return weights_hash(self.folder / name / "model")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    data = write_data(folder)["sft"]
    policy = prepare(folder, data)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("policy_gradient.py")
    done = subprocess.run(
        [*launch, str(script), str(folder)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Pair(folder, policy, data)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_learn_what_one_learns(name, pair: Pair, tmp_path: Path):
    """From one batch of eight responses, divided as unequally as in TRAINERS: two rollouts of two epochs, with
    whitening over all tokens and clipping of the norm of all gradients."""
    train(name, pair.policy, tmp_path / "one", ALONE, 0, 1)
    right = json.loads((tmp_path / "one.json").read_text())
    ours = [json.loads((pair.folder / f"{name}-{n}.json").read_text()) for n in range(2)]
    assert ours[0] == ours[1]
    for found, expected in zip(ours[0], right, strict=True):
        assert found == pytest.approx(expected, rel=METRICS, abs=METRICS)
    weights, expected = load_file(tmp_path / "one.safetensors"), load_file(pair.folder / f"{name}-0.safetensors")
    assert weights.keys() == expected.keys()
    assert max(float((weights[key] - expected[key]).abs().max()) for key in weights) < WEIGHTS


@pytest.mark.parametrize("name", TRAINERS)
def test_both_processes_end_with_the_same_weights(name, pair: Pair):
    """To the last bit; and they were moved by far more than the bound above."""
    one, other = (load_file(pair.folder / f"{name}-{n}.safetensors") for n in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    heads = [weight for key, weight in one.items() if key == "critic.head.weight"]
    assert all(float(weight.abs().max()) > 100 * WEIGHTS for weight in heads) and heads


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_stage_of_two_processes(name, pair: Pair):
    """There are two, with the same final metrics; the hand-over holds; each file was written once."""
    told = [one[name] for one in pair.told]
    assert [one["processes"] for one in told] == [2, 2]
    assert told[0]["metrics"] == told[1]["metrics"] and told[0]["handover"] == told[1]["handover"]
    assert told[0]["handover"]["largest_difference"] <= told[0]["handover"]["bound"]
    read_manifest(pair.folder / name / "model", hashes=True)
    assert [row["step"] for row in pair.metrics(name)] == list(range(1, told[0]["metrics"]["rollouts"] + 1))
    assert not list((pair.folder / name).rglob(".tmp-*"))


def test_responses_of_all_processes_are_counted(pair: Pair):
    """Four prompts with two responses each, in every rollout."""
    assert [row["episode"] for row in pair.metrics("ppo")] == [8, 16, 24, 32]
    counted = [row["rollout/learned"] for row in pair.metrics("grpo")]
    assert pair.metrics("grpo")[-1]["episode"] == sum(counted) > 0


def test_each_process_has_responses_of_its_own(pair: Pair):
    """In flight after the last rollout, with their questions: those before it all end in the third."""
    folder = pair.folder / "grpo" / "checkpoints" / "step-4"
    first, second = (json.loads((folder / name).read_text())["groups"] for name in ("inflight.json", "inflight-1.json"))
    assert first and second and first != second


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_signal_in_one_process_stops_all_and_they_resume_exactly(name, pair: Pair):
    """The last process gets SIGTERM at rollout 2; the same processes go on to what they would have made undisturbed, to
    the last bit: with an adaptive coefficient and an average, and with responses in flight."""
    stopped = f"{name} stopped"
    assert all("stopped at step 2 with a checkpoint" in one[f"{stopped}, at first"]["error"] for one in pair.told)
    assert pair.metrics(stopped) == pair.metrics(name)
    assert pair.hash(stopped) == pair.hash(name)


def test_what_fails_in_one_process_fails_in_both(pair: Pair):
    """With its cause, so that both can save what they have; and weights that differ by a bit are refused."""
    assert [one["gives up"] for one in pair.told] == ["RolloutError: the engine of process 1 gave up"] * 2
    assert all(
        "DistributedError: the critic's weights are not the same in all 2" in one["diverges"] for one in pair.told
    )


def test_a_checkpoint_of_two_processes_is_not_for_one(pair: Pair):
    error = run_stage("rloo left", pair.folder, pair.policy, pair.data)["error"]
    assert "its checkpoint of step 1 was written by 2 processes under ddp, and these are 1 process under ddp" in error


def test_all_processes_end_when_the_budget_is_spent(pair: Pair):
    """The KL is over all processes, and so is the decision: after the first rollout that was learned from."""
    assert [one["rloo spent"]["metrics"]["rollouts"] for one in pair.told] == [2, 2]


def test_a_chain_on_two_processes_of_which_one_is_killed(pair: Pair, tmp_path: Path):
    """`align run sft reward ppo`, with adapters on one base: a process of ppo is killed in its first rollout, which is
    named as the cause; the same command goes on to the end."""
    files, few = write_data(tmp_path), {"max_steps": 2, "log_every": 1}
    recipe = {
        "name": "two",
        "model": pair.policy.path,
        "launch": {"processes": 2},
        "evaluation": {"prompts": 4, "max_response_tokens": 6},
        "sft": {**KINDS["sft"], **few, "data": {"path": files["sft"], "held_out": 0.2}},
        "reward": {**KINDS["reward"], **few, **LORA, "data": {"path": files["reward"], "held_out": 0.2}},
        "ppo": {
            **STAGE,
            **LORA,
            "rollouts": 2,
            "reward": {"model": {}, "fatal": {"function": "fatal:dies_once"}},
            "data": {"path": files["sft"], "held_out": 0.2},
        },
    }
    (tmp_path / "fatal.py").write_text(FATAL)
    (tmp_path / "align.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "align", "run", "sft", "reward", "ppo"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    killed = subprocess.run(command, timeout=600, **options)
    assert killed.returncode == 128 + signal.SIGKILL, killed.stdout + killed.stderr
    assert "process 1 was killed by SIGKILL" in killed.stdout + killed.stderr
    assert "Traceback" not in killed.stderr and "lost contact" not in killed.stderr
    done = subprocess.run(command, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "two").glob("*/*/record.json")]
    assert {record["kind"]: record["world_size"] for record in records} == {"sft": 2, "reward": 2, "ppo": 2}
    assert all(record["handover"]["largest_difference"] <= record["handover"]["bound"] for record in records)
