"""Parts and phases of a stage's memory, by hand for a Llama of two blocks of 1464 numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.job import Input
from align.pipeline.estimate.activations import Pass
from align.pipeline.estimate.memory import CONTEXT, PROCESS, Device, memory, trained_numbers
from align.pipeline.estimate.stage import Known
from align.pipeline.estimate.workload import Held, Lengths, Sampling, Step, Workload
from align.recipe.training_settings import LoraSettings
from stages.base.config import Config as Base
from stages.base.memory import workload as base
from stages.dpo.config import Config as Dpo
from stages.dpo.memory import workload as dpo
from stages.ppo.config import Config as Ppo
from stages.ppo.config import GrpoConfig
from stages.ppo.memory import workload as ppo
from stages.reward.config import Config as Reward
from stages.reward.memory import workload as reward
from stages.sft.config import Config as Sft
from stages.sft.memory import workload as sft
from tests.pipeline.estimate.models import TINY

N = 1464
EVALUATION = {"batch_size": 4, "prompts": 2, "max_response_tokens": 6}
POLICY = {"policy": Input("policy", "p", "1", "base")}
PPO_INPUTS = {
    "policy": POLICY["policy"],
    "reference": POLICY["policy"],
    "reward": Input("reward model", "r", "2", "reward"),
}
PAIRS = Lengths(40, [[3, 5, 2], [4, 4, 9], [30, 30, 30]])
"""Prompt, chosen and rejected; with at most 20 tokens the longest sequence has 13."""
LORA = LoraSettings(rank=3)


def test_by_hand_of_one_pass():
    """Weights 4, moments 8 and gradients 4 bytes each; 15 tokens keep 340 floats; 9 tiles of 15 * 10 floats; a block's
    four tensors of 20 are 4800 bytes, less than the tiles' 5400."""
    work = Workload([Held("trained", "policy", "all")], [Step("trained", Pass(3, 5), "fused")], [], 1, 1, 2)
    found = memory(work, {"policy": TINY})
    assert found.phases["training"] == {
        "process": PROCESS,
        "weights": 4 * N,
        "optimiser": 8 * N,
        "gradients": 4 * N,
        "copies": 0,
        "activations": 15 * 4 * 340,
        "logits": 9 * 15 * 10 * 4,
        "heap": 0,
    }
    assert found.phases["saving"]["check"] == 4 * N
    assert found.phase == "training"


def test_on_a_gpu_activations_give_way_to_gradients_and_nothing_is_checked():
    """The 5856 bytes of gradients are fewer than the activations of the same pass, unless an earlier one left them."""
    work = Workload([Held("trained", "policy", "all")], [Step("trained", Pass(3, 5), "none")], [], 1, 1, 2)
    device = Device(2**30)
    found = memory(work, {"policy": TINY}, device=device)
    assert "saving" not in found.phases
    assert found.parts["process"] == CONTEXT
    assert found.parts["gradients"] == 0
    again = replace(work, steps=[replace(work.steps[0], accumulates=True)])
    assert memory(again, {"policy": TINY}, device=device).parts["gradients"] == 4 * N


def test_after_training_weights_are_whole_but_of_ppo_only_the_policys():
    """zero3 on 2 processes in float32: a share of N / 2 numbers of each model, and N beside it where it is whole."""
    models = [Held("actor", "policy", "all"), Held("reference", "policy")]
    for bucket, numbers in ((None, 3 * N), (100, 2 * N)):
        work = Workload(models, [], [Sampling(1, 1)], 1, 1, 2, bucket=bucket)
        found = memory(work, {"policy": TINY}, strategy="zero3", processes=2, device=Device(2**30))
        assert found.phases["sampling"]["weights"] == 4 * numbers


@pytest.mark.parametrize(("moments", "in_8_bits"), [("all", N), ("layers", N - 80)])
def test_moments_in_8_bits(moments, in_8_bits):
    """Two bytes and two float32 scales for every 256, 2.03125 in all; an embedding of 80 numbers that is left out has
    8 each."""
    held = Held("trained", "policy", "all", moments_8bit=moments)
    work = Workload([held], [Step("trained", Pass(3, 5), "none")], [], 1, 1, 2)
    found = memory(work, {"policy": TINY}).phases["training"]["optimiser"]
    assert found == 2.03125 * in_8_bits + 8 * (N - in_8_bits)


def test_vllm_gets_its_share_of_a_gpu():
    sampling = Sampling(4, 10, on_vllm=True, gpu_share=0.3)
    work = Workload([Held("trained", "policy", "all")], [], [sampling], 1, 1, 2)
    assert memory(work, {"policy": TINY}, device=Device(1000)).parts["KV cache"] == 300
    fixed = replace(work, samplings=[replace(sampling, cache_bytes=77)])
    assert memory(fixed, {"policy": TINY}, device=Device(1000)).parts["KV cache"] == 77


def test_trained_numbers_of_every_way_to_train():
    """An adapter on all layers: 3 * (in + out) of 14 layers, 2 * 3 * 140; a reward model's and a critic's head has one
    row of 8."""
    adapter = 2 * 3 * (16 + 12 + 12 + 16 + 3 * 28)
    ways = {
        Held("a", "policy", "all"): N,
        Held("a", "policy", "all", has_head=False): N + 8,
        Held("a", "policy", "adapter", lora=LORA): adapter,
        Held("a", "policy", "adapter", has_head=False, lora=LORA): adapter + 8,
        Held("a", "policy", "adapter", lora=LORA, is_adapter=True): adapter + 8,
        Held("a", "policy"): 0,
    }
    assert [trained_numbers(model, TINY) for model in ways] == list(ways.values())


def test_sft_takes_the_longest_row_that_fits():
    """40 rows, 2 epochs, 8 a step: 10 steps. Rows that fit have 8 and 17 tokens, 12.5 on average."""
    work = sft(
        Sft.model_validate({"batch_size": 8, "micro_batch_size": 2, "max_length": 20, "epochs": 2}),
        POLICY,
        Lengths(40, [[8], [17], [21]]),
        1,
        EVALUATION,
    )
    assert work.steps == [Step("trained", Pass(2, 17), "fused", accumulates=True)]
    assert (work.num_steps, work.tokens) == (10, 1000)
    assert work.samplings == [Sampling(2, 23)]


def test_lengths_that_are_unknown_are_the_longest_allowed():
    work = sft(Sft(batch_size=8, max_length=20), POLICY, Lengths(), 4, EVALUATION)
    assert work.steps == [Step("trained", Pass(2, 20), "fused")]
    assert (work.num_steps, work.tokens) == (None, None)


@pytest.mark.parametrize("settings", [{"precompute_reference": True}, {"loss": "simpo"}])
def test_a_reference_that_is_not_in_memory_is_not_counted(settings):
    work = dpo(Dpo(batch_size=8, max_length=20, **settings), POLICY, PAIRS, 1, EVALUATION)
    assert [one.role for one in work.models] == ["trained"]


@pytest.mark.parametrize(("lora", "roles"), [(None, ["trained", "reference"]), (LORA, ["trained"])])
def test_dpo_has_two_sequences_of_a_pair_and_a_reference_without_adapters(lora, roles):
    work = dpo(Dpo(batch_size=8, max_length=20, lora=lora), POLICY, PAIRS, 1, EVALUATION)
    assert [model.role for model in work.models] == roles
    assert work.steps[0].one == Pass(16, 13)


def test_a_reward_model_has_no_logits_and_opens_the_policy_again():
    settings = {"batch_size": 8, "max_length": 20, "normalise": {"samples": 3, "max_response_tokens": 5}}
    work = reward(Reward.model_validate(settings), POLICY, PAIRS, 1, EVALUATION)
    assert work.steps[0] == Step("trained", Pass(16, 13), "none")
    assert work.samplings[0] == Sampling(3, 9)  # prompts of 3 and 4 tokens fit in 20, that of 30 does not
    found = memory(work, {"policy": TINY})
    assert found.phases["normalising"]["weights"] == 4 * (N + 8) + 4 * N


def test_ppo_holds_four_models_and_trains_two():
    """8 responses in passes of 4 rows of 3 + 7 tokens, so gradients of the pass before are there."""
    config = Ppo.model_validate({"rollout": {"prompts": 8, "max_response_tokens": 7}, "micro_batch_size": 4})
    work = ppo(config, PPO_INPUTS, Lengths(9, [[3], [2]]), 1, EVALUATION)
    assert [(model.role, model.trained) for model in work.models] == [
        ("actor", "all"),
        ("reference", "nothing"),
        ("critic", "all"),
        ("reward", "nothing"),
    ]
    one = Pass(4, 10, packed=True)
    assert work.steps == [
        Step("actor", one, "ppo", 28, accumulates=True),
        Step("critic", one, "none", accumulates=True),
    ]
    found = memory(work, dict.fromkeys(PPO_INPUTS, TINY))
    assert found.models == {"actor": 16 * N, "reference": 4 * N, "critic": 16 * (N + 8), "reward": 4 * N}


def test_with_adapters_one_base_serves_all_and_without_a_critic_there_is_none():
    on_base = PPO_INPUTS | {"reward": replace(PPO_INPUTS["reward"], adapter_of="1")}
    lora = ppo(Ppo(lora=LORA), on_base, Lengths(), 1, EVALUATION)
    assert [(model.role, model.is_adapter) for model in lora.models] == [
        ("actor", False),
        ("critic", True),
        ("reward", True),
    ]
    grpo = ppo(GrpoConfig(), PPO_INPUTS, Lengths(), 1, EVALUATION)
    assert [model.role for model in grpo.models] == ["actor", "reference", "reward"]


def test_a_base_in_four_bits_is_whole_again_when_it_is_saved():
    """NF4: 1344 weights of 0.5625 bytes and 120 of 4; decoded all have 4, the adapter's 840 besides."""
    nf4 = LoraSettings(rank=3, quantise="nf4")
    found = memory(sft(Sft(batch_size=2, lora=nf4), POLICY, Lengths(), 1, EVALUATION), {"policy": TINY})
    trained = 2 * 3 * 140
    assert found.phases["training"]["weights"] == 1344 * 0.5625 + 480 + 4 * trained
    assert found.phases["saving"]["weights"] == 4 * N


@pytest.mark.parametrize(("gibibytes", "how"), [(9.5, "none"), (9.4, "full")])
def test_auto_recomputes_only_where_it_has_to(gibibytes, how):
    """A long row needs 8.04 GiB: 85% of 9.5 GiB is 8.07 and of 9.4 GiB 7.99. The plan's estimate is that of the stage
    with what it comes to."""
    device, lengths = Device(round(gibibytes * 2**30)), Lengths(40, [[1_000_000, 40_000]])

    def peak(gradient_checkpointing: str) -> float:
        config = Sft(batch_size=8, max_length=2_000_000, gradient_checkpointing=gradient_checkpointing)
        known = Known("sft", config, POLICY, {"policy": TINY}, lengths, EVALUATION, "stages.sft.memory:workload")
        return known.estimate(device).memory.peak / 2**30

    assert peak("none") == pytest.approx(8.037, abs=1e-3)
    assert peak("full") < 6
    assert peak("auto") == peak(how)


def test_base_has_all_logits_at_once():
    """Of two processes each has 2 sequences of 5 tokens, whose logits of 10 are there three times. 3 steps of 4
    sequences are 60 tokens. Without steps nothing is trained."""
    config = Base(batch_size=4, sequence_length=5, steps=3)
    work = base(config, {}, Lengths(), 2, EVALUATION)
    assert (work.num_steps, work.tokens) == (3, 60)
    assert memory(work, {"policy": TINY}).phases["training"]["logits"] == 3 * 10 * 10 * 4
    idle = memory(base(config.model_copy(update={"steps": 0}), {}, Lengths(), 1, EVALUATION), {"policy": TINY})
    assert "training" not in idle.phases and idle.phases["saving"]["optimiser"] == 0
