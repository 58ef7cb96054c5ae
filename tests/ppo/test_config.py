"""Settings that contradict each other are refused, each with its key."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stages.dpo.config import Config as DpoConfig
from stages.ppo.config import Config, GrpoConfig, RlooConfig

LORA = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    ("config", "given", "key", "what"),
    [
        (Config, {"rollout": {"prompts": 5}, "minibatches": 2}, "minibatches", "5 responses per rollout"),
        (Config, {"rollout": {"round_tokens": 100}}, "rollout.round_tokens", "256 is not two or more times 100"),
        (Config, {"rollout": {"round_tokens": 256}}, "rollout.round_tokens", "choose a part of it"),
        (Config, {"rollout": {"max_staleness": 2}}, "rollout.max_staleness", "without rollout.round_tokens"),
        (Config, {"rollout": {"until_ended": 0.9}}, "rollout.until_ended", "without rollout.round_tokens"),
        (
            Config,
            {"rollout": {"round_tokens": 64, "until_ended": 1}},
            "rollout.until_ended",
            "waits for every response",
        ),
        (
            Config,
            {"rollout": {"round_tokens": 64, "max_staleness": 3}},
            "rollout.max_staleness",
            "within 4 rollouts, so the oldest token is at most 3 old",
        ),
        (Config, {"rollout": {"tensor_parallel": 2}}, "rollout.tensor_parallel", "engine auto computes on one device"),
        (Config, {"rollout": {"overlap": True}}, "rollout.overlap", "auto samples in the trainer's process"),
        (
            RlooConfig,
            {"rollout": {"prompts": 8, "responses_per_prompt": 2, "engine": "vllm", "overlap": True}},
            "rollout.overlap",
            "needs rollout.engine: vllm-server",
        ),
        (
            Config,
            {"rollout": {"round_tokens": 64, "correction": "off"}},
            "rollout.correction",
            "older policies' tokens",
        ),
        (Config, {"overlong": {"buffer": 300}}, "overlong.buffer", "max_response_tokens 256"),
        (Config, {"critic": {"kind": "adapter"}}, "critic.kind", "needs `lora`"),
        (Config, {"lora": {**LORA, "dropout": 0.1}}, "lora.dropout", "agree before the first step"),
        (Config, {"kl": {"coef": 0, "target": 6}}, "kl.target", "that of 0 stays 0"),
        (Config, {"kl": {"target": 6, "horizon": 100}}, "kl.horizon", "512 responses per rollout"),
        (Config, {"reward": {}}, "reward", "nothing to maximise"),
        (Config, {"reward": {"policy": {}}}, "reward.policy", "name of another input"),
        (Config, {"reward": {"a.b": {}}}, "reward.a.b", "letters, digits"),
        (Config, {"estimator": "rloo"}, "rollout.responses_per_prompt", "2 or more"),
        (RlooConfig, {"lam": 0.5}, "lam", "rloo has no critic"),
        (GrpoConfig, {"critic": {"warmup_rollouts": 3}}, "critic", "grpo has no critic"),
        (
            Config,
            {"estimator": "reinforce++", "missing_eos": {"rule": "bootstrap"}},
            "missing_eos.rule",
            "needs a critic",
        ),
        (DpoConfig, {"lora": {**LORA, "dropout": 0.1}}, "lora.dropout", "must agree before the first step"),
    ],
)
def test_contradictions_are_refused(config, given, key, what):
    with pytest.raises(ValidationError) as caught:
        config.model_validate(given)
    assert [(".".join(map(str, error["loc"])), what in error["msg"]) for error in caught.value.errors()] == [
        (key, True)
    ]


@pytest.mark.parametrize(
    "rollout",
    [
        {"round_tokens": 64, "max_staleness": 2, "until_ended": 0.8},
        {"engine": "vllm-server", "overlap": True},
        {"engine": "vllm-server", "overlap": True, "round_tokens": 128},
    ],
)
def test_responses_may_outlive_their_rollout(rollout):
    """Carried over, sampled ahead, or both."""
    found = Config.model_validate({"rollout": rollout}).rollout
    assert {name: getattr(found, name) for name in rollout} == rollout


@pytest.mark.parametrize("config", [Config, RlooConfig, GrpoConfig, DpoConfig])
def test_defaults_are_accepted(config):
    assert config.model_validate(config().model_dump(mode="json")) == config()


@pytest.mark.parametrize(
    ("config", "given", "key"),
    [
        (RlooConfig, {"divide_by_std": False}, "divide_by_std"),
        (Config, {"critic": {"coef": 0.5}}, "critic.coef"),
        (Config, {"kl": {"horizon": 99_000}}, "kl.horizon"),
        (Config, {"missing_eos": {"rule": "off", "value": -2}}, "missing_eos.value"),
        (Config, {"missing_eos": {"rule": "mask", "value": -2}}, "missing_eos.value"),
    ],
)
def test_settings_without_an_effect_are_refused(config, given, key):
    """They would change the fingerprint and nothing else, and whoever wrote them wanted something."""
    with pytest.raises(ValidationError, match="has no effect without") as caught:
        config.model_validate(given)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [key]


def test_a_kl_in_the_loss_and_whitening_are_refused_together():
    """Row 33's relative: the spread would multiply beta. A bandit at beta 1 then rests .22 from its optimum."""
    with pytest.raises(ValidationError, match="set whiten_advantages: false"):
        Config.model_validate({"kl": {"estimator": "k2"}})
    Config.model_validate({"kl": {"estimator": "k2"}, "whiten_advantages": False})


def test_a_policy_that_would_never_be_trained_is_refused():
    with pytest.raises(ValidationError, match="never be trained"):
        Config.model_validate({"rollouts": 20, "critic": {"warmup_rollouts": 20}})


def test_combining_one_model_is_refused():
    with pytest.raises(ValidationError, match="for an ensemble"):
        Config.model_validate({"reward": {"only": {"model": "reward", "combine": "min"}}})
