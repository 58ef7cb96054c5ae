"""What dpo and kto share: policy and reference agree at the start, the reference never moves and may be on disk, and a
step's loss is a mean over its rows however it is cut."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from align.errors import Interrupted
from align.evaluation.likelihood import response_logprob_sums
from align.models.opened import open_policy
from align.models.roles import causal_role
from align.training.reference import FOLDER, read_logprobs, write_logprobs
from tests.stages.harness import LORA, Run, stop_after, weights_hash

ROUNDING = 1e-4
"""Nats: two passes over one response in batches of another shape."""

REWARDS = {"dpo": ("rewards/chosen", "rewards/rejected"), "kto": ("rewards/good", "rewards/bad")}


@pytest.fixture
def stage(new_run, tmp_path):
    """Makes a run `runs/<kind>/<name>` of a kind of stage, as the pipeline lays folders out."""

    def make(kind: str, name: str = "first", **settings: Any) -> Run:
        return new_run(kind, tmp_path / "runs" / kind / name, **settings)

    return make


def cache_of(run: Run) -> Path:
    (file,) = (run.directory.parents[1] / FOLDER).iterdir()
    return file


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_are_exactly_0_at_first(kind, lora, finished):
    """Before the first update policy and reference are the same numbers, so every log-ratio is 0 to the last bit; later
    they are not."""
    run, _ = finished(kind, lora)
    first, last = run.metrics()[0], run.metrics()[-1]
    assert [first[name] for name in REWARDS[kind]] == [0, 0]
    assert all(abs(last[name]) > 1e-3 for name in REWARDS[kind])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", REWARDS)
def test_a_precomputed_reference_is_the_reference(kind, lora, finished, stage):
    """The whole course of a run, and its final KL, are those of the run that computes the reference on the way, up to
    rounding."""
    straight, result = finished(kind, lora)
    run = stage(kind, precompute_reference=True, **(LORA if lora else {}))
    metrics = run().metrics
    assert all(abs(run.metrics()[0][name]) < ROUNDING for name in REWARDS[kind])
    for ours, theirs in zip(run.metrics(), straight.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert metrics["kl"] == pytest.approx(result.metrics["kl"], rel=1e-2, abs=1e-2)


def test_the_cache_holds_the_sums_of_the_responses(stage, base):
    """One pair of numbers for each row, in order: log-probabilities under the start policy, recomputed here."""
    run = stage("dpo", precompute_reference=True, max_steps=1)
    run = run.at(run.directory, settings={**run.settings, "data": {**run.settings["data"], "held_out": 0.0}})
    run()
    opened = open_policy(base, "auto")
    rows = [json.loads(line) for line in Path(run.settings["data"]["path"]).read_text().splitlines()]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    stored = read_logprobs(cache_of(run))
    for column, side in enumerate(("chosen", "rejected")):
        sums = response_logprob_sums(
            causal_role(opened.model),
            [opened.renderer.prompt(messages) for messages in asked],
            [opened.renderer.response(messages, row[side]) for messages, row in zip(asked, rows, strict=True)],
            opened.renderer.pad_id,
        )
        assert stored[:, column].tolist() == pytest.approx(sums, abs=ROUNDING)


def test_a_second_run_reads_the_cache(stage):
    """Another stage folder with another beta: the values come from the file, as is seen by falsifying it: every
    reference log-probability 7 lower makes every log-ratio 7 higher at the start."""
    first = stage("dpo", precompute_reference=True, max_steps=1)
    first()
    written = cache_of(first)
    write_logprobs(written, read_logprobs(written) - 7)
    second = stage("dpo", "second", precompute_reference=True, max_steps=1, beta=0.5)
    second()
    assert cache_of(second) == written
    assert second.metrics()[0]["log_ratios/chosen"] == pytest.approx(7, abs=ROUNDING)


def test_a_damaged_cache_is_computed_again(stage):
    """One bit flipped: the file is not believed, and is whole afterwards."""
    first = stage("dpo", precompute_reference=True, max_steps=1)
    first()
    written = cache_of(first)
    whole = written.read_bytes()
    written.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    second = stage("dpo", "second", precompute_reference=True, max_steps=1)
    second()
    assert written.read_bytes() == whole
    assert second.metrics()[0]["log_ratios/chosen"] == pytest.approx(0, abs=ROUNDING)


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", REWARDS)
def test_a_resumed_run_has_the_reference_that_it_began_with(kind, settings, stage):
    """Precomputed, stopped and resumed: the file is that of the start, and metrics and weights are those of the run
    that was left alone. (Computed on the way: tests/stages/test_resume.py.)"""
    straight, resumed = (stage(kind, name, precompute_reference=True, **settings) for name in ("a", "b"))
    straight()
    written = cache_of(straight).stat().st_mtime_ns
    with pytest.raises(Interrupted):
        resumed(stop_after(2))
    resumed()
    assert cache_of(resumed).stat().st_mtime_ns == written
    assert weights_hash(resumed.model) == weights_hash(straight.model)
    assert resumed.metrics() == straight.metrics()


def num_models() -> int:
    gc.collect()
    return sum(isinstance(one, PreTrainedModel) and hasattr(one, "lm_head") for one in gc.get_objects())


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("dpo", {}, 2),
        ("dpo", {"precompute_reference": True}, 1),
        ("dpo", LORA, 1),
        ("dpo", {"loss": "simpo"}, 1),
        ("dpo", {"loss": "orpo"}, 1),
        ("dpo", {"loss": "cpo"}, 1),
        ("kto", {}, 2),
        ("kto", {"precompute_reference": True}, 1),
    ],
)
def test_models_in_memory_while_training(kind, settings, expected, stage):
    """The policy; the reference only where it is needed at every step."""
    before, during = num_models(), []
    stage(kind, max_steps=1, **settings)(lambda *_: during.append(num_models() - before))
    assert during == [expected]


@pytest.mark.parametrize(("kind", "settings"), [("dpo", {"loss": "simpo"}), ("dpo", {"loss": "orpo"})])
def test_no_kl_without_a_reference(kind, settings, stage):
    """What is reported is what the loss knows: no reference, no KL."""
    metrics = stage(kind, max_steps=2, **settings)().metrics
    assert {"accuracy", "pairs", "eos_rate"} <= metrics.keys()
    assert not {"kl", "chosen_log_ratio"} & metrics.keys()


@pytest.mark.parametrize("loss", ["simpo", "cpo"])
def test_a_step_is_a_mean_over_its_rows(loss, stage):
    """19 rows in one step, whole or in micro-batches of 8, 8 and 3: one loss and one gradient. A mean of the means of
    the micro-batches would let the last three rows count nearly three times."""
    whole, cut = (
        stage("dpo", str(size), loss=loss, batch_size=24, micro_batch_size=size, max_steps=1) for size in (24, 8)
    )
    whole()
    cut()
    for name in ("loss", "grad_norm", "rewards/chosen", "logps/rejected", "entropy"):
        assert cut.metrics()[0][name] == pytest.approx(whole.metrics()[0][name], rel=1e-4)


def test_displaced_answers_are_told(stage, capfd):
    """A learning rate that drives both answers down: a line says so."""
    metrics = stage("dpo", optim={"lr": 0.3, "schedule": "constant"}, beta=1.0)().metrics
    told = "chosen answers became less likely too" in " ".join(capfd.readouterr().err.split())
    assert told == (metrics["chosen_log_ratio"] < -0.5)
    assert told


def test_label_smoothing_reaches_the_training(stage, finished):
    """The same run with smoothed labels ends elsewhere."""
    straight, _ = finished("dpo")
    smoothed = stage("dpo", label_smoothing=0.3)
    smoothed()
    assert smoothed.metrics()[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert smoothed.metrics()[-1]["loss"] != straight.metrics()[-1]["loss"]
    assert weights_hash(smoothed.model) != weights_hash(straight.model)


def test_gradient_checkpointing_changes_nothing(stage, finished):
    """Activations computed twice, with the reference in between: the same run up to rounding."""
    straight, _ = finished("dpo", lora=True)
    run = stage("dpo", gradient_checkpointing=True, **LORA)
    run()
    for ours, theirs in zip(run.metrics(), straight.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert torch.isfinite(torch.tensor([row["grad_norm"] for row in run.metrics()])).all()
