"""ppo, rloo and grpo as whole stages, in every arrangement of models: from committed inputs to a committed policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.context import Context
from align.errors import ConfigError, DataError
from align.job import Input, StageResult
from align.models.opened import open_policy
from align.recipe.data_settings import DataSettings, Role
from align.records import read_manifest
from align.training.rows import load_rows
from stages import load_specs
from stages.ppo.layout import describe
from stages.ppo.models import open_models
from stages.ppo.run import run, training_questions
from stages.ppo.settings import KLSettings, MissingEosSettings
from tests.models.tiny import FOR_VLLM, new_opened, save_policy
from tests.stages.harness import LORA, new_context

NF4: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8, "quantise": "nf4"}}
OPTIM = {"lr": 1e-2, "eps": 1e-5}
SMALL: dict[str, Any] = {
    "rollouts": 3,
    "rollout": {"prompts": 4, "responses_per_prompt": 2, "max_response_tokens": 6, "engine": "transformers"},
    "epochs": 2,
    "micro_batch_size": 4,
    "optim": OPTIM,
    "missing_eos": {"rule": "off"},  # the tiny policy never ends: by the default rule all its responses would be alike
}
CRITIC = {"critic": {"optim": OPTIM}}
VLLM = {"rollout": {**SMALL["rollout"], "engine": "vllm", "kv_cache_bytes": 2**24}}
FUNCTIONS = {
    "model": {"weight": 0.5},
    "brevity": {"function": "tests.stages.reward_functions:brevity"},
    "steps": {"function": "tests.stages.reward_functions:steps", "weight": 2.0},
}
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "four models": ("ppo", CRITIC, 4),
    "reward on the reference": ("ppo", {**CRITIC, "reward_lora": LORA}, 3),
    "one base": ("ppo", {**CRITIC, **LORA, "reward_lora": LORA}, 1),
    "one base, a reward of its own": ("ppo", {**CRITIC, **LORA}, 2),
    "one base in nf4": ("ppo", {**CRITIC, **NF4, "reward_lora": NF4}, 1),
    "a head on the actor": ("ppo", {"critic": {"kind": "shared-head", "optim": OPTIM}}, 3),
    "adapters and a head on the actor": (
        "ppo",
        {"critic": {"kind": "shared-head", "optim": OPTIM}, **LORA, "reward_lora": LORA},
        1,
    ),
    "rloo": ("rloo", {}, 3),
    "grpo, one base": ("grpo", {**LORA, "reward_lora": LORA}, 1),
    "Dr. GRPO": ("grpo", {"divide_by_std": False, "normaliser": "constant"}, 3),
    "reinforce++": ("ppo", {"estimator": "reinforce++"}, 3),
    "terms": ("rloo", {"reward": FUNCTIONS}, 3),
    "functions only": ("ppo", {**CRITIC, "reward": {"brevity": FUNCTIONS["brevity"]}}, 3),
    "an ensemble on one base": ("rloo", {**LORA, "reward": ["a", "b"], "reward_lora": LORA}, 1),
    "four models and vllm": ("ppo", {**CRITIC, **VLLM}, 4),
    "adapters and vllm": ("ppo", {**CRITIC, **LORA, **VLLM}, 2),
    "adapters on nf4 and vllm": ("ppo", {**CRITIC, **NF4, **VLLM}, 2),
    "rloo and a vllm server": ("rloo", {"rollout": {**VLLM["rollout"], "engine": "vllm-server"}}, 3),
    "grpo and a vllm server ahead": (
        "grpo",
        {"rollout": {**VLLM["rollout"], "engine": "vllm-server", "overlap": True}},
        3,
    ),
    "average and vllm": ("rloo", {"ema": 0.9, **VLLM}, 3),
    "average and demonstrations": ("rloo", {"ema": 0.9, "ptx": {"batch_size": 4}}, 3),
    "rules": (
        "ppo",
        {
            **CRITIC,
            "missing_eos": {"rule": "bootstrap"},
            "overlong": {"buffer": 3},
            "lam_length": 0.5,
            "lam_value": 1.0,
            "clip": {"policy_high": 0.28, "dual": 3.0, "approxkl": 100.0},
            "kl": {"target": 1.0},
            "micro_batch_tokens": 64,
        },
        4,
    ),
}


@pytest.fixture(scope="session")
def new_job(base: Input, files, finished, new_run, tmp_path_factory):
    """Makes the configuration and the context of a variant in a folder."""
    quantised = []
    wide = save_policy(new_opened(config=FOR_VLLM), tmp_path_factory.mktemp("wide") / "model")

    def reward_of(settings: dict[str, Any] | None) -> Input:
        if settings is NF4 and not quantised:
            quantised.append(new_run("reward", tmp_path_factory.mktemp("reward"), **NF4))
            quantised[0]()
        made = quantised[0] if settings is NF4 else finished("reward", lora=settings is not None)[0]
        lora = (settings or {}).get("lora")
        adapter_of = base.fingerprint if lora else None
        return replace(made.output(), adapter_of=adapter_of, quantise=(lora or {}).get("quantise"))

    def make(variant: str, directory: Path) -> tuple[Any, Context]:
        kind, changes, _ = VARIANTS[variant]
        reward = reward_of(changes.get("reward_lora"))
        settings = {**SMALL, **{name: value for name, value in changes.items() if name != "reward_lora"}}
        settings["data"] = {"path": files["sft"], "held_out": 0.2}
        if "ptx" in settings:
            settings["ptx"] = {**settings["ptx"], "data": settings["data"]}
        config = load_specs()[kind].config.model_validate(settings)
        policy = base if config.rollout.engine == "transformers" else wide
        inputs = {"policy": policy, "reference": policy, **dict.fromkeys(config.sources("reward"), reward)}
        return config, new_context(kind, directory, inputs, settings)

    return make


@pytest.fixture(scope="module")
def trained(new_job, tmp_path_factory):
    """Gives a variant to the end, once."""
    known: dict[str, tuple[Any, Context, StageResult]] = {}

    def get(variant: str) -> tuple[Any, Context, StageResult]:
        if variant not in known:
            config, context = new_job(variant, tmp_path_factory.mktemp("stage"))
            known[variant] = (config, context, run(config, context))
        return known[variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stage_learns_and_hands_over(variant, trained):
    """Every rollout is reported, the KL starts at exactly 0 and moves, the saved policy is the trained one and another
    than the one before."""
    config, context, result = trained(variant)
    rows = context.metrics.read()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert abs(rows[0]["objective/kl"]) < 1e-5
    assert rows[-1]["objective/kl"] != 0
    assert ("loss/value_avg" in rows[-1]) is config.has_critic
    assert result.handover["largest_difference"] <= result.handover["bound"]
    assert result.metrics["optimiser_steps"] == 3 * config.epochs * config.minibatches
    read_manifest(context.model_directory, hashes=True)
    saved = AutoModelForCausalLM.from_pretrained(context.model_directory).state_dict()
    before = AutoModelForCausalLM.from_pretrained(context.input("policy").path).state_dict()
    assert any(not torch.equal(saved[name], before[name]) for name in before)
    assert (context.model_directory / "adapter").is_dir() is (config.lora is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_in_memory_are_those_of_the_plan(variant, new_job, tmp_path):
    """Each set of backbone weights is loaded once: as many different bodies as the layout says."""
    config, context = new_job(variant, tmp_path)
    models = open_models(config, context, torch.device("cpu"))
    roles = [models.actor, models.reference, *(reward.role for reward in models.rewards.values())]
    roles += [models.critic] if models.critic else []
    bodies = {id(role.body) for role in roles}
    assert len(bodies) == len(describe(config, context.job.inputs)) == VARIANTS[variant][2]
    assert (models.critic is None) is not config.has_critic


ON_VLLM = [
    variant
    for variant, (_, changes, _) in VARIANTS.items()
    if changes.keys() >= VLLM.keys() and not changes["rollout"].get("overlap")
]


@pytest.mark.parametrize("variant", ON_VLLM)
def test_the_engine_samples_from_the_policy_at_every_rollout(variant, trained):
    """What vLLM says of its tokens is what the trainer says, also after updates; the correction has nothing to do."""
    for row in trained(variant)[1].metrics.read():
        assert row["samples/mismatch_max"] < 1e-4 and abs(row["samples/mismatch_kl"]) < 1e-8
        assert row["correction/weight_min"] == pytest.approx(1, abs=1e-4) == row["correction/weight_max"]


def test_a_server_samples_ahead_while_the_policy_learns(trained):
    """Each rollout but the first is one step behind, and corrected by what the server says of its tokens. How long it
    sampled and how much of that was waited for is reported."""
    rows = trained("grpo and a vllm server ahead")[1].metrics.read()
    assert [row["rollout/staleness_mean"] for row in rows] == [0, 1, 1]
    assert rows[0]["samples/mismatch_max"] < 1e-4 and rows[0]["correction/weight_max"] == pytest.approx(1, abs=1e-4)
    for row in rows[1:]:
        assert row["correction/weight_min"] < 0.999 < 1.001 < row["correction/weight_max"]
        assert {"time/rollout", "time/wait"} <= row.keys()


def test_one_base_gives_what_several_models_give(trained):
    """The reward through the shared base is that of the merged reward model, and the critic that starts from it the
    same: before anything is learned both arrangements see the same."""
    rows = [trained(variant)[1].metrics.read()[0] for variant in ("reward on the reference", "one base")]
    for name in ("objective/raw_scores", "val/response_length", "policy/entropy_avg", "val/explained_variance"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4), name


def test_terms_are_reported_apart(trained):
    """reward/<term>, before weights."""
    row = trained("terms")[1].metrics.read()[-1]
    expected = 0.5 * row["reward/model"] + row["reward/brevity"] + 2 * row["reward/steps"]
    assert row["objective/raw_scores"] == pytest.approx(expected, abs=1e-5)


def test_a_critic_without_a_reward_model_warms_up_first(new_job, tmp_path):
    """Row 59: 20 rollouts, at most a tenth of the stage, on which only the critic is trained."""
    config, context = new_job("functions only", tmp_path)
    config = config.model_copy(update={"rollouts": 10})
    run(config, context)
    rows = context.metrics.read()
    assert ["policy/approxkl_avg" in row for row in rows] == [False] + [True] * 9


def test_nothing_is_learned_from_cut_responses_that_are_left_out(new_job, base, tmp_path):
    """Row 11, at its extreme: all responses are cut, so no step is taken, and the policy is committed as it was."""
    config, context = new_job("four models", tmp_path)
    short = config.rollout.model_copy(update={"max_response_tokens": 1})
    masked = {"missing_eos": MissingEosSettings(rule="mask"), "rollout": short}
    result = run(config.model_copy(update=masked), context)
    assert result.metrics["optimiser_steps"] == 0
    saved = AutoModelForCausalLM.from_pretrained(context.model_directory).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base.path).state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_an_average_is_what_is_committed(trained, new_job, tmp_path):
    """Row 79: with a decay close to 1 the committed policy has hardly moved."""
    config, context = new_job("average and demonstrations", tmp_path)
    slow = run(config.model_copy(update={"ema": 0.999999}), context)
    last = trained("average and demonstrations")[2]
    assert abs(slow.metrics["kl"]) < 1e-3 < abs(last.metrics["kl"])


def test_long_prompts_are_left_out_and_counted(new_job, tmp_path):
    """Row 16: a prompt over max_prompt_tokens is not cut; a limit that leaves none is an error."""
    config, context = new_job("rloo", tmp_path)
    opened = open_policy(context.input("policy"), "auto")
    prompts = load_rows(config.data, Role.PROMPTS, context).train
    questions, too_long = training_questions(opened, prompts, config)
    lengths = sorted(len(question.ids) for question in questions)
    assert (too_long, lengths[0] < lengths[-1]) == (0, True)
    limited = config.model_copy(update={"max_prompt_tokens": lengths[-1] - 1})
    kept, left_out = training_questions(opened, prompts, limited)
    assert len(kept) + left_out == len(questions)
    assert left_out == lengths.count(lengths[-1])
    with pytest.raises(DataError, match="has at most 1 tokens"):
        training_questions(opened, prompts, config.model_copy(update={"max_prompt_tokens": 1}))


def test_demonstrations_may_not_hold_what_is_measured_on(new_job, files, tmp_path):
    """Prompts held out of `data` that PPO-ptx would train on are an error, not a better score."""
    config, context = new_job("average and demonstrations", tmp_path)
    everything = DataSettings(path=files["sft"], held_out=0.0)
    leaking = config.model_copy(update={"ptx": config.ptx.model_copy(update={"data": everything})})
    with pytest.raises(DataError, match="also trained on"):
        run(leaking, context)


def test_a_budget_that_is_spent_at_once_is_an_error(new_job, tmp_path):
    """A policy that starts further from its reference than the budget allows would be committed untrained."""
    config, context = new_job("four models", tmp_path)
    other = save_policy(new_opened(seed=9), tmp_path / "other")
    context.job.inputs["reference"] = replace(other, fingerprint="1" * 64)
    spent = config.model_copy(update={"kl": KLSettings(budget=1e-6)})
    with pytest.raises(ConfigError, match=r"above kl\.budget 1e-06; raise it"):
        run(spent, context)
