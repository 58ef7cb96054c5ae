"""Stages in bfloat16 and float16, and AdamW in 8 bits, for real on a CPU: what is held in float32, how far results
are from float32, what an overflow does, and an exact resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.errors import NumericError
from align.models.opened import open_policy
from align.training.checkpoints import newest_valid
from align.training.trainer import run_training, trainer_arguments
from tests.stages.harness import Run, weights_hash
from tests.stages.test_resume import Crash, crash_at
from tests.stages.test_training import make_trainer

ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}
"""Of a number, relative."""


def checkpoint(run: Run) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Weights, the optimiser's state of each weight, and the loss scale (empty without) of the newest checkpoint."""
    found = newest_valid(run.directory / "checkpoints")
    assert found is not None
    state = torch.load(found[1] / "optimizer.pt", weights_only=True)["state"]
    scaler = found[1] / "scaler.pt"
    scale = torch.load(scaler, weights_only=True) if scaler.exists() else {}
    return load_file(found[1] / "model.safetensors"), list(state.values()), scale


@pytest.mark.parametrize("precision", ROUNDING)
def test_weights_and_moments_are_float32_and_tiny_updates_are_kept(precision, new_run, base, tmp_path):
    """Two steps of Adam at a learning rate of 1e-6 move a weight by about 2e-6. Weights from 1/16 on are 2.4e-4 apart
    or more in bfloat16 and 3e-5 in float16, so that held in either none of them would have moved."""
    run = new_run("sft", tmp_path, precision=precision, optim={"lr": 1e-6, "schedule": "constant"})
    with pytest.raises(Crash):
        run(crash_at(3))
    weights, states, _ = checkpoint(run)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {state[name].dtype for state in states for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    before = open_policy(base, "auto").model.state_dict()
    large = {name: before[name].abs() > 0.0625 for name in weights if weights[name].ndim == 2}
    moved = torch.cat([(weights[name] - before[name])[where].abs() for name, where in large.items()])
    assert 0 < float(moved.max()) < 1e-5 < 0.0625 * ROUNDING[precision] / 2
    assert float((moved > 0).float().mean()) > 0.5


@pytest.mark.parametrize(
    ("precision", "kind"), [("bfloat16", "sft"), ("float16", "sft"), ("float16", "reward"), ("float16", "dpo")]
)
def test_first_losses_are_those_of_float32(precision, kind, finished, new_run, tmp_path):
    """The first loss before any step: within ten roundings, and not the same number, so it was computed in less."""
    straight, _ = finished(kind)
    run = new_run(kind, tmp_path, precision=precision, max_steps=1)
    run()
    ours, theirs = run.metrics()[0], straight.metrics()[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=10 * ROUNDING[precision], abs=10 * ROUNDING[precision])
    assert ours["grad_norm"] != theirs["grad_norm"]
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=30 * ROUNDING[precision])


@pytest.mark.parametrize("settings", [{"precision": "float16"}, {"optim": {"kind": "adamw-8bit", "lr": 1e-2}}])
def test_resume_equals_a_straight_run(settings, new_run, tmp_path):
    """The loss scale, and moments as uint8, come back from a checkpoint."""
    straight, resumed = new_run("sft", tmp_path / "a", **settings), new_run("sft", tmp_path / "b", **settings)
    straight()
    with pytest.raises(Crash):
        resumed(crash_at(5))
    _, states, scale = checkpoint(resumed)
    assert bool(scale) == ("precision" in settings)
    assert any(value.dtype is torch.uint8 for state in states for value in flat(state)) == ("optim" in settings)
    resumed()
    assert weights_hash(resumed.model) == weights_hash(straight.model)
    assert resumed.metrics() == straight.metrics()


def flat(state: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of a state, those of a quantised one included."""
    inside = [value for value in state.values() if isinstance(value, dict)]
    return [value for part in (state, *inside) for value in part.values() if isinstance(value, torch.Tensor)]


def overflowing(run: Run, is_bad: Callable[[int], bool]) -> tuple[Any, Any, dict[int, torch.Tensor]]:
    """The SFT trainer and its context, with a gradient that overflows at some steps; and a weight after each step, as
    the trainer goes on."""
    trainer, model, context = make_trainer(run)
    weight, after = model.model.norm.weight, {}

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        step = trainer.state.global_step
        after[step] = weight.detach().clone()
        return gradient * (float("inf") if is_bad(step) else 1.0)

    weight.register_hook(hook)
    return trainer, context, after


def test_an_overflow_is_no_step_and_halves_the_scale(new_run, tmp_path):
    """The third of six steps is left out, the fourth is not; the scale starts at 2^16."""
    trainer, context, after = overflowing(new_run("sft", tmp_path, precision="float16"), lambda done: done == 2)
    run_training(trainer, context, keep_checkpoints=2, shown={})
    assert torch.equal(after[2], after[3])
    assert not torch.equal(after[1], after[2]) and not torch.equal(after[3], after[4])
    assert trainer.accelerator.scaler.get_scale() == 2**15
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


def test_gradients_that_overflow_at_any_scale_end_the_run(new_run, tmp_path):
    """Sixteen halvings take the scale to 1; the seventeenth overflow is the gradients' own."""
    run = new_run("sft", tmp_path, precision="float16", max_steps=20, checkpoint={"every_steps": 20})
    trainer, context, after = overflowing(run, lambda done: True)
    with pytest.raises(NumericError, match="the gradient norm is inf at step 17; nothing was saved"):
        run_training(trainer, context, keep_checkpoints=2, shown={})
    assert torch.equal(after[0], after[16])


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_reaches_torch(allowed, new_run, tmp_path):
    """It is said in both cases: torch's own default differs between products and convolutions."""
    run = new_run("sft", tmp_path, tf32=allowed)
    trainer_arguments(run.config(), run.context(), run.config().optim, 24)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
