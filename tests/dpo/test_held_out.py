"""What is measured on held-out pairs, against sums computed the plain way."""

from __future__ import annotations

import pytest
import torch

from align.models.roles import causal_role
from stages.dpo.config import Config
from stages.dpo.trainer import held_out_metrics
from tests.models.tiny import demo_texts, new_opened


@pytest.fixture(scope="module")
def policy():
    return new_opened(0)


@pytest.fixture(scope="module")
def reference():
    return new_opened(1)


@pytest.fixture(scope="module")
def rows(policy):
    """Sixteen prompts with the answer to them and the answer to another."""
    texts = demo_texts(16, seed=6)
    asked = [[{"role": "user", "content": prompt}] for prompt, _ in texts]
    answers = [policy.renderer.response(messages, answer) for messages, (_, answer) in zip(asked, texts, strict=True)]
    prompts = [policy.renderer.prompt(messages) for messages in asked]
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(prompts, answers, reversed(answers), strict=True)
    ]


def naive(model, row, side) -> float:
    """log p(answer | prompt), token by token, of one row without padding."""
    ids = torch.tensor([row["prompt_ids"] + row[side]])
    with torch.no_grad():
        logp = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
    start = len(row["prompt_ids"]) - 1
    return float(logp[start:].gather(1, ids[0, start + 1 :, None]).sum())


def test_with_a_reference(policy, reference, rows):
    """accuracy: pairs whose h is larger for the chosen answer; log-ratios: sums of h over sums of tokens."""
    h = {
        side: [naive(policy.model, row, side) - naive(reference.model, row, side) for row in rows]
        for side in ("chosen_ids", "rejected_ids")
    }
    roles = causal_role(policy.model), causal_role(reference.model)
    metrics = held_out_metrics(Config(), *roles, rows, policy.renderer.pad_id)
    right = sum(a > b for a, b in zip(h["chosen_ids"], h["rejected_ids"], strict=True))
    assert 0 < right < len(rows) == metrics["pairs"]
    assert metrics["accuracy"] == right / len(rows)
    for name, side in (("chosen_log_ratio", "chosen_ids"), ("rejected_log_ratio", "rejected_ids")):
        tokens = sum(len(row[side]) for row in rows)
        assert metrics[name] == pytest.approx(sum(h[side]) / tokens, abs=1e-4)


def test_without_a_reference(policy, rows):
    """SimPO ranks by log pi per token."""
    means = [
        [naive(policy.model, row, side) / len(row[side]) for side in ("chosen_ids", "rejected_ids")] for row in rows
    ]
    metrics = held_out_metrics(Config(loss="simpo"), causal_role(policy.model), None, rows, policy.renderer.pad_id)
    assert metrics["accuracy"] == sum(a > b for a, b in means) / len(rows)
    assert metrics.keys() == {"accuracy", "accuracy_ci95", "pairs"}


def test_a_policy_equal_to_its_reference_ranks_nothing(policy, rows):
    """All margins are 0, and 0 is not right."""
    role = causal_role(policy.model)
    assert held_out_metrics(Config(), role, role, rows, policy.renderer.pad_id)["accuracy"] == 0
