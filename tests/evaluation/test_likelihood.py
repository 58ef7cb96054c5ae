"""Log-likelihoods, against a loop without batches, padding or our code."""

from __future__ import annotations

import pytest
import torch

from align.evaluation.likelihood import response_logprob_sums, right_pad, token_loss
from align.models.roles import causal_role
from tests.models.tiny import demo_texts

CLOSE = 1e-3
"""Sums of tens of log-probabilities in float32, batched and padded against alone."""


def rows_of(opened) -> list[tuple[list[int], list[int]]]:
    asked = [([{"role": "user", "content": prompt}], answer) for prompt, answer in demo_texts(7, seed=5)]
    return [(opened.renderer.prompt(messages), opened.renderer.response(messages, text)) for messages, text in asked]


@torch.no_grad()
def naive_sum(model, prompt: list[int], response: list[int]) -> float:
    """One row at a time, one token at a time."""
    total = 0.0
    for place in range(len(response)):
        logits = model(input_ids=torch.tensor([prompt + response[:place]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[response[place]])
    return total


def test_response_logprob_sums_equal_a_naive_loop(policy):
    """log p(response | prompt): every response token counts, the stop token included, and no prompt token does."""
    rows = rows_of(policy)
    sums = response_logprob_sums(causal_role(policy.model), *zip(*rows, strict=True), policy.renderer.pad_id)
    assert sums == pytest.approx([naive_sum(policy.model.eval(), *row) for row in rows], abs=CLOSE)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_response_logprob_sums_do_not_depend_on_the_batch(policy, batch_size):
    """Nor on what the padding is: PAD may be any id."""
    prompts, responses = zip(*rows_of(policy), strict=True)
    role = causal_role(policy.model)
    expected = response_logprob_sums(role, prompts, responses, policy.renderer.pad_id, 3)
    sums = response_logprob_sums(role, prompts, responses, policy.tokenizer.eos_token_id, batch_size)
    assert sums == pytest.approx(expected, abs=CLOSE)


def test_token_loss_equals_a_naive_loop(policy):
    """Total negative log-likelihood of the labelled tokens divided once by their number: rows of different lengths
    do not weigh the same, and unlabelled tokens not at all."""
    rows = rows_of(policy)
    total = sum(naive_sum(policy.model.eval(), *row) for row in rows)
    count = sum(len(response) for _, response in rows)
    labelled = [
        {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response} for prompt, response in rows
    ]
    loss = token_loss(causal_role(policy.model), labelled, policy.renderer.pad_id)
    assert loss == pytest.approx(-total / count, abs=1e-4)


def test_right_pad():
    """Rows keep their place, the mask comes from lengths."""
    ids, mask = right_pad([[1, 2, 3], [4]], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_models_are_left_in_their_mode(policy):
    """Measuring in the middle of training does not switch dropout off for the rest of it."""
    policy.model.train()
    role = causal_role(policy.model)
    response_logprob_sums(role, [[5]], [[6]], 0)
    token_loss(role, [{"input_ids": [5, 6], "labels": [-100, 6]}], 0)
    assert policy.model.training
    policy.model.eval()
