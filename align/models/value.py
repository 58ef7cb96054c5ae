"""Critics: one number per state, from a body of their own or from the actor's states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.job import Input
from align.models.load import OFFSET_FIELD, load_policy, load_reward
from align.models.roles import Role, score


class ValueHead(nn.Module):
    """V(s) = w s + b, 0 at first. In float32: values are regressed to targets that differ by less than a bfloat16
    step."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def start_from(self, weight: Tensor, offset: float) -> None:
        """Takes over a reward model's head (1,H) and offset: a prior and not yet a value, because V_t is read one token
        before the action it is about."""
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.fill_(offset)

    def forward(self, states: Tensor) -> Tensor:
        """states (...,H) -> (...,1) float32 or wider."""
        return score(states, self.weight, self.bias)


def critic_from_reward(reward: Input, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Role:
    """A critic of its own that starts as the normalised score."""
    model = load_reward(reward, tokenizer, dtype)
    head = ValueHead(model.score.weight.shape[1])
    head.start_from(model.score.weight, getattr(model.config, OFFSET_FIELD, 0.0))
    return separate_critic(model.base_model, head)


def critic_from_policy(policy: Input, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Role:
    """A critic of its own on the policy's backbone, 0 everywhere at first."""
    model = load_policy(policy, tokenizer, dtype)
    return separate_critic(model.base_model, ValueHead(model.get_output_embeddings().weight.shape[1]))


def shared_head(actor: Role) -> Role:
    """A critic on the actor's own states, 0 everywhere at first: only its head is trained in this role."""
    head = ValueHead(actor.width).to(actor.device)

    def trained() -> Iterator[tuple[str, nn.Parameter]]:
        return head.named_parameters("head")

    return Role(actor.module, actor.body, head, actor.width, actor.active, trained)


def separate_critic(body: Any, head: ValueHead) -> Role:
    """A critic with a body of its own."""
    return Role(_Critic(body, head).train(), body, head, head.weight.shape[1])


class _Critic(nn.Module):
    """A body and its head. FSDP shards no container without a forward pass."""

    def __init__(self, body: nn.Module, head: ValueHead):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, **arguments: Any) -> Tensor:
        return self.head(self.body(**arguments).last_hidden_state)
