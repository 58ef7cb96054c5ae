"""`align run --only`: one stage of a run, beside others, never what comes before it."""

from __future__ import annotations

import pytest
from toy_run import RECIPE, Toy


def test_only_runs_one_stage_and_none_that_it_needs(toy: Toy) -> None:
    shown = toy.align("run", "reward", "--only", "sft", code=4)
    assert "--only sft: what it consumes is not up to date: base (not run before)" in shown
    toy.align("run", "reward", "--only", "base")
    assert toy.actions("reward") == {"base": "reuse", "sft": "run", "reward": "run"}
    toy.align("run", "reward", "--only", "base")  # up to date: nothing to do, and no failure
    assert "did you mean `base`?" in toy.align("run", "--only", "bsae", code=2)


@pytest.mark.parametrize(("second", "held"), [(["--only", "sft"], "runs/toy/sft"), ([], "runs/toy")])
def test_a_stage_that_is_being_run_is_held(toy: Toy, second: list[str], held: str) -> None:
    """Against a second process for it, and against one for the whole run; another stage is free."""
    toy.recipe(RECIPE + "other: {kind: sft, policy: base}\n")
    toy.align("run", "base")
    process = toy.start("run", "--only", "sft", *toy.hold("sft-started"))
    toy.wait_for("sft-started")
    assert f"{held} is in use by process {process.pid} on" in toy.align("run", *second, code=75)
    toy.align("run", "--only", "other")
    toy.release("sft-started")
    assert process.communicate(timeout=60) and process.returncode == 0
    assert toy.actions("sft", "other") == {"base": "reuse", "sft": "reuse", "other": "reuse"}
