"""A model as a stage holds it: weights, tokenizer and renderer, checked against what was saved; and its way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align import ranks
from align.data.render import Renderer
from align.job import Input
from align.models.handover import probe_values, verify_loaded, verify_saved
from align.models.load import load_policy, load_reward, load_tokenizer, local_folder, new_reward
from align.models.lora import merged, save_adapter
from align.models.partitioned import layer_by_layer
from align.models.save import save_model

Loader = Callable[[Input, PreTrainedTokenizerBase, torch.dtype, str | None], Any]


@dataclass
class Opened:
    """A loaded model and the tokenizer and renderer that belong to it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    quantisation_moved: float | None = None
    """How far quantisation moved the probes that came with the policy, in nats per token."""


def open_policy(
    source: Input, template: str, dtype: torch.dtype = torch.float32, quantise: str | None = None
) -> Opened:
    """Loads a policy, frozen and in 4 bits with `quantise`, and repeats the hand-over check on it."""
    return _open(source, template, dtype, quantise, load_policy)


def open_reward(source: Input, template: str, dtype: torch.dtype = torch.float32) -> Opened:
    """Loads a reward model and repeats the hand-over check on it."""
    return _open(source, template, dtype, None, load_reward)


def open_as_reward(
    source: Input, template: str, dtype: torch.dtype = torch.float32, quantise: str | None = None
) -> Opened:
    """A reward model with a new head on a policy's backbone. The policy itself is checked first."""
    opened = open_policy(source, template, dtype, quantise)
    opened.model = new_reward(source, opened.tokenizer, dtype, quantise)
    return opened


def commit_policy(
    staging: AbstractContextManager[Path], trained: Any, opened: Opened, probes: Sequence[list[int]]
) -> tuple[Any, dict[str, Any]]:
    """Saves the effective policy (adapters merged) and checks the hand-over. Returns it and the check's result. Of
    several processes, each with the whole model, the first saves and checks.

    The values to meet are those of `trained`, before merging: what was trained, not what was merged, must arrive.
    """
    return _commit(staging, trained, opened, probes, is_reward=False)


def commit_reward(
    staging: AbstractContextManager[Path], trained: Any, opened: Opened, probes: Sequence[list[int]]
) -> tuple[Any, dict[str, Any]]:
    """Saves the effective, normalised reward model and checks the hand-over, as `commit_policy` does."""
    return _commit(staging, trained, opened, probes, is_reward=True)


def _commit(
    staging: AbstractContextManager[Path],
    trained: Any,
    opened: Opened,
    probes: Sequence[list[int]],
    *,
    is_reward: bool,
) -> tuple[Any, dict[str, Any]]:
    expected, dtype = probe_values(trained, probes, is_reward=is_reward), trained.dtype
    if not ranks.is_main():
        return merged(trained), ranks.share(None)
    with staging as folder:
        save_adapter(trained, folder)
        effective = merged(trained)
        save_model(effective, opened.tokenizer, folder, opened.renderer)
        result = verify_saved(
            folder,
            opened.tokenizer,
            opened.renderer,
            probes,
            expected,
            dtype=dtype,
            is_reward=is_reward,
        )
    if opened.quantisation_moved is not None:
        result["quantisation_moved"] = opened.quantisation_moved
    return effective, ranks.share(result)


def _open(source: Input, template: Any, dtype: torch.dtype, quantise: str | None, load: Loader) -> Opened:
    tokenizer = load_tokenizer(source)
    renderer = Renderer(tokenizer, template)
    model = load(source, tokenizer, dtype, quantise)
    folder = local_folder(source)
    with layer_by_layer(model):
        difference = verify_loaded(model, folder, tokenizer, renderer, source.source, quantised=bool(quantise))
    return Opened(model, tokenizer, renderer, difference if quantise else None)
