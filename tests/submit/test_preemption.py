"""Signals in the middle of a stage lead to a checkpoint, another start, and what an undisturbed run makes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from toy_run import wait_until

from align.submit.kubernetes import HOPELESS
from align.submit.targets import TargetName

STEPS = 200
"""So many that a signal, sent after the first, is there long before the last."""
RECIPE = f"""\
name: toy
evaluation: {{prompts: 2, max_response_tokens: 4}}
base: {{data: rows.jsonl, vocabulary: 300, context: 64, hidden: 16, layers: 1, heads: 1, steps: 0}}
sft:
  data: {{path: rows.jsonl, held_out: 0.2}}
  max_steps: {STEPS}
  batch_size: 2
  log_every: 1
  checkpoint: {{every_steps: {STEPS}}}
"""


def align(cluster: Cluster, *arguments: str) -> None:
    """The command with its real stages."""
    command = [sys.executable, "-m", "align", *arguments]
    environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cluster.toy.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def finished(folder: Path) -> dict[str, Any]:
    """The record of the only sft of a run."""
    (record,) = folder.glob("sft/*/record.json")
    return json.loads(record.read_text())


def steps(folder: Path) -> list[int]:
    """Those in metrics.jsonl, once there is one."""
    return [json.loads(line)["step"] for path in folder.glob("sft/*/metrics.jsonl") for line in path.open()]


def test_a_real_stage_is_requeued_twice_and_ends_with_the_weights_of_an_undisturbed_one(cluster: Cluster) -> None:
    """USR1 to the batch shell, as `--signal` says, when the time is nearly over; then TERM, as when preempted with a
    grace time. Each time sft writes a checkpoint and ends with 75, and the job starts again under its id."""
    toy = cluster.toy
    toy.recipe(RECIPE)
    rows = [{"prompt": f"ask {number}", "response": f"answer {number} " * (1 + number % 3)} for number in range(20)]
    (toy.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    align(cluster, "run", "base")
    undisturbed = toy.run_dir.with_name("undisturbed")
    shutil.copytree(toy.run_dir, undisturbed)
    align(cluster, "run", "sft", "--run", "undisturbed")

    align(cluster, "submit", "sft", "--to", "slurm", "submit.gpus=0", f"submit.python={sys.executable}")
    job = cluster.state / "100"
    wait_until(lambda: steps(toy.run_dir))
    os.kill(int((job / "batch").read_text()), signal.SIGUSR1)
    wait_until((job / "requeued").exists)
    first = len(steps(toy.run_dir))
    (job / "requeued").unlink()
    wait_until(lambda: len(steps(toy.run_dir)) > first)
    os.kill(int((job / "steps").read_text()), signal.SIGTERM)
    wait_until((job / "requeued").exists)
    second = len(steps(toy.run_dir))
    cluster.finish()

    assert 0 < first < second < STEPS
    assert steps(toy.run_dir) == list(range(1, STEPS + 1))
    assert finished(toy.run_dir)["files"] == finished(undisturbed)["files"]


def again(target: TargetName, text: str, code: int) -> str:
    """What the engine does with the first stage when it ends with this exit code, by the file it was given."""
    head, *tasks = yaml.safe_load_all(text)
    if tasks:
        return "start" if code in tasks[0]["resources"]["job_recovery"]["recover_on_exit_codes"] else "retry"
    rules = head["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    matching = [rule["action"] for rule in rules if code in rule.get("onExitCodes", {}).get("values", [])]
    return {"Ignore": "start", "FailJob": "never"}[matching[0]] if matching else "retry"


def script(text: str) -> str:
    """Of the first stage."""
    head, *tasks = yaml.safe_load_all(text)
    if tasks:
        return tasks[0]["run"]
    pod = head["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 120, "what `submit.grace` is by default"
    return pod["containers"][0]["command"][2]


@pytest.mark.parametrize("target", [TargetName.KUBERNETES, TargetName.SKYPILOT])
def test_a_container_that_is_told_to_stop_saves_and_is_started_again(cluster: Cluster, target: TargetName) -> None:
    """TERM to the first process of the script, which is `align` itself: checkpoint, 75, and by the rules of its own
    file another start, which goes on at step 2. A failure is retried, on Kubernetes not if that is hopeless."""
    toy, gate = cluster.toy, cluster.toy.hold("base-step-2")
    settings = {"image": "x", "volume": "v", "mount": str(toy.folder)} if target is TargetName.KUBERNETES else {}
    given = [f"submit.{target}={json.dumps(settings)}", "submit.gpus=0", f"submit.python={cluster.python}"]
    cluster.align("submit", "base", *gate, *given, "--to", target, "--dry-run")
    (file,) = toy.run_dir.glob("submit/*/*.yaml")
    text = file.read_text()
    command = ["bash", "-c", script(text)]
    environment = {**os.environ, **cluster.environment}
    with subprocess.Popen(command, cwd=toy.folder, env=environment, stdout=subprocess.DEVNULL) as container:
        toy.wait_for("base-step-2")
        container.terminate()
        toy.wait_for("base-signal")
        toy.release("base-step-2")
        assert again(target, text, container.wait(60)) == "start"
    subprocess.run(command, cwd=toy.folder, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=60)
    assert [line["resumed_from"] for line in toy.lines("base")] == [0, 0, 2]
    assert again(target, text, 1) == "retry"
    if target is TargetName.KUBERNETES:
        assert {again(target, text, code) for code in HOPELESS} == {"never"}
