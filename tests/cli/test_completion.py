"""Completion of stages, dotted keys and choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.cli.complete import complete_run_argument


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("incomplete", "options"),
    [
        ("sf", ["sft"]),
        ("se", ["seed="]),
        ("submit.slurm.par", ["submit.slurm.partition="]),
        ("rl", ["rloo"]),
        ("ppo.kl.c", ["ppo.kl.coef="]),
        ("grpo.kl.estimator=", ["grpo.kl.estimator=k1", "grpo.kl.estimator=k2"]),
        ("ppo.reward", ["ppo.reward="]),
        ("ppo.optim.e", ["ppo.optim.eps="]),
        ("evaluation.go", ["evaluation.gold="]),
        ("ppo.precision=f", ["ppo.precision=float32", "ppo.precision=float16"]),
        ("ppo.whiten_advantages=t", ["ppo.whiten_advantages=true"]),
        ("ppo.rollouts=", []),
        ("nothing.", []),
        ("nothing=", []),
    ],
)
def test_options(incomplete, options):
    assert complete_run_argument(incomplete) == options


def test_stages_of_the_recipe_here():
    Path("align.yaml").write_text("strict: {kind: dpo}\nodd: {kind: [1]}\n", encoding="utf-8")
    assert complete_run_argument("st") == ["strict"]
    assert complete_run_argument("strict.bet") == ["strict.beta="]


def test_a_broken_recipe_still_completes_the_kinds():
    Path("align.yaml").write_text("a: [\n", encoding="utf-8")
    assert complete_run_argument("pp") == ["ppo"]
