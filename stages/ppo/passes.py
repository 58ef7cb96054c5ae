"""Forward passes over responses: in which precision and which micro-batches, and what the models say of a rollout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from align.models.roles import Role
from align.training.logprobs import response_states, state_logprobs, state_values
from align.training.masked import Processes
from stages.ppo.config import Config
from stages.ppo.packing import micro_batches
from stages.ppo.rollout import Responses

View = Callable[[Responses], dict[str, Tensor]]
"""What a role says of some responses, by name."""


class Passes:
    """Whatever a role computes happens inside `role.active()`; `precision` is the dtype of it."""

    def __init__(
        self,
        config: Config,
        actor: Role,
        critic: Role | None,
        reference: Role,
        processes: Processes,
        precision: torch.dtype,
    ):
        self.config, self.processes, self.precision = config, processes, precision
        self.actor, self.critic, self.reference = actor, critic, reference
        self.shares_states = config.has_critic and config.critic.kind == "shared-head"
        """Whether the critic is a head on the actor's states."""

    def autocast(self) -> torch.autocast:
        """The precision that passes are computed in."""
        return torch.autocast(self.actor.device.type, dtype=self.precision, enabled=self.precision is not torch.float32)

    def micro_batches(self, responses: Responses, picked: Tensor | None = None) -> list[Tensor]:
        """The rows of each forward pass, of all rows or of those picked. Row numbers stay on the CPU. Every process
        makes as many passes as the one that needs most, at last without rows: a model may be in parts on all of them.
        """
        picked = torch.arange(len(responses.lengths)) if picked is None else picked
        lengths = responses.prompt_lengths[picked].cpu(), responses.lengths[picked].cpu()
        parts = micro_batches(*lengths, self.config.micro_batch_size, self.config.micro_batch_tokens)
        passes = int(self.processes.max(torch.tensor([len(parts)])))
        return [picked[part] for part in parts] + [picked[:0]] * (passes - len(parts))

    def states(self, role: Role, batch: Responses) -> Tensor:
        """As `response_states`, also of a batch without rows."""
        if not len(batch.lengths):  # a pass all the same, of two tokens that count for nothing
            ids = batch.input_ids.new_zeros(1, 2)
            return response_states(role, ids, torch.ones_like(ids), 1)[:0]
        return response_states(role, batch.input_ids, batch.attention_mask, batch.width)

    def look(self, responses: Responses) -> dict[str, Tensor]:
        """logp, reference, entropy (B,T) and, with a critic, values (B,T+1) of all responses; 0 where masked."""
        order = self.micro_batches(responses)
        batches = [responses.rows(index) for index in order]
        views: list[tuple[Role, View]] = [(self.actor, self._actors_view), (self.reference, self._references_view)]
        if self.critic is not None and not self.shares_states:
            views.append((self.critic, self._critics_view))
        back, seen = torch.cat(order).argsort(), {}
        for role, view in views:
            seen |= {name: part[back] for name, part in self._view(role, view, batches, responses.width).items()}
        return seen

    def _view(self, role: Role, view: View, batches: Sequence[Responses], width: int) -> dict[str, Tensor]:
        """What a role says of all batches: an offloaded one is moved once."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        with role.active(), self.autocast():
            for batch in batches:
                for name, part in view(batch).items():
                    parts[name].append(nn.functional.pad(part, (0, width - batch.width)))
        return {name: torch.cat(part) for name, part in parts.items()}

    def _actors_view(self, batch: Responses) -> dict[str, Tensor]:
        states = self.states(self.actor, batch)
        temperature = self.config.rollout.temperature
        logp, entropy = state_logprobs(
            self.actor, states[:, :-1], batch.tokens, batch.mask, temperature, with_entropy=True
        )
        assert entropy is not None
        seen = {"logp": logp, "entropy": entropy}
        if self.critic is not None and self.shares_states:
            seen["values"] = state_values(self.critic, states)
        return seen

    def _references_view(self, batch: Responses) -> dict[str, Tensor]:
        states, temperature = self.states(self.reference, batch), self.config.rollout.temperature
        logp, _ = state_logprobs(self.reference, states[:, :-1], batch.tokens, batch.mask, temperature)
        return {"reference": logp}

    def _critics_view(self, batch: Responses) -> dict[str, Tensor]:
        assert self.critic is not None
        return {"values": state_values(self.critic, self.states(self.critic, batch))}
