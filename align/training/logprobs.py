"""Log-probabilities, entropies and values of response tokens: one code path for all roles.

B rows, P prompt columns (left-padded), T response columns (right-padded), H width of the hidden states, V vocabulary.
Index t is about response token t, which is chosen in state s_t, one column earlier: columns P-1 .. P+T-2 of the full
sequence; s_T is what follows the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.models.packed import position_ids
from align.models.roles import Role, wide

MAX_TOKENS = 1024
"""Tokens whose logits exist at a time, forward and backward."""
CPU_BLOCK = 128
"""Tokens whose logits are computed at a time on a CPU: to get large tensors from the system takes longer than to fill
them."""
CHECKPOINT: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def response_states(role: Role, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
    """The states s_0 .. s_T: input_ids, attention_mask (B,P+T), response_width T -> (B,T+1,H)."""
    states = role.states(input_ids, attention_mask, position_ids(attention_mask))
    return states[:, -response_width - 1 :]


def state_logprobs(
    role: Role, states: Tensor, tokens: Tensor, mask: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log pi(token | state), and the entropy of pi(. | state) if asked for.

    states (B,T,H), tokens (B,T), mask (B,T) bool -> (B,T) and (B,T) or None, float32 or wider, 0 where mask is False:
    what lies there is not looked at. Logits exist for MAX_TOKENS valid tokens at a time; of more tokens they are
    computed once more in the backward pass, so (B,T,V) never exists.
    """
    valid = states[mask]
    size = min(MAX_TOKENS, CPU_BLOCK) if valid.device.type == "cpu" else MAX_TOKENS
    blocks = zip(valid.split(size), tokens[mask].split(size), strict=True)
    compute = _logprobs if len(valid) <= MAX_TOKENS else partial(checkpoint, _logprobs, **CHECKPOINT)
    parts: list[Any] = [compute(role.head, block, chosen, temperature, with_entropy) for block, chosen in blocks]
    logp, entropy = zip(*parts, strict=True)
    return _spread(torch.cat(logp), mask), _spread(torch.cat(entropy), mask) if with_entropy else None


def state_values(role: Role, states: Tensor) -> Tensor:
    """V(s): states (B,T+1,H) -> (B,T+1), float32 or wider."""
    return wide(role.head(states)[..., 0])


def _logprobs(
    head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """states (N,H), tokens (N,) -> log-probabilities (N,) and entropies (N,) or None.

    The softmax is in float32: in bfloat16 it is wrong by 0.016 per token.
    """
    scaled = wide(head(states))
    if temperature != 1:
        scaled = scaled / temperature
    normaliser = scaled.logsumexp(-1)
    logp = scaled.gather(-1, tokens[:, None])[:, 0] - normaliser
    if not with_entropy:
        return logp, None
    return logp, normaliser - torch.linalg.vecdot((scaled - normaliser[:, None]).exp_(), scaled)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the valid slots (N,) in their places (B,T), 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
