"""Measuring a policy on held-out prompts: real sampling, a real gold scorer, and no leak."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from align.data.rows import Prompt
from align.data.split import places
from align.demo import world
from align.errors import ConfigError, DataError
from align.evaluation.likelihood import response_logprob_sums
from align.evaluation.policy import evaluate_policy, load_gold
from align.evaluation.stage import held_out_prompts
from align.generation.engine import Sampling
from align.generation.transformers_engine import TransformersEngine
from align.models.roles import causal_role
from align.recipe.engine_settings import EvaluationSettings
from tests.models.tiny import demo_texts

PROMPTS = [
    Prompt([{"role": "user", "content": prompt}], f"prompts.jsonl:{number}")
    for number, (prompt, _) in enumerate(demo_texts(12, seed=6), start=1)
]
SETTINGS = EvaluationSettings(gold="align.demo.world:gold_scores", prompts=10, max_response_tokens=6, batch_size=4)


def evaluate(policy, settings=SETTINGS, **extra):
    return evaluate_policy(
        TransformersEngine(policy.model, settings.batch_size),
        causal_role(policy.model),
        policy.renderer,
        PROMPTS,
        settings,
        seed=7,
        **extra,
    )


def test_every_number_is_that_of_the_samples(policy, other):
    """Gold, KL and reward are recomputed from the samples that were written down; `prompts` limits how many; every
    mean lies in its interval."""
    scored: list[list[int]] = []

    def scorer(messages: Sequence, ids: Sequence[list[int]], samples) -> torch.Tensor:
        scored.extend(samples.rows())
        return torch.tensor([float(len(row)) for row in samples.rows()])

    metrics, rows = evaluate(policy, reference=causal_role(other.model), scorer=scorer)
    assert metrics["prompts"] == len(rows) == 10
    assert [row["prompt"] for row in rows] == [prompt.messages[-1]["content"] for prompt in PROMPTS[:10]]
    assert [row["gold"] for row in rows] == [world.gold(row["prompt"], row["response"]) for row in rows]
    assert metrics["gold"] == pytest.approx(sum(row["gold"] for row in rows) / 10)
    ids = [policy.renderer.prompt(prompt.messages) for prompt in PROMPTS[:10]]
    ours, theirs = (response_logprob_sums(causal_role(model), ids, scored, 0) for model in (policy.model, other.model))
    assert [row["kl"] for row in rows] == pytest.approx([a - b for a, b in zip(ours, theirs, strict=True)], abs=1e-3)
    assert metrics["kl"] > 0  # samples of the policy are likelier under it than under another model
    assert [policy.renderer.decode(row) for row in scored] == [row["response"] for row in rows]
    assert metrics["reward"] == metrics["response_length"] == pytest.approx(sum(map(len, scored)) / 10)
    assert metrics["eos_rate"] == sum(row["finished"] for row in rows) / 10
    for name in ("gold", "kl", "reward", "eos_rate", "response_length"):
        low, high = metrics[f"{name}_ci95"]
        assert low <= metrics[name] <= high


def test_kl_of_a_policy_to_itself_is_zero(policy):
    """The same code path for policy and reference: the difference is exactly 0."""
    metrics, _ = evaluate(policy, reference=causal_role(policy.model))
    assert metrics["kl"] == 0


def test_evaluation_is_repeatable_and_leaves_the_random_state_alone(policy):
    """The same seed gives the same samples, and training goes on with the numbers it would have drawn."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = evaluate(policy)
    assert torch.rand(1) == expected
    assert evaluate(policy) == first


def test_nothing_asked_nothing_reported(policy):
    """Without gold, reference and scorer there are only EOS rate and length."""
    metrics, _ = evaluate(policy, SETTINGS.model_copy(update={"gold": None}))
    assert {name for name in metrics if not name.endswith("_ci95")} == {"prompts", "eos_rate", "response_length"}


def test_engine_samples_follow_the_policy(policy):
    """The embedded engine samples from the policy's own distribution: over 4000 first tokens, frequencies match
    softmax(logits) within 4 standard errors (no top-k, no top-p)."""
    prompt = policy.renderer.prompt(PROMPTS[0].messages)
    sampling = Sampling(1, 1.0, policy.renderer.stop_ids, policy.renderer.pad_id, seed=1)
    drawn = TransformersEngine(policy.model, 1000).generate([prompt] * 4000, sampling).token_ids[:, 0]
    with torch.no_grad():
        expected = policy.model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    found = torch.bincount(drawn, minlength=len(expected)) / 4000
    allowed = 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-3
    assert bool(((found - expected).abs() < allowed).all())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("align.demo.nowhere:gold", "cannot import"),
        ("align.demo.world:nothing", "align.demo.world has no function 'nothing'"),
        ("align.demo.world", ".* is not the name of a function"),
    ],
)
def test_a_gold_scorer_that_cannot_be_imported(name, says):
    """Module, function or colon missing: one message with the setting's name."""
    with pytest.raises(ConfigError, match=rf"evaluation\.gold: {says}"):
        load_gold(name)


def test_no_gold_scorer():
    """None is none."""
    assert load_gold(None) is None


def test_evaluation_prompts_that_are_trained_on_are_refused(tmp_path):
    """The leak is named on both sides: where the evaluation prompt is and where it is trained on."""
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("say hat", "say moon")))
    training = [Prompt([{"role": "user", "content": "say moon"}], "train.jsonl:3")]
    settings = EvaluationSettings.model_validate({"data": {"path": str(path)}})
    with pytest.raises(
        DataError, match=r"eval\.jsonl:2: .*also trained on, at train\.jsonl:3 \(remove one\)"
    ) as caught:
        held_out_prompts(settings, (), places(training))
    assert len(caught.value.problems) == 1


def test_evaluation_data_is_used_whole_and_own_prompts_otherwise(tmp_path):
    """`evaluation.data` is not split again; without it the stage's held-out prompts are measured on."""
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {number}"}) + "\n" for number in range(20)))
    settings = EvaluationSettings.model_validate({"data": {"path": str(path), "held_out": 0.5}})
    assert len(held_out_prompts(settings, PROMPTS)) == 20
    assert held_out_prompts(EvaluationSettings(), PROMPTS) is PROMPTS
