"""Slurm's scripts, run for real: a chain, a requeue, a failure, stages side by side. The Slurm is fake_slurm.py."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from cluster import Cluster
from toy_run import RECIPE, wait_until

EVERYTHING = ["base", "sft", "reward", "ppo"]


def states(cluster: Cluster, *arguments: str) -> dict[str, tuple[str, str]]:
    """State and detail of each stage, from `align status --json`."""
    found = json.loads(cluster.align("status", *arguments, "--json"))
    return {stage["stage"]: (stage["state"], stage["detail"]) for stage in found["stages"]}


def test_a_chain_is_submitted_once_and_completes(cluster: Cluster) -> None:
    """In a folder whose name holds quotes, a line break and commands; nothing of it is run."""
    shown = cluster.submit("sft", "reward", "ppo", "ppo.lr=0.3")
    assert "submitted ppo: 103" in shown
    cluster.finish()
    assert {stage: state for stage, (state, _) in states(cluster).items()} == dict.fromkeys(EVERYTHING, "done")
    assert set(cluster.toy.actions("ppo.lr=0.3").values()) == {"reuse"}
    assert list(json.loads((cluster.toy.run_dir / "summary.json").read_text())["stages"]) == EVERYTHING
    assert not list(cluster.state.parent.rglob("broken"))
    (folder,) = (cluster.toy.run_dir / "submit").iterdir()
    assert (folder / "jobs.txt").read_text() == "base 100\nsft 101\nreward 102\nppo 103\n"
    assert "there is nothing to submit" in cluster.submit("ppo.lr=0.3", code=2)


def test_a_job_whose_time_is_over_saves_and_is_requeued_and_resumes(cluster: Cluster) -> None:
    """USR1 to the batch shell, TERM to the stage, exit code 75, requeue: the second start goes on at step 2."""
    gate = cluster.toy.hold("base-step-2")
    cluster.submit("base", *gate)
    cluster.toy.wait_for("base-step-2")
    assert states(cluster)["base"] == ("running", "RUNNING")
    cluster.slurm("time_is_nearly_over", "100")
    cluster.toy.wait_for("base-signal")
    cluster.toy.release("base-step-2")
    cluster.finish()
    assert states(cluster)["base"][0] == "done"
    assert [line["resumed_from"] for line in cluster.toy.lines("base")] == [0, 0, 2]


def test_a_preempted_job_that_saves_in_its_grace_time_is_requeued(cluster: Cluster) -> None:
    """TERM to the stage alone, and the job still runs when the stage ends with 75: Slurm would call it failed."""
    gate = cluster.toy.hold("base-step-2")
    cluster.submit("base", *gate)
    cluster.toy.wait_for("base-step-2")
    cluster.slurm("preempted", "100")
    cluster.toy.wait_for("base-signal")
    cluster.toy.release("base-step-2")
    cluster.finish()
    assert states(cluster)["base"][0] == "done"
    assert [line["resumed_from"] for line in cluster.toy.lines("base")] == [0, 0, 2]


def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Cluster) -> None:
    """TERM to the stage alone, of a job that is over: saved, and not started again."""
    gate = cluster.toy.hold("base-step-2")
    cluster.submit("sft", *gate)
    cluster.toy.wait_for("base-step-2")
    assert states(cluster)["sft"] == ("waiting", "PENDING (Dependency)")
    cluster.slurm("cancelled", "100")
    cluster.toy.wait_for("base-signal")
    cluster.toy.release("base-step-2")
    cluster.finish()
    found = states(cluster)
    assert found["base"][0] == "interrupted"
    assert found["base"][1].startswith("exit code 75: ")
    assert cluster.toy.actions("base") == {"base": "resume"}


def test_a_failure_is_told_with_its_code_and_cancels_what_waits_for_it(cluster: Cluster) -> None:
    cluster.submit("reward", "sft.fail=numeric")
    cluster.finish()
    found = states(cluster, "toy")
    assert found["base"][0] == "done"
    assert found["sft"] == ("failed", "exit code 70: toy: the loss is [red]nan[/red] at step 3")
    assert found["reward"] == ("failed", "CANCELLED (DependencyNeverSatisfied)")
    shown = cluster.align("status", "--runs", str(cluster.toy.run_dir.parent))
    assert "exit code 70: toy: the loss is [red]nan[/red] at step 3" in shown


def test_stages_that_do_not_need_each_other_run_side_by_side(cluster: Cluster) -> None:
    """Two reward models are held in the middle of their first step, both at once; PPO waits for both."""
    cluster.toy.recipe(RECIPE.replace("reward: {}", "a: {kind: reward}\nb: {kind: reward}"))
    gates = {name: cluster.toy.gate / name for name in "ab"}
    for gate in gates.values():
        gate.mkdir()
        (gate / "hold-reward-started").touch()
    cluster.submit("ppo", "ppo.reward=[a, b]", *(f"{name}.gate={gate}" for name, gate in gates.items()))
    for gate in gates.values():
        wait_until((gate / "reached-reward-started").exists)
    found = states(cluster)
    assert [found[name][0] for name in ("a", "b", "ppo")] == ["running", "running", "waiting"]
    for gate in gates.values():
        (gate / "hold-reward-started").unlink()
    cluster.finish()
    assert {state for state, _ in states(cluster).values()} == {"done"}


def test_a_dry_run_writes_files_that_submit_when_they_are_started(cluster: Cluster) -> None:
    """And a second start of the same files is refused."""
    shown = cluster.submit("base", "--dry-run")
    assert "#SBATCH --job-name=toy-base" in shown
    assert states(cluster)["base"] == ("not submitted", "")
    (folder,) = (cluster.toy.run_dir / "submit").iterdir()
    cluster.bash(folder / "submit.sh")
    cluster.finish()
    assert states(cluster)["base"][0] == "done"
    assert cluster.bash(folder / "submit.sh", code=1)
    assert len(list(cluster.state.iterdir())) == 1


def test_a_submission_that_breaks_off_says_what_to_end(cluster: Cluster) -> None:
    """sbatch refuses the second job; the first is known to `align status`, and goes on."""
    real = (cluster.programs / "sbatch").rename(cluster.programs / "real sbatch")
    body = f'case "$*" in *sft.sbatch) echo "no such partition" >&2; exit 1;; esac\nexec {shlex.quote(str(real))} "$@"'
    cluster.program("sbatch", body)
    shown = cluster.submit("sft", code=1)
    assert "no such partition" in shown
    assert "to end what was submitted: scancel 100" in shown
    cluster.finish()
    found = states(cluster)
    assert found["base"][0] == "done"
    assert found["sft"] == ("not submitted", "")


def test_without_the_engine_nothing_is_written(cluster: Cluster) -> None:
    (cluster.programs / "sbatch").unlink()
    assert "there is no `sbatch` here" in cluster.submit("base", code=2)
    assert not Path(cluster.toy.run_dir / "submit").exists()
