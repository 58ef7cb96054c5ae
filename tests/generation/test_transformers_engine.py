"""The embedded engine samples from the policy's own distribution, whatever the checkpoint says, and leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM

from align.errors import NumericError
from align.generation.engine import Sampling, left_pad
from align.generation.transformers_engine import TransformersEngine, drawn
from align.models.roles import causal_role
from align.training.logprobs import response_states, state_logprobs
from align.training.parity import sampled_logprobs
from tests.generation.conftest import END_OF_TURN, EOS, PAD, counting, fixed_distribution

DRAWS = 6000
CHI_SQUARE_4 = 23.5
"""99.99 % quantile of chi-square with four degrees of freedom. Seeds are fixed: a test passes always or never."""
UNEVEN = [0.05, 0.1, 0.2, 0.25, 0.4]
PROMPTS = [[5], [6, 7, 8, 9, 10, 11], [12, EOS, 13], [14, 15], [EOS, 16, PAD, 17], [18]]


def sampling(max_tokens: int, temperature: float = 1.0, stop_ids: tuple[int, ...] = (EOS,), seed: int = 0) -> Sampling:
    return Sampling(max_tokens, temperature, stop_ids, PAD, seed)


def chi_square(tokens: Sequence[int], probabilities: torch.Tensor) -> float:
    """Pearson's statistic of counts against probabilities."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities))
    return float(((counts - expected).square() / expected).sum())


def first_tokens(model: LlamaForCausalLM, temperature: float, batch_size: int = 3000) -> list[int]:
    samples = TransformersEngine(model, batch_size).generate([[3, 3, 4]] * DRAWS, sampling(1, temperature))
    return samples.token_ids[:, 0].tolist()


def checkpoint_with_opinions(folder: Path) -> LlamaForCausalLM:
    """A checkpoint whose generation config asks for everything that makes samples another distribution."""
    model = fixed_distribution(UNEVEN)
    state = model.state_dict()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=2.0, suppress_tokens=[4]
    )
    model.save_pretrained(folder)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    loaded.lm_head = torch.nn.Linear(4, len(UNEVEN))
    loaded.load_state_dict(state)
    return loaded.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_are_those_of_the_policy(temperature, tmp_path):
    """P7, rows 12 and 13: first tokens of 6000 draws against softmax(logits / temperature), from a checkpoint that asks
    for top-k 2, temperature .1, repetition penalty 2 (tokens 3 and 4 are in the prompt) and a suppressed token."""
    model = checkpoint_with_opinions(tmp_path)
    assert model.generation_config.top_k == 2
    expected = (torch.tensor(UNEVEN).log() / temperature).softmax(-1)
    assert chi_square(first_tokens(model, temperature), expected) < CHI_SQUARE_4


def test_the_checkpoints_opinions_would_show(tmp_path):
    """P7: what the library does by itself with this checkpoint fails the same test by far, so the test can tell."""
    model: Any = checkpoint_with_opinions(tmp_path)
    torch.manual_seed(0)
    ids = torch.tensor([[3, 3, 4]] * DRAWS)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    assert chi_square(output[:, -1].tolist(), torch.tensor(UNEVEN)) > 100 * CHI_SQUARE_4


def test_every_token_of_a_large_vocabulary_is_drawn():
    """P7, row 13: the library's own default keeps the 50 likeliest tokens. Probabilities rise evenly, because equally
    likely tokens would all be kept. 99.99 % quantile of chi-square with 79 degrees of freedom: 131."""
    probabilities = torch.arange(40.0, 120.0) / torch.arange(40.0, 120.0).sum()
    tokens = first_tokens(fixed_distribution(probabilities.tolist()), 1.0)
    assert chi_square(tokens, probabilities) < 131
    assert len(set(tokens)) == 80


def test_lengths_are_those_of_the_policy():
    """Rows 8 and 12: nothing forces or forbids an end. With a stop probability of .3 in every state (.1 for one stop
    token, .2 for the other) lengths are geometric: .3, .21, .147, .1029, and .2401 for the cap of five, of which .7
    did not end."""
    model = fixed_distribution([0.0, 0.1, 0.2, 0.3, 0.4])
    samples = TransformersEngine(model, DRAWS).generate([[3]] * DRAWS, sampling(5, stop_ids=(EOS, END_OF_TURN)))
    expected = torch.tensor([0.3, 0.21, 0.147, 0.1029, 0.2401])
    assert chi_square((samples.lengths - 1).tolist(), expected) < CHI_SQUARE_4
    at_cap = samples.finished[samples.lengths == 5].double()
    assert float(at_cap.mean()) == pytest.approx(0.3, abs=4 * (0.21 / len(at_cap)) ** 0.5)
    assert samples.finished[samples.lengths < 5].all()


def test_valid_ids_are_sampled_and_the_rest_is_pad():
    """P4: PAD has probability 0 here, so it is nowhere inside a response and everywhere past its end."""
    model = fixed_distribution([0.0, 0.3, 0.2, 0.3, 0.2])
    samples = TransformersEngine(model, 7).generate([[3] * (1 + row % 4) for row in range(40)], sampling(6))
    is_valid = torch.arange(samples.token_ids.shape[1]) < samples.lengths[:, None]
    assert (samples.token_ids[is_valid] != PAD).all()
    assert (samples.token_ids[~is_valid] == PAD).all()
    assert samples.token_ids.shape[1] == int(samples.lengths.max())
    assert not samples.finished.all()
    for row, finished in zip(samples.rows(), samples.finished.tolist(), strict=True):
        assert (row[-1] == EOS) == finished
        assert EOS not in row[:-1]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 39), min_size=1, max_size=5),
    st.sets(st.integers(0, 39), min_size=1, max_size=8),
    st.integers(0, 39),
    st.integers(1, 8),
)
def test_a_response_is_what_comes_up_to_the_first_stop(starts, stop_ids, pad, cap):
    """P4, rows 4, 6, 7 and 8: of a model that counts, for all starts, stop sets, PAD ids (PAD among the stop tokens
    included: lengths say what is valid, not ids) and caps: a response is what was counted up to its first stop token,
    that one included; `finished` says that there was one, also in the very last column; everything else is PAD."""
    samples = TransformersEngine(counting(40), 3).generate(
        [[start] for start in starts], Sampling(cap, 1.0, tuple(stop_ids), pad, 0)
    )
    for start, row, finished in zip(starts, samples.rows(), samples.finished.tolist(), strict=True):
        counted = [(start + 1 + step) % 40 for step in range(cap)]
        stops = [place for place, token in enumerate(counted) if token in stop_ids]
        assert row == (counted[: stops[0] + 1] if stops else counted)
        assert finished == bool(stops)
    is_past = torch.arange(samples.token_ids.shape[1]) >= samples.lengths[:, None]
    assert samples.token_ids.shape[1] == int(samples.lengths.max())
    assert (samples.token_ids[is_past] == pad).all()


def test_a_prompt_that_holds_eos_is_not_an_answer_that_ended():
    """P5, row 7: chat templates put EOS into prompts. With a policy that never stops, no response is finished, also
    when the prompt ends with EOS; with one that stops at once, every response is, at the very last column of the
    cap."""
    prompts = [[EOS, 3], [3, EOS], [EOS], [3, 3, 3]]
    never = fixed_distribution([0.0, 0.0, 0.2, 0.4, 0.4])
    samples = TransformersEngine(never).generate(prompts, sampling(4))
    assert samples.finished.tolist() == [False] * 4
    assert samples.lengths.tolist() == [4] * 4
    at_once = fixed_distribution([0.0, 1.0, 0.0, 0.0, 0.0])
    samples = TransformersEngine(at_once).generate(prompts, sampling(1))
    assert samples.finished.tolist() == [True] * 4
    assert samples.rows() == [[EOS]] * 4


def test_a_batch_whose_responses_all_end_early_joins_a_longer_one():
    """P4: batches differ in width; the joined samples are padded with PAD and keep their lengths."""
    model = fixed_distribution([0.0, 0.5, 0.0, 0.5, 0.0])
    samples = TransformersEngine(model, batch_size=1).generate([[3]] * 12, sampling(8))
    assert len(set(samples.lengths.tolist())) > 2
    assert all(set(row[:-1]) <= {3} for row in samples.rows())


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, len(PROMPTS)])
def test_padding_does_not_change_the_likeliest_response(batch_size, model):
    """P1, row 1: at a temperature close to 0 a prompt has the same response alone and beside longer ones, EOS and PAD
    among its tokens or not: the likeliest token of one forward per token, without padding, cache or engine."""
    near_zero = sampling(6, temperature=1e-4)
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + near_zero.max_tokens and (len(ids) == len(prompt) or ids[-1] != EOS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert TransformersEngine(model, batch_size).generate(PROMPTS, near_zero).rows() == expected


@torch.no_grad()
def test_padding_does_not_change_logprobs(model):
    """P1, row 2: log-probabilities of sampled responses in one left-padded batch equal those of each row alone."""
    samples = TransformersEngine(model).generate(PROMPTS, sampling(6, stop_ids=(EOS, END_OF_TURN)))
    prompt_ids, prompt_mask = left_pad(PROMPTS, PAD, "cpu")
    width = samples.token_ids.shape[1]
    valid = torch.arange(width) < samples.lengths[:, None]
    ids, mask = torch.cat([prompt_ids, samples.token_ids], 1), torch.cat([prompt_mask, valid.long()], 1)
    role = causal_role(model)
    states = response_states(role, ids, mask, width)
    together, _ = state_logprobs(role, states[:, :-1], samples.token_ids, valid, 1.0)
    for prompt, response, row in zip(PROMPTS, samples.rows(), together, strict=True):
        one = torch.tensor([prompt + response])
        states = response_states(role, one, torch.ones_like(one), len(response))
        every = torch.ones(1, len(response), dtype=torch.bool)
        alone, _ = state_logprobs(role, states[:, :-1], torch.tensor([response]), every, 1.0)
        torch.testing.assert_close(row[: len(response)], alone[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_logprobs_are_those_of_the_policy(model):
    """Through the cache, at another temperature, beside rows that ended: what the trainer's code gives."""
    how = sampling(6, temperature=0.7, stop_ids=tuple(range(20)))
    samples = TransformersEngine(model).generate(PROMPTS, how)
    assert samples.logprobs is not None and len(set(samples.lengths.tolist())) > 1
    expected = sampled_logprobs(causal_role(model), PROMPTS, samples, how)
    torch.testing.assert_close(samples.logprobs, expected, rtol=0, atol=1e-5)


def test_a_row_that_ended_leaves_the_batch():
    """Half of the rows end with each token: the forward passes get narrower, to nobody's surprise."""
    model = fixed_distribution([0.0, 0.5, 0.0, 0.5, 0.0])
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, arguments, named: widths.append(len(named["input_ids"])), with_kwargs=True
    )
    samples = TransformersEngine(model).generate([[3]] * 64, sampling(20))
    assert widths == [int((samples.lengths > step).sum()) for step in range(len(widths))]
    assert widths[0] == 64 and widths[-1] < 8


def test_samples_do_not_depend_on_the_batch():
    """A prompt's draws are its own: alone, or beside others."""
    model = fixed_distribution(UNEVEN)
    rows = [TransformersEngine(model, size).generate([[3]] * 9, sampling(8)).rows() for size in (1, 4, 9)]
    assert rows[0] == rows[1] == rows[2]


def test_inversion():
    """Probabilities 0, 1/4, 1/4, 0, 1/2: the cumulated ones are 0, 1/4, 1/2, 1/2, 1. A draw on an edge belongs to the
    next token that has a probability; one without is never drawn."""
    logits = torch.tensor([0.0, 0.25, 0.25, 0.0, 0.5]).log().expand(5, -1)
    draws = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.999], dtype=torch.float64)
    assert drawn(logits, draws).tolist() == [1, 1, 2, 4, 4]


def test_logits_that_are_not_finite_are_an_error():
    """Of weights that became NaN nothing can be sampled."""
    with pytest.raises(NumericError, match="not finite"):
        drawn(torch.full((1, 4), torch.nan), torch.zeros(1, dtype=torch.float64))


def test_the_model_is_left_as_it_was(model):
    """P7: its own generation config, its mode and its cache setting are the same after a call, and after one that
    failed."""
    model.generation_config = GenerationConfig(top_k=2, temperature=0.1, repetition_penalty=2.0, do_sample=True)
    own, before = model.generation_config, model.generation_config.to_dict()
    model.config.use_cache = False
    for is_training in (True, False):
        model.train(is_training)
        TransformersEngine(model).generate(PROMPTS, sampling(3))
        with pytest.raises((IndexError, RuntimeError)):
            TransformersEngine(model).generate([[999]], sampling(3))
        assert model.generation_config is own
        assert own.to_dict() == before
        assert model.training is is_training
        assert model.config.use_cache is False


def test_the_global_random_state_is_left_as_it_was(model):
    """Sampling has its own seed: what else is drawn in the process does not depend on it, nor it on that."""
    engine = TransformersEngine(model)
    torch.manual_seed(1)
    expected, first = torch.rand(3), engine.generate(PROMPTS, sampling(6))
    torch.manual_seed(1)
    again = engine.generate(PROMPTS, sampling(6))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.token_ids, again.token_ids)


def test_the_seed_decides_the_samples(model):
    """The same seed gives the same samples, also from an engine of its own; other seeds give others."""
    draws = [TransformersEngine(model).generate(PROMPTS, sampling(6, seed=seed)).rows() for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3]


def test_equal_prompts_get_responses_of_their_own():
    """Rows of one call are independent draws, within a batch and across batches."""
    model = fixed_distribution([0.0, 0.0, 0.2, 0.4, 0.4])
    rows = TransformersEngine(model, batch_size=4).generate([[3]] * 8, sampling(12)).rows()
    assert len({tuple(row) for row in rows}) == 8


@torch.no_grad()
def test_the_engine_samples_from_the_weights_of_the_moment():
    """`sync` has nothing to do: a changed weight is in the very next sample."""
    model = fixed_distribution([0.0, 0.0, 1.0, 0.0, 0.0])
    engine = TransformersEngine(model)
    assert engine.generate([[3]], sampling(3)).rows() == [[2, 2, 2]]
    model.lm_head.bias.copy_(torch.tensor([-60.0, -60, -60, 0, -60]))
    engine.sync()
    assert engine.generate([[3]], sampling(3)).rows() == [[3, 3, 3]]
