"""What `align status` makes of each engine's answer, and of a plain script. Engines answer what is written here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from cluster import Cluster
from test_files import submission
from toy_run import wait_until

from align.submit.engine import JobState, State
from align.submit.targets import TARGETS, TargetName

NAME = "demo-20260102-030405"


def asked(monkeypatch: pytest.MonkeyPatch, folder: Path, target: TargetName, answer: str) -> dict[str, JobState]:
    """The states when the engine's command prints `answer`, and fails for an empty one."""
    program = folder / TARGETS[target].command
    program.write_text(f"#!/bin/bash\nprintf %s {shlex.quote(answer)}\n{'exit 1' if not answer else ''}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    ids = dict.fromkeys(["base", "sft", "reward", "dpo", "ppo"], NAME)
    return TARGETS[target].states(submission(target, {"gpus": 0}), ids)


def test_kubernetes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = [
        {"name": "base-1", "succeeded": 1, "failed": 0, "ready": 0, "active": 0},
        {"name": "sft-2", "succeeded": 0, "failed": 0, "ready": 1, "active": 1},
        {"name": "reward-3", "succeeded": 0, "failed": 1, "ready": 0, "active": 0},
        {"name": "dpo-4", "succeeded": 0, "failed": 0, "ready": 0, "active": 1},
    ]
    answer = json.dumps({"status": {"replicatedJobsStatus": jobs, "conditions": []}})
    assert asked(monkeypatch, tmp_path, TargetName.KUBERNETES, answer) == {
        "base": JobState(State.DONE, "succeeded"),
        "sft": JobState(State.RUNNING, "ready"),
        "reward": JobState(State.FAILED, "failed"),
        "dpo": JobState(State.WAITING, "its pods are pending"),
        "ppo": JobState(State.WAITING, "not created yet"),
    }
    conditions = [{"type": "Failed", "status": "True"}]
    answer = json.dumps({"status": {"replicatedJobsStatus": jobs, "conditions": conditions}})
    assert asked(monkeypatch, tmp_path, TargetName.KUBERNETES, answer)["ppo"].state is State.FAILED


def test_skypilot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other jobs of the queue are passed over."""
    said = ["SUCCEEDED", "RECOVERING", "FAILED_SETUP", "RUNNING"]
    tasks = [{"job_name": NAME, "task_id": place, "status": status} for place, status in enumerate(said)]
    answer = json.dumps([{"job_name": "other", "task_id": 4, "status": "RUNNING"}, *tasks])
    assert asked(monkeypatch, tmp_path, TargetName.SKYPILOT, answer) == {
        "base": JobState(State.DONE, "SUCCEEDED"),
        "sft": JobState(State.WAITING, "RECOVERING"),
        "reward": JobState(State.FAILED, "FAILED_SETUP"),
        "dpo": JobState(State.RUNNING, "RUNNING"),
        "ppo": JobState(State.UNKNOWN),
    }


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (f"Status for job '{NAME}': RUNNING\nStatus message: Job is currently running.\n", State.RUNNING),
        (f"Status for job '{NAME}': PENDING\n", State.WAITING),
        (f"-----\nJob '{NAME}' succeeded\n-----\n", State.DONE),
        (f"-----\nJob '{NAME}' failed\n-----\n", State.FAILED),
        (f"Job '{NAME}' was stopped\n", State.FAILED),
        ("", State.UNKNOWN),
    ],
)
def test_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, state: State) -> None:
    assert asked(monkeypatch, tmp_path, TargetName.RAY, answer)["ppo"].state is state


@pytest.mark.parametrize("target", [TargetName.KUBERNETES, TargetName.SKYPILOT, TargetName.RAY])
def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: TargetName) -> None:
    states = asked(monkeypatch, tmp_path, target, "")
    assert {state.state for state in states.values()} == {State.UNKNOWN}


def test_a_script_runs_in_the_background_and_its_stages_are_told_apart(cluster: Cluster) -> None:
    """Base is held, so it runs and sft waits; a TERM ends both after a checkpoint."""
    gate = cluster.toy.hold("base-step-2")
    python = f"submit.python={cluster.python}"
    cluster.align("submit", "sft", "--to", "script", "submit.gpus=0", python, *gate)
    cluster.toy.wait_for("base-step-2")
    found = told(cluster)
    assert [stage["state"] for stage in found] == ["running", "waiting"]
    cluster.bash("-c", f"kill {found[0]['job']}")
    cluster.toy.wait_for("base-signal")
    cluster.toy.release("base-step-2")
    wait_until(lambda: told(cluster)[0]["state"] != "running")
    assert [stage["state"] for stage in told(cluster)] == ["interrupted", "unknown"]
    assert cluster.toy.actions("base") == {"base": "resume"}


def told(cluster: Cluster) -> list[dict[str, str]]:
    return json.loads(cluster.align("status", "--json"))["stages"]


def test_a_run_without_a_submission_names_the_nearest(cluster: Cluster) -> None:
    cluster.submit("base", "--dry-run")
    assert "did you mean `toy`?" in cluster.align("status", "tyo", code=2)


def test_an_override_for_a_stage_that_is_not_there_is_refused(cluster: Cluster) -> None:
    shown = cluster.submit("base", "submit.stages.bsae={nodes: 2}", code=2)
    assert "submit.stages.bsae: no such stage in the recipe (did you mean `base`?)" in shown
