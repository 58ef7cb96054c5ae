"""The stage on judged answers: rows, weights, and that it learns to tell good from bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from align.errors import DataError
from stages.kto.config import Config
from stages.kto.trainer import JudgementTrainer
from tests.models.tiny import demo_texts, new_opened, save_policy
from tests.stages.harness import COMMON, Run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_policy(new_opened(), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def stage(base, tmp_path):
    """A run on judged answers to `count` prompts, polite ones good, of which `num_bad` are rude."""

    def make(num_bad: int = 10, count: int = 40, **settings) -> Run:
        lines = [
            {
                "prompt": prompt,
                "completion": ("ugh , " if row < num_bad else "sure , ") + answer,
                "label": row >= num_bad,
            }
            for row, (prompt, answer) in enumerate(demo_texts(count, seed=5))
        ]
        data = tmp_path / "judged.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        changed = {**COMMON, "data": {"path": str(data), "held_out": 0.3}, **settings}
        return Run("kto", tmp_path / "runs" / "kto" / "only", base, changed)

    return make


def test_it_learns_to_tell_good_from_bad(stage):
    """90 good answers and 30 bad ones: after 60 steps held-out good answers gained more than held-out bad ones. Both
    classes weigh the same: 1 / (2 * share)."""
    result = stage(30, 120, max_steps=60, batch_size=8, optim={"lr": 1e-3})().metrics
    assert result["auc"] > 0.95
    assert result["good_log_ratio"] > result["bad_log_ratio"]
    share = result["rows"] / 2 / result["good_weight"]  # the number of good rows
    assert result["bad_weight"] == pytest.approx(result["rows"] / 2 / (result["rows"] - share))
    assert result["bad_weight"] > 1 > result["good_weight"]


def test_weights_can_be_set(stage):
    """Without the balance they are what the recipe says."""
    plain = stage(max_steps=1, balance=False, good_weight=2.0)().metrics
    assert (plain["good_weight"], plain["bad_weight"]) == (2.0, 1.0)


@pytest.mark.parametrize(("num_bad", "missing"), [(0, "bad"), (40, "good")])
def test_answers_of_one_kind_are_refused(stage, num_bad, missing):
    """There is no difference to learn from."""
    with pytest.raises(DataError, match=rf"kto: none of \d+ answers is {missing}"):
        stage(num_bad)()


@pytest.mark.parametrize(
    ("settings", "key"), [({"batch_size": 1}, "batch_size"), ({"micro_batch_size": 1}, "micro_batch_size")]
)
def test_a_kl_of_one_answer_is_refused(settings, key):
    with pytest.raises(ValidationError, match="the KL is estimated on the answers of a micro-batch") as caught:
        Config.model_validate(settings)
    assert caught.value.errors()[0]["loc"] == (key,)


def test_no_gradient_goes_through_the_kl(stage, monkeypatch):
    """The mismatched half of every batch is passed without a graph, and the matched half with one."""
    graphs: list[bool] = []
    forward = JudgementTrainer._forward

    def watched(self, model, batch, rows):
        outputs = forward(self, model, batch, rows)
        graphs.append(outputs.log_probs.requires_grad)
        return outputs

    monkeypatch.setattr(JudgementTrainer, "_forward", watched)
    stage(max_steps=1)()
    assert graphs == [True, False, False]  # matched, mismatched, reference of both


def test_metrics(stage):
    """Means over good and over bad rows, and the KL that both are measured from."""
    run = stage(max_steps=3)
    run()
    names = {f"{group}/{kind}" for group in ("rewards", "logps", "log_ratios") for kind in ("good", "bad")}
    logged = set().union(*run.metrics())
    assert {*names, "kl", "entropy", "loss", "grad_norm"} <= logged
    assert all(row["kl"] >= 0 for row in run.metrics())
    assert torch.isfinite(torch.tensor([row["loss"] for row in run.metrics()])).all()
    assert not Path(run.directory / "rejected.jsonl").exists()
