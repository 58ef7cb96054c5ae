"""Stages of several processes: how they end when one of them does not, and runs on two machines. Toy stages, but real
launchers and real communication."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time

import pytest
from toy_run import Toy, wait_until

TWO = ["launch.processes=2"]


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all output of a process."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def expect_whole(toy: Toy) -> None:
    """No process is left, and the run goes on to its end from a checkpoint."""
    wait_until(lambda: not toy.workers())
    assert toy.actions("base", *TWO) == {"base": "resume"}
    toy.align("run", "base", *TWO)
    assert json.loads((toy.directory("base") / "record.json").read_text())["world_size"] == 2


@pytest.fixture
def at_step_2(toy: Toy) -> subprocess.Popen[str]:
    """A run of two processes that both wait at step 2."""
    process = toy.start("run", "base", *toy.hold("base-step-2"), *TWO, "launch.timeout=5")
    toy.wait_for("base-step-2")
    wait_until(lambda: len(toy.workers()) == 2)
    return process


def test_a_killed_process_ends_the_stage_and_is_named(toy: Toy, at_step_2) -> None:
    """Within seconds, with its exit code: nobody waits for the timeout."""
    os.kill(toy.process(1), signal.SIGKILL)
    toy.release("base-step-2")
    code, shown = finish(at_step_2)
    assert code == 128 + signal.SIGKILL, shown
    assert "process 1 was killed by SIGKILL (out of memory?)" in shown and "Traceback" not in shown
    expect_whole(toy)


def test_a_process_that_hangs_ends_the_stage_in_a_stated_time(toy: Toy, at_step_2) -> None:
    """launch.timeout, and then at most 30 seconds that the hanging one gets to end by itself."""
    started = time.monotonic()
    os.kill(toy.process(1), signal.SIGSTOP)
    toy.release("base-step-2")
    code, shown = finish(at_step_2)
    assert code == 72, shown
    assert "process 0 of 2 got no answer from another one within launch.timeout" in shown and "Traceback" not in shown
    assert time.monotonic() - started < 5 + 30 + 15
    expect_whole(toy)


def test_a_process_that_fails_ends_the_stage_with_its_cause(toy: Toy) -> None:
    """The other one says nothing of the contact that it lost."""
    shown = toy.align("run", "base", *TWO, "base.fail=numeric", "base.failing=1", code=70)
    assert shown.count("toy: the loss is [red]nan[/red] at step 3") == 1
    assert "base failed with exit code 70" in shown
    assert "Traceback" not in shown and "lost contact" not in shown
    expect_whole(toy)


def test_a_killed_launcher_leaves_no_process(toy: Toy, at_step_2) -> None:
    at_step_2.kill()
    at_step_2.communicate(timeout=60)
    toy.release("base-step-2")
    expect_whole(toy)


def test_a_signal_reaches_all_processes(toy: Toy, at_step_2) -> None:
    at_step_2.send_signal(signal.SIGTERM)
    toy.wait_for("base-signal")
    toy.release("base-step-2")
    code, shown = finish(at_step_2)
    assert code == 75, shown
    expect_whole(toy)


def test_a_machine_that_waits_for_another_can_be_stopped(toy: Toy) -> None:
    nodes = ["nodes.count=2", "nodes.address=127.0.0.1", f"nodes.port={free_port()}", *TWO]
    process = toy.start("run", "base", *nodes)
    wait_until((toy.run_dir / "launch" / "base.yaml").exists)
    process.send_signal(signal.SIGINT)
    code, shown = finish(process)
    assert code == 75, shown


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_chain_runs_on_two_machines(toy: Toy) -> None:
    """Two launchers that find each other at an address. The first writes everything."""
    nodes = ["nodes.count=2", "nodes.address=127.0.0.1", f"nodes.port={free_port()}", *TWO]
    machines = [toy.start("run", "base", "sft", *nodes, f"nodes.rank={rank}") for rank in (0, 1)]
    ends = [finish(machine) for machine in machines]
    assert [code for code, _ in ends] == [0, 0], ends
    for stage in ("base", "sft"):
        record = json.loads((toy.directory(stage) / "record.json").read_text())
        assert record["world_size"] == 2
    assert sorted(path.name for path in (toy.run_dir / "launch").iterdir()) == [
        "base-1.yaml",
        "base.yaml",
        "sft-1.yaml",
        "sft.yaml",
    ]
    assert toy.actions("sft", *nodes) == {"base": "reuse", "sft": "reuse"}
