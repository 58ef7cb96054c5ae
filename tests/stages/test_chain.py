"""What one stage leaves and the next one finds: nothing is lost on the way, adapters and heads least of all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.data.load import load
from align.data.rows import Prompt
from align.errors import DataError
from align.evaluation.likelihood import response_logprob_sums
from align.evaluation.policy import evaluate_policy
from align.generation.transformers_engine import TransformersEngine
from align.models.handover import BOUNDS, probe_values
from align.models.opened import open_policy, open_reward
from align.models.reward import score_sequences
from align.models.roles import causal_role, reward_role
from align.models.value import critic_from_reward
from align.recipe.data_settings import Role
from align.recipe.engine_settings import EvaluationSettings
from align.records import read_manifest
from tests.models.tiny import probes
from tests.stages.harness import LORA

TINY_STEP = {"optim": {"lr": 1e-12}, "max_steps": 1}
"""A stage that ends where it starts."""
ROUNDING = 1e-3


def policy_values(source) -> list[float]:
    opened = open_policy(source, "auto")
    return probe_values(opened.model, probes(opened.renderer), is_reward=False)


def hidden_states(model, rows) -> torch.Tensor:
    """Last hidden state of each row's last token: what a backbone computes, whatever the head."""
    with torch.no_grad():
        return torch.stack([model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_a_finished_stage_is_committed_and_checked(kind, lora, finished):
    """The artifact verifies byte for byte, loads with every check, and what the hand-over check found is reported
    and far below its bound."""
    run, result = finished(kind, lora)
    names = set(read_manifest(run.model, hashes=True)["files"])
    assert ("adapter/adapter_model.safetensors" in names) is lora
    assert result.handover["largest_difference"] < BOUNDS[torch.float32] / 5
    assert (open_reward if kind == "reward" else open_policy)(run.output(), "auto")


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_the_kept_adapter_on_the_base_is_the_saved_model(kind, finished, base):
    """peft alone, on the stage's start model, gives what the merged model gives: nothing was trained outside it."""
    run, _ = finished(kind, lora=True)
    is_reward = kind == "reward"
    auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    extra = {"num_labels": 1} if is_reward else {}
    plain = auto_class.from_pretrained(run.model)
    on_base = PeftModel.from_pretrained(auto_class.from_pretrained(base.path, **extra), str(run.model / "adapter"))
    on_base.config.reward_offset = getattr(plain.config, "reward_offset", 0.0)
    rows = json.loads((run.model / "probes.json").read_text())["probes"]
    values = probe_values(on_base, rows, is_reward=is_reward)
    assert values == pytest.approx(probe_values(plain, rows, is_reward=is_reward), abs=ROUNDING)


def test_regression_dropped_sft_adapter_in_dpo(finished, new_run, base, tmp_path):
    """The field's second most repeated bug: after SFT with LoRA, DPO starts from the base. Here it starts from the
    effective SFT model, and its frozen reference is that model too (loss ln 2, KL 0)."""
    sft, _ = finished("sft", lora=True)
    dpo = new_run("dpo", tmp_path, **TINY_STEP).at(tmp_path, policy=sft.output())
    result = dpo()
    at_sft, at_base, at_start = policy_values(sft.output()), policy_values(base), policy_values(dpo.output())
    assert at_start == pytest.approx(at_sft, abs=ROUNDING)
    assert max(abs(a - b) for a, b in zip(at_start, at_base, strict=True)) > 1
    assert dpo.metrics()[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result.metrics["kl"] == pytest.approx(0, abs=ROUNDING)


def test_regression_dropped_sft_adapter_in_reward(finished, new_run, base, tmp_path):
    """The same for the reward model: with a new head, its backbone computes what the effective SFT model's does, and
    not what the base's does."""
    sft, _ = finished("sft", lora=True)
    reward = new_run("reward", tmp_path, **TINY_STEP).at(tmp_path, policy=sft.output())
    reward()
    opened = open_reward(reward.output(), "auto")
    rows = probes(opened.renderer)
    ours = hidden_states(opened.model, rows)
    torch.testing.assert_close(ours, hidden_states(open_policy(sft.output(), "auto").model, rows), rtol=0, atol=1e-4)
    assert float((ours - hidden_states(open_policy(base, "auto").model, rows)).abs().max()) > 0.1


def test_regression_lost_reward_head(finished):
    """The field's most repeated bug: a reward model trained with LoRA reaches PPO with a random head. Loaded as PPO
    loads it, as scorer and as the critic's start, it has the trained head and gives the scores of the training."""
    run, result = finished("reward", lora=True)
    scorer = open_reward(run.output(), "auto")
    adapter = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(run.policy.path, num_labels=1), str(run.model / "adapter")
    )
    trained_head = adapter.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(scorer.model.score.weight, trained_head)
    stored = json.loads((run.model / "probes.json").read_text())
    with torch.no_grad():
        scores = score_sequences(reward_role(scorer.model), stored["probes"], scorer.renderer.pad_id)
    assert scores.tolist() == pytest.approx(stored["values"], abs=ROUNDING)
    critic = critic_from_reward(run.output(), scorer.tokenizer, torch.float32)
    with torch.no_grad():
        value = float(score_sequences(critic, stored["probes"][:1], scorer.renderer.pad_id))
    assert value == pytest.approx(stored["values"][0], abs=ROUNDING)
    assert result.metrics["accuracy"] == 1.0  # polite from rude, on pairs it was not trained on


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reward_is_normalised_where_it_was_measured(lora, finished):
    """RMn on the stage's own reference samples: |mean| < 0.02, |std - 1| < 0.02, although the raw scores had
    neither; and the offset is in config.json."""
    run, result = finished("reward", lora)
    assert abs(result.metrics["reference_mean"]) < 0.02
    assert abs(result.metrics["reference_std"] - 1) < 0.02
    raw_mean, raw_std = result.metrics["raw_mean"], result.metrics["raw_std"]
    assert abs(raw_mean) > 0.02 or abs(raw_std - 1) > 0.02
    config = json.loads((run.model / "config.json").read_text())
    assert config["reward_offset"] == pytest.approx(-raw_mean / raw_std, rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_begins_at_ln_2_and_its_reference_never_moves(lora, finished, base):
    """Policy and reference are equal at the first step: loss ln 2 exactly, margins 0. At the end the reported KL is
    that of the trained policy against the untouched start, recomputed here from the two folders."""
    run, result = finished("dpo", lora)
    first = run.metrics()[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    trained, start = open_policy(run.output(), "auto"), open_policy(base, "auto")
    held_out = load(run.config().data, Role.PREFERENCES).held_out
    metrics, _ = evaluate_policy(
        TransformersEngine(trained.model),
        causal_role(trained.model),
        trained.renderer,
        [Prompt(row.prompt, row.source) for row in held_out],
        EvaluationSettings.model_validate(run.context().job.evaluation),
        seed=run.context().seed("evaluation"),
        reference=causal_role(start.model),
    )
    assert abs(metrics["kl"]) > 0.1
    assert result.metrics["kl"] == pytest.approx(metrics["kl"], abs=ROUNDING)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_bfloat16_training_hands_over_too(kind, lora, new_run, tmp_path):
    """Mixed precision wraps the model's forward in a rounding one, and it stays there after training: measured
    through it, every saved model would seem to differ from what was trained. (The trainer's bf16 also runs on CPU.)"""
    settings = {"trainer_args": {"bf16": True}, "max_steps": 2, **(LORA if lora else {})}
    run = new_run(kind, tmp_path, **settings)
    assert run().handover["largest_difference"] < BOUNDS[torch.float32] / 5


def test_dpo_rows_reach_the_loss_as_the_renderer_made_them(new_run, base, tmp_path):
    """TRL's DPO trainer renders and tokenises by itself; ours gets ids. logps/chosen of a first step over all rows is
    the mean of sums over exactly the chosen responses' tokens, end of turn included."""
    run = new_run("dpo", tmp_path, batch_size=24, max_steps=1)
    run = run.at(tmp_path, settings={**run.settings, "data": {**run.settings["data"], "held_out": 0.0}})
    run()
    opened = open_policy(base, "auto")
    rows = [json.loads(line) for line in Path(run.settings["data"]["path"]).read_text().splitlines()]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    for side in ("chosen", "rejected"):
        sums = response_logprob_sums(
            causal_role(opened.model),
            [opened.renderer.prompt(messages) for messages in asked],
            [opened.renderer.response(messages, row[side]) for messages, row in zip(asked, rows, strict=True)],
            opened.renderer.pad_id,
        )
        assert run.metrics()[0][f"logps/{side}"] == pytest.approx(sum(sums) / len(sums), rel=1e-4)


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", 0.693147), ("hinge", 1.0), ("ipo", 25.0)])
def test_dpo_losses_at_the_start(loss, expected, finished, new_run, tmp_path):
    """G: with policy equal to reference the log-ratio h is 0, so -log sigmoid(0) = ln 2, max(0, 1 - 0) = 1, and
    (0 - 1/(2 beta))^2 = 1 / (4 * 0.1^2) = 25."""
    sft, _ = finished("sft", lora=False)
    dpo = new_run("dpo", tmp_path, **TINY_STEP, loss=loss, beta=0.1).at(tmp_path, policy=sft.output())
    dpo()
    assert dpo.metrics()[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_no_stage_trains_on_a_prompt_that_policies_are_measured_on(kind, new_run, tmp_path):
    """Also when it is written with other space around it; the message names both places."""
    run = new_run(kind, tmp_path, **TINY_STEP)
    train = load(run.config().data, Role.PROMPTS).train
    measured = tmp_path / "measured.jsonl"
    measured.write_text(json.dumps({"prompt": train[0].messages[0]["content"] + " "}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"measured.jsonl:1: this evaluation prompt is also trained on, at .*jsonl:\d+"):
        replace(run, evaluation={"data": str(measured)})()
