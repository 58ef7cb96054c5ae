"""Log-probabilities, entropies and values of response tokens: one code path for policy and reference.

B rows, P prompt columns (left-padded), T response columns (right-padded), V vocabulary. Index t is about
response token t, which is scored by the logits one column earlier: columns P-1 .. P+T-2 of the full sequence.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024
"""Tokens whose float32 logits exist at a time, forward and backward."""


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token]: logits (B,T,V), tokens (B,T) -> (B,T), float32 or wider."""
    return _chunked(_logprobs, logits, tokens, temperature)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature): logits (B,T,V) -> (B,T), float32 or wider."""
    tokens = torch.empty(logits.shape[:2], dtype=torch.long, device=logits.device)
    return _chunked(_entropy, logits, tokens, temperature)


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B,L) -> (B,L): a row's first attended token is at 0, however much padding is on its left.

    Passed in every forward: a model that counts from the left edge gives left-padded rows other
    log-probabilities.
    """
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_width: int,
    temperature: float,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every response token, and the entropy of its distribution if asked for.

    input_ids, attention_mask (B,P+T), response_width T -> (B,T) and (B,T) or None. Slots past a row's length
    hold whatever the padding gives: mask before use.
    """
    logits = _response_outputs(model, input_ids, attention_mask, response_width)
    logp = token_logprobs(logits, input_ids[:, -response_width:], temperature)
    return logp, entropy(logits, temperature) if with_entropy else None


def response_values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
    """V(s_t), the value of the state in which response token t is chosen: (B,P+T) -> (B,T) float32 or wider.

    `model` gives logits (B,P+T,1); the columns are those of `response_logprobs`.
    """
    return _wide(_response_outputs(model, input_ids, attention_mask, response_width)[..., 0])


def _response_outputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_width: int) -> Tensor:
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).logits
    return logits[:, -response_width - 1 : -1]


def _chunked(function: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Applies `function` to blocks of columns, recomputing each block in the backward pass.

    `split` and not slices: its backward joins the gradients of the blocks once, where every slice would
    allocate a gradient of the full width.
    """
    columns = max(1, CHUNK_TOKENS // max(1, logits.shape[0]))
    blocks = zip(logits.split(columns, dim=1), tokens.split(columns, dim=1), strict=True)
    parts = [
        checkpoint(function, block, chosen, temperature, use_reentrant=False, preserve_rng_state=False)
        for block, chosen in blocks
    ]
    return torch.cat(cast("list[Tensor]", parts), dim=1)


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    scaled = _wide(logits) / temperature
    return scaled.gather(-1, tokens[..., None])[..., 0] - scaled.logsumexp(-1)


def _entropy(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    scaled = _wide(logits) / temperature
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def _wide(x: Tensor) -> Tensor:
    """At least float32: in bfloat16 a log-softmax is wrong by 0.016 per token."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
