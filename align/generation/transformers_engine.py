"""The embedded engine: the trainer's own weights, the library's own forward pass, so `sync` has no work."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from align.errors import ConfigError, NumericError
from align.generation.engine import Samples, Sampling, left_pad, request_seed
from align.models.lora import without_wrapper
from align.models.packed import position_ids
from align.models.partitioned import whole_model


class TransformersEngine:
    """Samples `batch_size` responses at a time. A row leaves the batch when its response ends.

    What is drawn for a prompt depends on the seed and on its place in the call, not on the rows beside it. The global
    random state is left as it was. Raises ConfigError for an architecture without a key-value cache.
    """

    name = "transformers"
    independent = False
    summary = "on the policy's own weights"

    def __init__(self, model: Any, batch_size: int = 64):
        self.model, self.batch_size = model, batch_size
        inner = without_wrapper(model)
        self._takes = set(inspect.signature(inner.forward).parameters)
        if "past_key_values" not in self._takes:
            raise ConfigError(
                f"{type(inner).__name__} has no key-value cache that transformers could sample with; "
                "use rollout.engine=vllm"
            )

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        """One response per prompt, with the log-probabilities of its tokens."""
        was_training = self.model.training
        self.model.eval()
        try:
            with whole_model(self.model):
                parts = [
                    self._batch(
                        prompts[start : start + self.batch_size], _draws(start, self.batch_size, sampling), sampling
                    )
                    for start in range(0, len(prompts), self.batch_size)
                ]
        finally:
            self.model.train(was_training)
        ids, logprobs, lengths, finished = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        width = int(lengths.max())
        return Samples(ids[:, :width], lengths, finished, logprobs[:, :width])

    def sync(self) -> None:
        """Nothing to do: the engine's weights are the trainer's."""

    def rest(self) -> None:
        """Nothing to do: it holds nothing."""

    def differing(self) -> list[str]:
        """None: there is one copy."""
        return []

    def close(self) -> None:
        """Nothing to do: it holds nothing."""

    def _batch(
        self, prompts: Sequence[Sequence[int]], draws: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and log-probabilities (B,max_tokens), PAD and 0 past the end; lengths, and which rows met a stop token,
        (B,)."""
        device, rows = self.model.device, len(prompts)
        new, mask = left_pad(prompts, sampling.pad_id, device)
        draws, stops = draws.to(device), torch.tensor(sampling.stop_ids, device=device)
        ids = torch.full((rows, sampling.max_tokens), sampling.pad_id, device=device)
        logprobs = torch.zeros(rows, sampling.max_tokens, device=device)
        lengths, finished = torch.zeros(2, rows, dtype=torch.long, device=device)
        running, cache = torch.arange(rows, device=device), DynamicCache(config=self.model.config)
        for step in range(sampling.max_tokens):
            logits = self._logits(new, mask, cache)
            every = (logits if sampling.temperature == 1 else logits / sampling.temperature).log_softmax(-1)
            tokens = drawn(every, draws[running, step])
            ids[running, step] = tokens
            logprobs[running, step] = every.gather(1, tokens[:, None])[:, 0]
            ended = torch.isin(tokens, stops)
            lengths[running], finished[running] = step + 1, ended.long()
            if ended.all():
                break
            if ended.any():
                (going,) = (~ended).nonzero(as_tuple=True)
                running, tokens, mask = running[going], tokens[going], mask[going]
                cache.batch_select_indices(going)
            new, mask = tokens[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)
        return ids, logprobs, lengths, finished.bool()

    def _logits(self, new: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """float32 logits (B,V) of the token after the last of `new`; the mask (B,L) is of all tokens so far."""
        arguments = {"position_ids": position_ids(mask)[:, -new.shape[1] :], "logits_to_keep": 1}
        known = {name: value for name, value in arguments.items() if name in self._takes}
        output = self.model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, **known)
        return output.logits[:, -1].float()


def drawn(logprobs: Tensor, draws: Tensor) -> Tensor:
    """Samples by inversion: log-probabilities (B,V), draws (B,) uniform in [0,1) -> tokens (B,), the first at which the
    cumulated probability exceeds the draw. In float64: a sum of 150,000 rounded probabilities is off by more than the
    rare ones have. Raises NumericError when there is no such token."""
    cumulated = logprobs.exp().cumsum(-1, dtype=torch.float64)
    if not cumulated[:, -1].isfinite().all():
        raise NumericError("the policy's logits are not finite: nothing can be sampled from it")
    return torch.searchsorted(cumulated, draws[:, None] * cumulated[:, -1:], right=True)[:, 0]


def _draws(start: int, rows: int, sampling: Sampling) -> Tensor:
    """(rows, max_tokens) uniform numbers, each row from a generator of its own."""
    seeds = [request_seed(sampling.seed, number) for number in range(start, start + rows)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(sampling.max_tokens, generator=one, dtype=torch.float64) for one in generators])
