"""A model in one role: actor, reference, critic or reward.

Several roles may share a body (align.models.adapters), so a role says how to switch to it: whatever it computes,
forward and backward, happens inside `role.active()`. A role gives hidden states and a head apart, so that a head is
computed where it is needed only, and logits (B,L,V) never exist.

B rows, L columns, H width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from align.errors import ArtifactError
from align.models.load import OFFSET_FIELD
from align.models.lora import without_wrapper
from align.models.packed import TOLERANCE, packed_states, packs
from align.models.recomputation import recompute

NUM_CHECKED = 4


@dataclass(frozen=True)
class Role:
    """A body that gives hidden states, a head on them, and the switch that makes the body play this role."""

    module: nn.Module
    """All weights of the role, perhaps with those of others."""
    body: Any
    """The transformer without its head."""
    head: Callable[[Tensor], Tensor]
    """states (...,H) -> logits (...,V), or one number (...,1)."""
    width: int
    """H."""
    switch: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes the body play this role, and undoes it."""
    trained: Callable[[], Iterator[tuple[str, nn.Parameter]]] | None = None
    """The parameters that are trained in this role; None: those of `module` that require a gradient."""

    def states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """The last hidden states: (B,L) each -> (B,L,H). At padding they mean nothing."""
        if packs(self.body):
            return packed_states(self.body, input_ids, attention_mask, position_ids)
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if "position_ids" not in inspect.signature(self.body.forward).parameters:
            del arguments["position_ids"]  # an architecture that derives positions from the mask
        return self.body(**arguments, use_cache=False).last_hidden_state

    def active(self) -> AbstractContextManager[Any]:
        """Inside, the body plays this role; after, what it played before. Re-entrant."""
        return self.switch()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the role is active, in evaluation mode, and no gradients are kept."""
        was_training = self.module.training
        with self.active(), torch.no_grad():
            self.module.eval()
            try:
                yield
            finally:
                self.module.train(was_training)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained in this role, under names that do not change."""
        if self.trained is not None:
            return self.trained()
        return trainable(self.module)

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained in this role."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def device(self) -> torch.device:
        """Where the body is."""
        return next(self.body.parameters()).device

    def to(self, device: torch.device | str) -> Role:
        """Moves all weights."""
        self.module.to(device)
        return self

    def checkpoint_gradients(self, how: str = "full") -> None:
        """Recomputes the body's activations in the backward pass (align.models.recomputation)."""
        recompute(self.body, how)
        self.body.train()


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that require a gradient."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def causal_role(model: Any, fp32_head: bool = False) -> Role:
    """A causal language model of transformers, or a PeftModel around one with its active adapter.

    `fp32_head` computes logits in float32, outside autocast. Raises ArtifactError for an architecture that does
    something to its logits that is not known here.
    """
    inner = without_wrapper(model)
    head = LogitsHead(inner, fp32_head)
    role = Role(model, inner.base_model, head, head.width)
    _check_logits(role, inner)
    return role


def reward_role(model: Any) -> Role:
    """A sequence-classification reward model, or a PeftModel around one. Its scores are normalised: `reward_offset` of
    the config is part of the head."""
    inner = without_wrapper(model)

    def head(states: Tensor) -> Tensor:
        return score(states, inner.score.weight, getattr(inner.config, OFFSET_FIELD, 0.0))

    return Role(model, inner.base_model, head, inner.score.weight.shape[1])


def score(states: Tensor, weight: Tensor, offset: float | Tensor) -> Tensor:
    """A reward model's head: states (...,H), weight (1,H) -> (...,1) in float32 or wider. In bfloat16 it would have
    steps of 0.008 around 1, and answers would tie."""
    weight = wide(weight).to(states.device)
    dtype = torch.promote_types(weight.dtype, states.dtype)
    with torch.autocast(states.device.type, enabled=False):
        return nn.functional.linear(states.to(dtype), weight.to(dtype)) + offset


def offloaded(role: Role, device: torch.device) -> Role:
    """The same frozen role with its weights in CPU memory, on `device` only while it is active. On a CPU: the role
    itself."""
    if device.type == "cpu":
        return role
    role.to("cpu")
    depth = 0

    @contextmanager
    def switch() -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            with _moved(role.module, device) if depth == 1 else nullcontext(), role.active():
                yield
        finally:
            depth -= 1

    return replace(role, switch=switch)


@contextmanager
def _moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies frozen weights to a device. They did not change there, so nothing is copied back."""
    tensors = [*module.parameters(), *module.buffers()]
    at_home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, at_home, strict=True):
            tensor.data = home


class LogitsHead:
    """What a causal language model does to its last hidden states: the output embedding, then what its architecture
    does to the logits."""

    MULTIPLIED = ("logit_scale", "lm_head_multiplier")
    """Fields of the config by which Cohere, Falcon-H1 multiply."""
    DIVIDED = "logits_scaling"
    """By which Granite and MiniCPM3 divide; HyperCLOVA X multiplies."""
    CAPPED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    """Gemma, RecurrentGemma, xLSTM: c * tanh(logits / c)."""

    def __init__(self, model: Any, in_float32: bool = False):
        self.module, self.in_float32 = model.get_output_embeddings(), in_float32
        if not isinstance(getattr(self.module, "weight", None), Tensor):
            raise _unknown(model)
        self.width: int = self.module.weight.shape[1]
        config = model.config.get_text_config()
        fields = {name: getattr(config, name, None) for name in (*self.MULTIPLIED, self.DIVIDED, *self.CAPPED)}
        given = {name: float(value) for name, value in fields.items() if value is not None}
        scaling = given.get(self.DIVIDED, 1.0)
        multiplies = config.model_type == "hyperclovax"
        self.factor = scaling if multiplies else 1.0
        self.divisor = 1.0 if multiplies else scaling
        for name in self.MULTIPLIED:
            self.factor *= given.get(name, 1.0)
        self.cap = next((given[name] for name in self.CAPPED if name in given), None)

    def __call__(self, states: Tensor) -> Tensor:
        """states (...,H) -> logits (...,V)."""
        logits = self._float32(states) if self.in_float32 else self.module(states.to(self.module.weight.dtype))
        if self.factor != 1:
            logits = logits * self.factor
        if self.divisor != 1:
            logits = logits / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _float32(self, states: Tensor) -> Tensor:
        weights = {name: wide(parameter) for name, parameter in self.module.named_parameters()}
        with torch.autocast(states.device.type, enabled=False):
            return functional_call(self.module, weights, (wide(states),))


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_logits(role: Role, model: Any) -> None:
    """Raises ArtifactError unless body and head give the library's own logits on a few tokens."""
    ids = torch.arange(NUM_CHECKED, device=role.device)[None]
    mask = torch.ones_like(ids)
    with role.evaluating():
        # Not `model(...)`: a trainer may have wrapped this model's forward in autocast, which rounds.
        expected = type(model).forward(model, input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = role.head(role.states(ids, mask, ids))
    if found.shape != expected.shape:
        raise _unknown(model)
    bound = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32]) * max(1.0, float(expected.abs().max()))
    if not float((found - expected).abs().max()) <= bound:
        raise _unknown(model)


def _unknown(model: Any) -> ArtifactError:
    return ArtifactError(
        f"{type(model).__name__}: this architecture does something to its logits that align does not know "
        "(align/models/roles.py, LogitsHead); it cannot be used as a policy"
    )
