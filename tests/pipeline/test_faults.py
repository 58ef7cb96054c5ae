"""Kills, signals, locks and exit codes: nothing half-made is ever taken for whole, and the run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from toy_run import Toy, wait_until

from align.records import read_manifest

POINTS = ["base-started", "base-step-1", "base-step-2", "base-committing", "base-committed"]
WEIGHTS = hashlib.sha256(json.dumps([0.1, 3, 0, [""]]).encode()).hexdigest()
"""What the toy's base makes with the settings used here, interrupted or not."""


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all output of a process."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def expect_whole(toy: Toy) -> None:
    """The run goes on to the result it would have had undisturbed."""
    toy.align("run", "base")
    read_manifest(toy.directory("base") / "model", hashes=True)
    assert (toy.directory("base") / "model" / "model.safetensors").read_text() == WEIGHTS
    assert (toy.directory("base") / "record.json").exists()
    assert not list(toy.run_dir.rglob(".tmp-*")) + list(toy.run_dir.rglob(".trash-*"))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("victim", ["runner", "worker"])
def test_a_kill_leaves_nothing_that_is_taken_for_whole(toy: Toy, point: str, victim: str) -> None:
    process = toy.start("run", "base", *toy.hold(point))
    toy.wait_for(point)
    (worker,) = toy.workers()
    os.kill(process.pid if victim == "runner" else worker, signal.SIGKILL)
    code, shown = finish(process)
    wait_until(lambda: not toy.workers())  # a killed runner leaves no orphan
    if victim == "worker":
        assert code == 128 + signal.SIGKILL
        assert "base: its process was killed by SIGKILL" in shown
    assert toy.actions("base")["base"] == ("run" if point == "base-started" else "resume")
    expect_whole(toy)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_after_a_checkpoint_and_the_stage_resumes(toy: Toy, number: int) -> None:
    process = toy.start("run", "base", *toy.hold("base-step-2"))
    toy.wait_for("base-step-2")
    process.send_signal(number)
    toy.wait_for("base-signal")
    toy.release("base-step-2")
    code, shown = finish(process)
    assert code == 75, shown
    assert "base: interrupted; run the same command to continue" in shown
    stage = toy.plan("base")["base"]
    assert stage["action"] == "resume"
    assert stage["reasons"] == ["interrupted at step 2: resumes from checkpoint"]
    expect_whole(toy)
    assert [line["resumed_from"] for line in toy.lines("base")] == [0, 0, 2]


def test_a_second_ctrl_c_stops_at_once(toy: Toy) -> None:
    process = toy.start("run", "base", *toy.hold("base-step-1"))
    toy.wait_for("base-step-1")
    process.send_signal(signal.SIGINT)
    toy.wait_for("base-signal")
    process.send_signal(signal.SIGINT)
    code, shown = finish(process)
    assert code == 130, shown
    expect_whole(toy)


def test_a_signal_ends_the_chain_and_not_only_the_stage(toy: Toy) -> None:
    process = toy.start("run", "sft", *toy.hold("base-committed"))
    toy.wait_for("base-committed")
    process.send_signal(signal.SIGTERM)
    toy.wait_for("base-signal")
    toy.release("base-committed")
    code, shown = finish(process)
    assert code == 75
    assert "stopped before sft" in shown
    assert toy.actions("sft") == {"base": "reuse", "sft": "run"}


def test_a_second_run_in_the_same_folder_refuses_at_once(toy: Toy) -> None:
    process = toy.start("run", "base", *toy.hold("base-started"))
    toy.wait_for("base-started")
    before = sorted(toy.run_dir.rglob("*"))
    shown = toy.align("run", "base", code=75)
    assert f"is in use by process {process.pid} on" in shown
    assert "wait for it or use --run NAME" in shown
    assert sorted(toy.run_dir.rglob("*")) == before
    toy.release("base-started")
    assert finish(process)[0] == 0


def test_the_run_stays_locked_while_a_worker_lives(toy: Toy) -> None:
    process = toy.start("run", "base", *toy.hold("base-started"))
    toy.wait_for("base-started")
    (worker,) = toy.workers()
    descriptors = {str(entry.readlink()) for entry in Path(f"/proc/{worker}/fd").iterdir()}
    assert str(toy.run_dir / ".lock") in descriptors
    toy.release("base-started")
    assert finish(process)[0] == 0


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [
        ("numeric", 70, "toy: the loss is [red]nan[/red] at step 3"),
        ("bug", 1, "RuntimeError: a bug of the toy"),
        ("disk", 73, "somewhere: the disk is full"),
        ("kill", 128 + 9, "killed by SIGKILL (out of memory?)"),
    ],
)
def test_a_failing_stage_keeps_its_code_and_says_why(toy: Toy, fail: str, code: int, message: str) -> None:
    shown = toy.align("run", "reward", f"sft.fail={fail}", "sft.steps=1", code=code)
    assert message in shown
    if fail != "kill":
        assert f"sft failed with exit code {code}; see {toy.directory('sft') / 'log.txt'}" in shown
        assert message in (toy.directory("sft") / "log.txt").read_text()
    assert ("Traceback" in shown) == (fail == "bug")
    assert not list((toy.run_dir).glob("reward/*"))
    assert list(json.loads((toy.run_dir / "summary.json").read_text())["stages"]) == ["base"]


def test_a_metric_that_is_not_a_number_is_shown_and_not_hidden(toy: Toy) -> None:
    shown = toy.align("run", "sft", "sft.fail=nan")
    assert json.loads((toy.run_dir / "summary.json").read_text())["stages"]["sft"]["gold"] == "NaN"
    assert "NaN" in shown


def test_python_without_asserts_is_refused(toy: Toy) -> None:
    assert "python -O" in toy.align("run", "base", code=2, PYTHONOPTIMIZE="1")


def test_a_world_of_another_size_than_asked_for_is_refused(toy: Toy) -> None:
    shown = toy.align("run", "base", code=72, ALIGN_WORLD_SIZE="2")
    assert "2 processes were asked for and 1 started" in shown
