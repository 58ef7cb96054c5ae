"""What rollout.py makes and computes: models that stop as often as is said, prompts, ratios of neighbours."""

from __future__ import annotations

import pytest
import torch

from align.generation.engine import Sampling
from align.generation.transformers_engine import TransformersEngine
from benchmarks.pages import spread
from benchmarks.rollout_models import FIRST, LONGEST, NEVER, PAD, SHORTEST, STOPS, make_model, make_prompts, subjects
from benchmarks.turns import Turn, ratios


@pytest.mark.parametrize("subject", subjects(), ids=lambda subject: subject.name)
@torch.no_grad()
def test_stop_tokens_are_as_likely_as_is_said(subject) -> None:
    """One in as many tokens as a response has on average, within a fifth; in no context a certainty; and the token
    that is never produced is not."""
    model = make_model(subject.config, subject.mean_tokens)
    prompts = [prompt[:SHORTEST] for prompt in make_prompts(subject.config.vocab_size, 64, 1)]
    probabilities = model(torch.tensor(prompts)).logits.softmax(-1)
    stopping = probabilities[..., list(STOPS)].sum(-1)
    assert float(stopping.mean()) == pytest.approx(1 / subject.mean_tokens, rel=0.2)
    assert float(stopping.max()) < 0.75
    assert float(probabilities[..., [PAD, NEVER]].max()) < 1e-15


def test_lengths_have_a_long_tail() -> None:
    """512 responses of the tiny model, at most 96 tokens. Geometric with a mean of 12: standard deviation 11.5 (0.5 of
    the mean of 512), median 8, a hundredth above ln(0.01) / ln(11/12) = 53."""
    subject = subjects()[0]
    model = make_model(subject.config, subject.mean_tokens)
    prompts = list(make_prompts(subject.config.vocab_size, 512, 2))
    sampling = Sampling(subject.max_tokens, 1.0, STOPS, PAD, seed=0)
    lengths = TransformersEngine(model, 512).generate(prompts, sampling).lengths.float()
    assert float(lengths.mean()) == pytest.approx(12, abs=2)
    assert float(lengths.median()) < 10
    assert float(lengths.max()) > 45


def test_prompts() -> None:
    """Random tokens without a meaning, of all lengths, repeatable, and others for another seed."""
    prompts = list(make_prompts(512, 400, seed=3))
    assert {len(prompt) for prompt in prompts} == set(range(SHORTEST, LONGEST + 1))
    assert min(map(min, prompts)) >= FIRST and max(map(max, prompts)) < 512
    assert prompts == list(make_prompts(512, 400, seed=3))
    assert not {tuple(one) for one in prompts} & {tuple(one) for one in make_prompts(512, 400, seed=4)}


def test_ratios_are_of_neighbours() -> None:
    """Two rounds: 60 tokens in 2 s against 40 in 4 s, 30 against 10; then 60 in 3 s against 60 in 2 s."""
    rounds = [
        {"a": Turn(4, 1, [10, 30], 1), "b": Turn(2, 1, [60], 1)},
        {"a": Turn(2, 1, [60], 1), "b": Turn(3, 1, [30, 30], 1)},
    ]
    assert ratios(rounds, "b", "a") == [3, pytest.approx(20 / 30)]


def test_spread() -> None:
    """The median, not the mean, between the least and the greatest."""
    assert spread([1.0, 4.0, 1.5], 2) == "1.50 (1.00 to 4.00)"
