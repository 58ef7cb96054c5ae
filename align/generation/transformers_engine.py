"""The embedded engine: transformers generation on the trainer's own weights. Always exact, so `sync` has no work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from align.generation.engine import Samples, Sampling, cut_at_stop, left_pad


class TransformersEngine:
    """Samples with `model.generate`, `batch_size` prompts at a time."""

    name = "transformers"
    independent = False
    summary = "on the policy's own weights"

    def __init__(self, model: Any, batch_size: int = 64):
        self.model = model
        self.batch_size = batch_size

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        """One response per prompt. The global random state is left as it was."""
        was_training, use_cache = self.model.training, self.model.config.use_cache
        checkpoint_config = self.model.generation_config
        self.model.eval()
        # `generate` fills what a config leaves open from the checkpoint's own (top_k, repetition_penalty ...).
        self.model.generation_config = GenerationConfig()
        rows: list[torch.Tensor] = []
        try:
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(sampling.seed)
                for start in range(0, len(prompts), self.batch_size):
                    rows.append(self._batch(prompts[start : start + self.batch_size], sampling))
        finally:
            self.model.generation_config = checkpoint_config
            self.model.config.use_cache = use_cache
            self.model.train(was_training)
        width = max(batch.shape[1] for batch in rows)
        padded = [torch.nn.functional.pad(batch, (0, width - batch.shape[1]), value=sampling.pad_id) for batch in rows]
        return cut_at_stop(torch.cat(padded), sampling.stop_ids, sampling.pad_id)

    def sync(self) -> None:
        """Nothing to do: the engine's weights are the trainer's."""

    def rest(self) -> None:
        """Nothing to do: it holds nothing."""

    def differing(self) -> list[str]:
        """None: there is one copy."""
        return []

    def close(self) -> None:
        """Nothing to do: it holds nothing."""

    def _batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> torch.Tensor:
        ids, mask = left_pad(prompts, sampling.pad_id, self.model.device)
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=sampling.pad_id,
            use_cache=True,
        )
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return output[:, ids.shape[1] :]
