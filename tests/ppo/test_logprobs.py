"""Log-probabilities: precision (N1), gradients (N2), alignment and padding (N3, P1), temperature (O8)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers import GPT2Config, GPT2LMHeadModel

from align.models.packed import position_ids
from align.models.roles import causal_role
from align.training import logprobs
from align.training.logprobs import response_states, state_logprobs, state_values
from tests.ppo.table_model import TableModel


def random_logits(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tokens(*shape, vocabulary, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    """GPT-2 has learned absolute positions: unlike rotary ones they notice a prompt that was shifted."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def identity(states: Tensor) -> Tensor:
    return states


@dataclass
class Head:
    """All that `state_logprobs` asks of a role. By default states are logits."""

    head: Callable[[Tensor], Tensor] = identity


def logprobs_of(logits, tokens, temperature=1.0, mask=None):
    """Log-probabilities and entropies of given logits (B,T,V)."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    logp, entropy = state_logprobs(Head(), logits, tokens, mask, temperature, with_entropy=True)
    assert entropy is not None
    return logp, entropy


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_softmax_is_computed_in_float32(scale, dtype):
    """N1, row 19: at V = 32000 a bfloat16 log-softmax is off by .016 per token. Given the same logits, ours
    agrees with float64 to 1e-6 on average and 1e-5 at most."""
    logits = random_logits(2, 64, 32_000, scale=scale).to(dtype)
    tokens = random_tokens(2, 64, vocabulary=32_000)
    exact = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ours, _ = logprobs_of(logits, tokens)
    assert ours.dtype == torch.float32
    error = (ours - exact).abs()
    assert error.mean() < 1e-6
    assert error.max() < 1e-5
    trap = logits.bfloat16().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (trap - exact).abs().mean() > 1e-3


MASKED = torch.tensor([[True, True, True, False], [True, False, False, False]])


def test_gradients_agree_with_finite_differences():
    """N2: through head, softmax and mask, to the states and to the head's weight."""
    states, weight = random_logits(2, 4, 3).requires_grad_(), random_logits(5, 3, seed=1).requires_grad_()
    tokens = random_tokens(2, 4, vocabulary=5)

    def both(states, weight):
        role = Head(lambda states: states @ weight.T)
        return state_logprobs(role, states, tokens, MASKED, 0.7, with_entropy=True)

    assert gradcheck(both, (states, weight))


@pytest.mark.parametrize("block", [2, 128])
@pytest.mark.parametrize("chunk", [1, 3, 8, 10_000])
def test_chunks_change_neither_values_nor_gradients(chunk, block, monkeypatch):
    """N2, row 21: the head of valid tokens only, a few at a time and recomputed, against a plain log-softmax of all
    logits: values and the gradients of states and head, for every size of what may exist and of what is computed at
    a time."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(3, 7, generator=generator) < 0.6
    tokens, weights = random_tokens(3, 7, vocabulary=11), random_logits(3, 7, seed=1)
    monkeypatch.setattr(logprobs, "MAX_TOKENS", chunk)
    monkeypatch.setattr(logprobs, "CPU_BLOCK", block)
    results = []
    for is_ours in (True, False):
        states, head = random_logits(3, 7, 4).requires_grad_(), random_logits(11, 4, seed=3).requires_grad_()
        if is_ours:
            role = Head(lambda states, head=head: states @ head.T)
            logp, entropy = state_logprobs(role, states, tokens, mask, 1.0, with_entropy=True)
            assert entropy is not None
        else:
            full = (states @ head.T).log_softmax(-1)
            logp = torch.where(mask, full.gather(-1, tokens[..., None])[..., 0], 0)
            entropy = torch.where(mask, -(full.exp() * full).sum(-1), 0)
        (logp * weights + entropy * weights.flip(0)).sum().backward()
        results.append((logp, entropy, states.grad, head.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_logits_exist_for_a_chunk_of_valid_tokens_at_a_time(monkeypatch):
    """Row 21: 12 slots, 4 of them valid, chunks of 3: the head sees 3 and 1 states, never (B,T,V), and the same once
    more in the backward pass."""
    monkeypatch.setattr(logprobs, "MAX_TOKENS", 3)
    seen: list[int] = []

    def head(states):
        seen.append(len(states))
        return states

    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 0] = mask[1, 1] = True
    logits, tokens = random_logits(3, 4, 5).requires_grad_(), random_tokens(3, 4, vocabulary=5)
    logp, _ = state_logprobs(Head(head), logits, tokens, mask, 1.0)
    assert seen == [3, 1]
    logp.sum().backward()
    assert sorted(seen) == [1, 1, 3, 3]


def test_nan_at_masked_slots_does_not_matter():
    """M2: states of padding may hold anything. Values there are 0, gradients too, and nothing else is touched."""
    logits, tokens = random_logits(2, 4, 5), random_tokens(2, 4, vocabulary=5)
    broken = torch.where(MASKED[..., None], logits, torch.nan).requires_grad_()
    logp, entropy = logprobs_of(broken, tokens, mask=MASKED)
    for ours, clean in zip((logp, entropy), logprobs_of(logits, tokens), strict=True):
        assert torch.equal(ours, torch.where(MASKED, clean, 0))
    (logp + entropy).sum().backward()
    assert broken.grad is not None and broken.grad.isfinite().all()
    assert not broken.grad[~MASKED].any()


def test_a_batch_without_a_valid_token():
    """All rows masked, as in a micro-batch of which nothing is learned: zeros that can be differentiated."""
    logits, tokens = random_logits(2, 4, 5).requires_grad_(), random_tokens(2, 4, vocabulary=5)
    logp, entropy = logprobs_of(logits, tokens, mask=torch.zeros(2, 4, dtype=torch.bool))
    assert not logp.any() and not entropy.any()
    (logp + entropy).sum().backward()
    assert logits.grad is not None and not logits.grad.any()


def test_temperature():
    """O8: z = [2,1,0] at tau .7. A reference left at tau 1 would show the KL .030351 to itself."""
    logits = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).expand(1, 3, 3)
    tokens = torch.tensor([[0, 1, 2]])
    tempered, plain = logprobs_of(logits, tokens, 0.7)[0], logprobs_of(logits, tokens, 1.0)[0]
    assert tempered[0].tolist() == pytest.approx([-0.260118, -1.688690, -3.117261], abs=1e-6)
    assert plain[0].tolist() == pytest.approx([-0.407606, -1.407606, -2.407606], abs=1e-6)
    assert (tempered.exp() * (tempered - plain)).sum() == pytest.approx(0.030351, abs=1e-6)


def test_entropy_of_known_distributions():
    """Row 29: uniform over V has entropy log V at any tau; [2,1,0] at tau .7 follows from O8."""
    uniform = logprobs_of(torch.zeros(1, 2, 7), torch.zeros(1, 2, dtype=torch.long), 0.3)[1]
    assert uniform[0].tolist() == pytest.approx([math.log(7)] * 2)
    logp = [-0.260118, -1.688690, -3.117261]
    expected = -sum(math.exp(x) * x for x in logp)
    found = logprobs_of(torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[0]]), 0.7)[1]
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_positions_start_at_the_first_attended_token():
    """Row 2."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 3, 3]]


def naive(model, prompt, response):
    """One forward per token, no padding, no batch: log-probabilities and entropies."""
    logps, entropies = [], []
    for t, token in enumerate(response):
        logp = model(torch.tensor([prompt + response[:t]])).logits[0, -1].log_softmax(-1)
        logps.append(float(logp[token]))
        entropies.append(float(-(logp.exp() * logp).sum()))
    return logps, entropies


def padded(prompts, responses, left=0, right=0):
    """Left-padded prompts and right-padded responses: input_ids, attention_mask, response width."""
    height, width = max(map(len, prompts)) + left, max(map(len, responses)) + right
    rows = [[0] * (height - len(p)) + p + r + [0] * (width - len(r)) for p, r in zip(prompts, responses, strict=True)]
    mask = [
        [0] * (height - len(p)) + [1] * len(p + r) + [0] * (width - len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    return torch.tensor(rows), torch.tensor(mask), width


PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
RESPONSES = [[1, 2], [3, 4, 5, 6], [7]]


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 2), (2, 5)])
def test_batched_logprobs_equal_a_loop_over_tokens(model, left, right):
    """N3 and P1, rows 2 and 25: an off-by-one column or positions counted from the left edge would show here;
    columns of padding on either side change nothing."""
    with torch.no_grad():
        role, (ids, attention, width) = causal_role(model), padded(PROMPTS, RESPONSES, left, right)
        states = response_states(role, ids, attention, width)
        valid = attention[:, -width:].bool()
        logp, spread = state_logprobs(role, states[:, :-1], ids[:, -width:], valid, 1.0, with_entropy=True)
        assert spread is not None
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logps, entropies = naive(model, prompt, response)
            assert logp[i, : len(response)].tolist() == pytest.approx(logps, abs=1e-5)
            assert spread[i, : len(response)].tolist() == pytest.approx(entropies, abs=1e-5)


def test_values_are_read_one_column_before_their_token():
    """Row 48: V_t belongs to the state in which token t is chosen. The table holds the number of the state:
    root 0, after "a" 1, after "a a" 4, and 15 after the EOS that follows: what a cut response is continued from."""
    critic = TableModel(torch.arange(40.0)[:, None])
    ids, mask = torch.tensor([[0, 1, 1, 2, 2, 4]]), torch.tensor([[0, 1, 1, 1, 1, 1]])
    states = response_states(critic, ids, mask, 3)
    assert state_values(critic, states).tolist() == [[0.0, 1.0, 4.0, 15.0]]
