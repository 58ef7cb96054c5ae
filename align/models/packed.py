"""Passes over a padded batch that leave its padding out.

A batch of B rows and L columns with N tokens is computed as one row of N: embeddings, projections, norms and the
feed-forward layers see no padding. Only attention, which may not look from one row into another, sees a grid of rows,
left-aligned and as wide as the longest (W). There the causal mask alone hides the padding, and SDPA takes its fast
path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

NAME = "align_packed"
"""Of this attention, in transformers' register."""
FULL = "full_attention"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed between what two ways of computing the same give, relative to the largest value, by the
dtype of the weights."""

_ASKS_FOR_STATES = {"attention_mask", "use_cache"}
"""The arguments, with the token ids, of a pass that wants the last states of a padded batch and nothing else."""

_is_packed = ContextVar("_is_packed", default=False)


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B,L) -> (B,L): a row's first attended token is at 0, however much padding is on its left.

    Passed in every forward: a model that counts from the left edge gives left-padded rows other
    log-probabilities.
    """
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Packing:
    """Where the N tokens of a padded batch are in the grid (B,W)."""

    rows: int
    width: int
    slots: Tensor
    """(N,) the slot of each token."""
    sources: Tensor
    """(B*W,) the token in each slot. Empty slots hold the first token: nobody attends to them, nobody reads them."""

    @classmethod
    def of(cls, valid: Tensor) -> Packing:
        """valid (B,L) bool."""
        lengths = valid.sum(1)
        rows, width = len(valid), int(lengths.max())
        places = valid.cumsum(1) - 1 + width * torch.arange(rows, device=valid.device)[:, None]
        slots = places[valid]
        sources = slots.new_zeros(rows * width)
        sources[slots] = torch.arange(len(slots), device=slots.device)
        return cls(rows, width, slots, sources)

    def grid(self, tokens: Tensor) -> Tensor:
        """(1,heads,N,D) -> (B,heads,W,D)."""
        flat = tokens[0].transpose(0, 1)
        spread: Any = _Spread.apply(flat, self.slots, self.sources)
        return spread.view(self.rows, self.width, *flat.shape[1:]).transpose(1, 2)

    def tokens(self, grid: Tensor) -> Tensor:
        """(B,heads,W,D) -> (1,N,heads,D)."""
        flat = grid.transpose(1, 2).reshape(self.rows * self.width, *grid.shape[1::2])
        return flat.index_select(0, self.slots)[None]


class _Spread(Function):
    """Tokens to slots. Backward is a read and not a sum: gradients at empty slots are of no token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return tokens.index_select(0, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots), None, None


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention of packed rows, by transformers' interface: query (1,heads,N,D), the others perhaps with fewer heads ->
    (1,N,heads,D). Of a padded batch: SDPA as ever."""
    packing = arguments.pop("packing", None)
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)  # type: ignore[return-value]
    grid = scaled_dot_product_attention(
        *(packing.grid(part) for part in (query, key, value)),
        dropout_p=arguments.get("dropout", 0.0),
        is_causal=True,
        scale=arguments.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return packing.tokens(grid), None


def mask(*arguments: Any, **named: Any) -> Tensor | None:
    """No mask for packed rows, SDPA's for a padded batch."""
    return None if _is_packed.get() else sdpa_mask(*arguments, **named)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


def packs(body: Any) -> bool:
    """Whether a body leaves the padding out."""
    return body.config._attn_implementation == NAME


def packed_states(body: Callable, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """The last hidden states (B,L,H) of a padded batch, (B,L) each; 0 at padding. `body` is a transformer that packs,
    or its forward."""
    valid = attention_mask.bool()
    packing = Packing.of(valid)
    with _packed():
        states = body(
            input_ids=input_ids[valid][None],
            position_ids=position_ids[valid][None],
            packing=packing,
            use_cache=False,
        ).last_hidden_state[0]
    places = valid.flatten().nonzero()[:, 0]
    return states.new_zeros(valid.numel(), states.shape[1]).index_copy(0, places, states).view(*valid.shape, -1)


def pack(body: Any) -> bool:
    """Makes a transformer leave the padding out, if it then gives the same states. Says whether it does.

    It must be one whose attention is SDPA, looks at the whole row, and is told of the packing.
    """
    config = body.config
    if packs(body):
        return True
    if config._attn_implementation != "sdpa" or _looks_at_a_part(config.get_text_config()):
        return False
    config._attn_implementation = NAME
    if _gives_the_same(body):
        return True
    config._attn_implementation = "sdpa"
    return False


def leave_out_padding(body: Any) -> bool:
    """Makes a transformer that can do so leave padding out whoever calls it with a padded batch and asks for its last
    states only, as TRL's trainers do. All other calls, those of generation among them, are as before. Says whether it
    can."""
    if not pack(body):
        return False
    padded = body.forward

    @wraps(padded)
    def forward(input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        asked = {name for name, value in kwargs.items() if value is not None}
        if input_ids is None or args or asked != _ASKS_FOR_STATES or kwargs["use_cache"]:
            return padded(input_ids, *args, **kwargs)
        valid = kwargs["attention_mask"]
        states: Any = packed_states(padded, input_ids, valid, position_ids(valid))
        return BaseModelOutputWithPast(last_hidden_state=states)

    body.forward = forward
    return True


def _looks_at_a_part(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    return set(kinds) != {FULL} if kinds else getattr(config, "sliding_window", None) is not None


@torch.no_grad()
def _gives_the_same(body: Any) -> bool:
    """On three rows of unequal length, padded on both sides."""
    device = next(body.parameters()).device
    valid = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0]], device=device)
    ids, positions = torch.arange(15, device=device).view(3, 5), position_ids(valid)
    was_training = body.training
    body.eval()
    try:
        expected = body(input_ids=ids, attention_mask=valid, position_ids=positions, use_cache=False).last_hidden_state
        found = packed_states(body, ids, valid, positions)
    except (TypeError, ValueError, RuntimeError):  # does not take what packing needs
        return False
    finally:
        body.train(was_training)
    difference = (found - expected)[valid.bool()].abs().max()
    return float(difference) <= TOLERANCE[found.dtype] * max(1.0, float(expected.abs().max()))


@contextmanager
def _packed() -> Iterator[None]:
    token = _is_packed.set(True)
    try:
        yield
    finally:
        _is_packed.reset(token)
