"""A language of three tokens whose KL-regularised optimum is known exactly, and lookup tables that speak it.

A response is a sequence of a and b of at most three tokens, cut there unless EOS came before. It has fifteen
complete sequences, so expectations are sums and the optimum of J(pi) = E[score] - beta KL(pi || ref) follows
from soft dynamic programming:

    Q(s, x) = score if x ends the response, else V(s x)
    V*(s) = beta log sum_x ref(x|s) exp(Q(s,x) / beta)        pi*(x|s) = ref(x|s) exp((Q(s,x) - V*(s)) / beta)

so that J* = V*(root). A state s is the prefix of response tokens, numbered as a ternary tree: root 0, and the
children of s are 3s+1 (a), 3s+2 (b), 3s+3 (EOS).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor, nn

from align.training.logprobs import response_states, state_logprobs, state_values
from align.training.masked import length_mask
from stages.ppo.rewards import assemble, at_the_end

PAD, PROMPT, A, B, EOS = range(5)
VOCABULARY = 5
DEPTH = 3
STATES = 40
"""Prefixes of up to three tokens. Those of three tokens or after EOS are never asked for an action."""

State = TypeVar("State", int, Tensor)


def score(response: tuple[int, ...]) -> float:
    """#a - #b / 2 + (1/2 if it ends with EOS, else -1)."""
    ending = 0.5 if response[-1] == EOS else -1.0
    return response.count(A) - 0.5 * response.count(B) + ending


def child(state: State, token: State) -> State:
    """The state after `token`."""
    return 3 * state + token - A + 1


def complete_responses() -> list[tuple[int, ...]]:
    """The fifteen sequences that end with EOS or have three tokens."""
    done: list[tuple[int, ...]] = []
    open_: list[tuple[int, ...]] = [()]
    while open_:
        prefix = open_.pop(0)
        for token in (A, B, EOS):
            response = (*prefix, token)
            (done if token == EOS or len(response) == DEPTH else open_).append(response)
    return done


@dataclass(frozen=True)
class World:
    """The exact facts about a reference policy `ref` (STATES, 3), log-probabilities, at penalty `beta`."""

    ref: Tensor
    beta: float = 0.5

    @classmethod
    def random(cls, seed: int = 0, beta: float = 0.5) -> World:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(STATES, 3, generator=generator, dtype=torch.float64).log_softmax(-1), beta)

    def _induction(self, step: Callable[[int, Tensor], float]) -> None:
        """Calls step(s, Q(s, .)) -> V(s) for every prefix, the longest first."""

        def visit(prefix: tuple[int, ...], state: int) -> float:
            ends = {token: token == EOS or len(prefix) == DEPTH - 1 for token in (A, B, EOS)}
            q = [
                score((*prefix, token)) if end else visit((*prefix, token), child(state, token))
                for token, end in ends.items()
            ]
            return step(state, torch.tensor(q, dtype=torch.float64))

        visit((), 0)

    @cached_property
    def _optimum(self) -> tuple[Tensor, Tensor]:
        policy, values = self.ref.clone(), torch.zeros(STATES, 1, dtype=torch.float64)

        def step(state: int, q: Tensor) -> float:
            values[state] = self.beta * (self.ref[state] + q / self.beta).logsumexp(-1)
            policy[state] = self.ref[state] + (q - values[state]) / self.beta
            return float(values[state])

        self._induction(step)
        return policy, values

    def evaluate(self, policy: Tensor) -> Tensor:
        """V^pi (STATES, 1) of a policy of log-probabilities (STATES, 3), the KL penalty included."""
        values = torch.zeros(STATES, 1, dtype=torch.float64)

        def step(state: int, q: Tensor) -> float:
            penalty = self.beta * (policy[state] - self.ref[state])
            values[state] = (policy[state].exp() * (q - penalty)).sum()
            return float(values[state])

        self._induction(step)
        return values

    @property
    def policy(self) -> Tensor:
        """log pi* (STATES, 3)."""
        return self._optimum[0]

    @property
    def values(self) -> Tensor:
        """V* (STATES, 1)."""
        return self._optimum[1]

    def expectations(self, policy: Tensor) -> tuple[float, float, float]:
        """J, E[score] and the sequence KL to the reference of a policy of log-probabilities (STATES, 3)."""
        logp, logp_ref = sequence_logprobs(policy), sequence_logprobs(self.ref)
        kl = float((logp.exp() * (logp - logp_ref)).sum())
        expected = float((logp.exp() * scores_of_all()).sum())
        return expected - self.beta * kl, expected, kl

    def distance(self, policy: Tensor) -> float:
        """Total variation between a policy (STATES, 3) and pi* over complete responses."""
        return float((sequence_logprobs(policy).exp() - sequence_logprobs(self.policy).exp()).abs().sum() / 2)


def scores_of_all() -> Tensor:
    """Scores (15,) of the complete responses."""
    return torch.tensor([score(response) for response in complete_responses()], dtype=torch.float64)


def sequence_logprobs(policy: Tensor) -> Tensor:
    """log pi(y) of the fifteen responses: (STATES, 3) -> (15,)."""
    totals = []
    for response in complete_responses():
        state, total = 0, policy.new_zeros(())
        for token in response:
            total = total + policy[state, token - A]
            state = child(state, token)
        totals.append(total)
    return torch.stack(totals)


class TableModel(nn.Module):
    """A role (align.models.roles) that looks up the prefix of response tokens: a causal language model (table of width
    3) or a critic (width 1).

    Its states are one-hot vectors (B,L,STATES) of the prefix and its head is the table. Prompt tokens and padding, on
    either side, do not change the prefix. Tokens that are not part of the language have a logit so low that their
    probability is exactly 0, and no gradient.
    """

    width = STATES

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.device = self.table.device

    @property
    def module(self) -> TableModel:
        """What holds its weights."""
        return self

    body = module
    """What is called for its states."""

    def active(self) -> AbstractContextManager[None]:
        """It plays one role only."""
        return nullcontext()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """(B,L) -> the states, as a transformer's body gives them."""
        state, states = torch.zeros_like(input_ids[:, 0]), []
        for token, attended in zip(input_ids.T, attention_mask.bool().T, strict=True):
            is_step = attended & (token >= A) & (child(state, token) < STATES)
            state = torch.where(is_step, child(state, token), state)
            states.append(state)
        one_hot = nn.functional.one_hot(torch.stack(states, dim=1), STATES)
        return SimpleNamespace(last_hidden_state=one_hot.to(self.table.dtype))

    def states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """(B,L) -> (B,L,STATES)."""
        return self(input_ids, attention_mask).last_hidden_state

    def head(self, states: Tensor) -> Tensor:
        """states (...,STATES) -> logits (...,VOCABULARY), or (...,1) of a critic."""
        rows = states @ self.table
        if rows.shape[-1] == 1:
            return rows
        return torch.cat([rows.new_full((*rows.shape[:-1], A), -1e4), rows], dim=-1)

    def log_policy(self) -> Tensor:
        """The log-probabilities (STATES, 3) that its table stands for."""
        return self.table.detach().double().log_softmax(-1)


@dataclass(frozen=True)
class Batch:
    """Responses after prompts of different lengths: prompts padded on the left, responses on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor
    finished: Tensor
    scores: Tensor
    width: int

    @classmethod
    def of(cls, responses: list[tuple[int, ...]], prompt_width: int = 4, width: int = DEPTH + 1) -> Batch:
        rows, attended = [], []
        for index, response in enumerate(responses):
            prompt = 1 + index % prompt_width
            left, right = prompt_width - prompt, width - len(response)
            rows.append([PAD] * left + [PROMPT] * prompt + list(response) + [PAD] * right)
            attended.append([0] * left + [1] * (prompt + len(response)) + [0] * right)
        return cls(
            torch.tensor(rows),
            torch.tensor(attended),
            torch.tensor([len(response) for response in responses]),
            torch.tensor([response[-1] == EOS for response in responses]),
            torch.tensor([score(response) for response in responses], dtype=torch.float64),
            width,
        )


class Path:
    """All fifteen responses taken through the code of the trainer: log-probabilities, values, masks."""

    def __init__(self, world: World, policy: Tensor, values: Tensor, width: int = DEPTH + 1):
        self.batch = Batch.of(complete_responses(), width=width)
        self.mask = length_mask(self.batch.lengths, width)
        self.actor = TableModel(policy)
        arguments = (self.batch.input_ids, self.batch.attention_mask, width)
        tokens = self.batch.input_ids[:, -width:]
        states = response_states(self.actor, *arguments)
        given = (states[:, :-1], tokens, self.mask, 1.0)
        self.logp, _ = state_logprobs(self.actor, *given)
        self.ref = state_logprobs(TableModel(world.ref), *given)[0].detach()
        self.values = state_values(TableModel(values), states)[:, :-1].detach()
        self.old = self.logp.detach()
        self.beta = world.beta

    def rewards(self) -> Tensor:
        scores = at_the_end(self.batch.scores, self.batch.lengths, self.batch.width)
        return assemble(scores, self.old, self.ref, self.batch.lengths, self.beta)

    def probabilities(self) -> Tensor:
        """pi(y) of each response (B,)."""
        return torch.where(self.mask, self.old, 0).sum(1).exp()
