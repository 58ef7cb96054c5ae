"""Stages with `lora: {quantise: nf4}`, end to end: a plain artifact that is what was trained, an exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.errors import ArtifactError
from align.job import StageResult
from align.models.adapters import AdaptedBase
from align.models.handover import probe_values
from align.models.opened import open_policy, open_reward
from align.recipe.training_settings import LoraSettings
from align.records import read_manifest
from tests.models.tiny import probes
from tests.stages.harness import KINDS, Run, weights_hash
from tests.stages.test_resume import Crash, crash_at

QLORA = {"lora": {"rank": 4, "alpha": 8, "quantise": "nf4"}}


@pytest.fixture(scope="module")
def quantised(new_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory):
    """Gives a QLoRA run to the end, made on first use. Read only."""

    @cache
    def get(kind: str) -> tuple[Run, StageResult]:
        run = new_run(kind, tmp_path_factory.mktemp(kind), **QLORA)
        return run, run()

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_the_artifact_is_plain_and_is_what_was_trained(kind, quantised):
    """Weights in full with no word of quantisation, loaded by the library alone; equal to the trained model within a
    fifth of the bound of float32; and what quantisation moved at the start is in the record."""
    run, result = quantised(kind)
    assert "adapter/adapter_model.safetensors" in read_manifest(run.model, hashes=True)["files"]
    assert "quantization_config" not in json.loads((run.model / "config.json").read_text())
    assert {weight.dtype for weight in load_file(run.model / "model.safetensors").values()} == {torch.float32}
    assert result.handover["bound"] == 1e-3
    assert result.handover["largest_difference"] < 2e-4
    assert 0 < result.handover["quantisation_moved"] < 0.25
    auto_class = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    stored = json.loads((run.model / "probes.json").read_text())
    values = probe_values(auto_class.from_pretrained(run.model), stored["probes"], is_reward=kind == "reward")
    assert values == pytest.approx(stored["values"], abs=1e-3)
    assert (open_reward if kind == "reward" else open_policy)(run.output(), "auto")


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_trained_in_float32(kind, quantised):
    """TRL trains the adapter of a model marked as quantised in bfloat16. Here no weight of it can be a bfloat16, and
    each step moves it: after six steps it is not what it was at the start (B = 0)."""
    run, result = quantised(kind)
    adapter = load_file(run.model / "adapter" / "adapter_model.safetensors")
    updates = [weight for name, weight in adapter.items() if "lora_B" in name]
    assert all(weight.dtype is torch.float32 and weight.any() for weight in updates)
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in adapter.values())
    assert result.metrics["trained_parameters"] == sum(weight.numel() for weight in adapter.values())


@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_a_straight_run(kind, quantised, new_run, tmp_path):
    """A checkpoint holds the adapter alone; the 4 bits are made again from the same folder, and are the same."""
    straight, _ = quantised(kind)
    run = new_run(kind, tmp_path, **QLORA)
    with pytest.raises(Crash):
        run(crash_at(3))
    assert not list((tmp_path / "checkpoints").glob("*/model.safetensors"))
    run()
    assert weights_hash(run.model) == weights_hash(straight.model)
    assert run.metrics() == straight.metrics()


def test_dpo_starts_from_the_quantised_base(quantised):
    """The reference is the base in 4 bits with the adapter off: the first loss is ln 2, the policy being the reference.
    Against the base in full it would not be."""
    run, _ = quantised("dpo")
    assert run.metrics()[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_policy_that_does_not_move_has_no_kl(new_run, tmp_path):
    """The final KL of DPO is to the quantised base too. To the base in full it would be what quantisation moved."""
    result = new_run("dpo", tmp_path, **QLORA, optim={"lr": 1e-12}, max_steps=1)()
    assert result.metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert result.handover["quantisation_moved"] > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind, quantised, new_run, tmp_path):
    """Activations computed twice, through weights decoded once more, give the same steps."""
    plain, _ = quantised(kind)
    run = new_run(kind, tmp_path, **QLORA, gradient_checkpointing=True)
    run()
    for ours, theirs in zip(run.metrics(), plain.metrics(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_bfloat16_training_hands_over_too(new_run, tmp_path):
    """Autocast around the frozen layers; what is saved is float32 and exact."""
    result = new_run("sft", tmp_path, **QLORA, trainer_args={"bf16": True})()
    assert result.handover["largest_difference"] < 2e-4


def test_reward_adapter_works_on_the_quantised_base_and_on_no_other(quantised, base):
    """One NF4 base for policy and reward: with the adapter of the reward stage on it, the scores are those of the
    reward model that was saved. On the base in full they are not, and that is found."""
    run, _ = quantised("reward")
    settings = LoraSettings(**QLORA["lora"])
    shared = AdaptedBase(open_policy(base, "auto", quantise="nf4").model, settings)
    assert shared.reward("reward", run.output())
    with pytest.raises(ArtifactError, match="differs from the model that was trained"):
        AdaptedBase(open_policy(base, "auto").model, settings).reward("reward", run.output())


def test_a_chain_of_quantised_stages(quantised, new_run, tmp_path):
    """Reward model on the policy that SFT made: the artifact is quantised afresh, and moved a little once more."""
    sft, _ = quantised("sft")
    reward = new_run("reward", tmp_path, **QLORA).at(tmp_path, policy=sft.output())
    result = reward()
    assert 0 < result.handover["quantisation_moved"] < 0.5
    opened = open_reward(reward.output(), "auto")
    assert all(math.isfinite(value) for value in probe_values(opened.model, probes(opened.renderer), is_reward=True))
