"""Whether an engine samples from the policy that is trained: its weights and its log-probabilities against ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align import ranks
from align.errors import RolloutError
from align.generation.engine import RolloutEngine, Samples, Sampling, left_pad
from align.models.roles import Role
from align.training.logprobs import response_states, state_logprobs
from align.training.masked import length_mask

BOUNDS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference allowed between two log-probabilities of a token, in nats, by the dtype of the engine. Measured on
CPU: 1e-5 in float32, 0.1 in bfloat16."""
NUM_PROBES, PROBE_TOKENS = 4, 8
SHOWN = 4


@dataclass(frozen=True)
class ParityGuard:
    """Checks an engine after each hand-over, on responses that it samples to a few prompts: through its prefill, its
    decoding and its cache."""

    engine: RolloutEngine
    policy: Role
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    """As in the rollouts."""
    dtype: torch.dtype
    """The engine's."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """Around our own computation, as in training."""

    def check(self) -> None:
        """Raises RolloutError, with the weights or the gap at fault, when the engine is not the policy; in all
        processes, which come here with an engine each."""
        if not self.engine.independent:
            return
        with ranks.failing_together(RolloutError):
            differing = self.engine.differing()
            if differing:
                raise RolloutError(
                    f"the {self.engine.name} engine holds other weights than the policy: {listed(differing)}"
                )
        gap, bound = self.gap(), BOUNDS[self.dtype]
        with ranks.failing_together(RolloutError):
            if not gap <= bound:
                precision = str(self.dtype).removeprefix("torch.")
                raise RolloutError(
                    f"the {self.engine.name} engine's log-probabilities of sampled tokens differ from the policy's by "
                    f"up to {gap:.3g} nats (bound in {precision}: {bound:g}), with the same weights as far as they can "
                    "be compared: it computes otherwise. Use rollout.engine=transformers, and report the architecture"
                )

    def gap(self) -> float:
        """The largest difference between two log-probabilities of a sampled token, in nats. Raises RolloutError in all
        processes when the engine of one gives up."""
        prompts = self.prompts[:NUM_PROBES]
        few = replace(self.sampling, max_tokens=min(PROBE_TOKENS, self.sampling.max_tokens))
        with ranks.failing_together(RolloutError):  # what follows needs all of them, where the policy is in parts
            samples = self.engine.generate(prompts, few)
        assert samples.logprobs is not None
        with self.policy.evaluating(), self.autocast():
            ours = sampled_logprobs(self.policy, prompts, samples, few)
        valid = length_mask(samples.lengths, samples.token_ids.shape[1])
        return float((ours.cpu() - samples.logprobs)[valid].abs().max())


def sampled_logprobs(role: Role, prompts: Sequence[Sequence[int]], samples: Samples, sampling: Sampling) -> Tensor:
    """(B,T) log-probabilities of sampled tokens by our own code, at the temperature of the samples."""
    ids, mask = left_pad(prompts, sampling.pad_id, role.device)
    tokens = samples.token_ids.to(role.device)
    valid = length_mask(samples.lengths.to(role.device), tokens.shape[1])
    states = response_states(role, torch.cat([ids, tokens], 1), torch.cat([mask, valid.long()], 1), tokens.shape[1])
    return state_logprobs(role, states[:, :-1], tokens, valid, sampling.temperature)[0]


def listed(names: Sequence[str]) -> str:
    """The layers that weights belong to, the first few by name."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    more = len(layers) - SHOWN
    return ", ".join(layers[:SHOWN]) + (f" and {more} more" if more > 0 else "")
