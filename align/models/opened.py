"""A model as a stage holds it: weights, tokenizer and renderer, checked against what was saved; and its way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.data.render import Renderer
from align.job import Input
from align.models.handover import probe_values, verify_loaded, verify_saved
from align.models.load import load_policy, load_reward, load_tokenizer, local_folder, new_reward
from align.models.lora import merged, save_adapter
from align.models.save import save_model

Loader = Callable[[Input, PreTrainedTokenizerBase, torch.dtype], Any]


@dataclass
class Opened:
    """A loaded model and the tokenizer and renderer that belong to it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer


def open_policy(source: Input, template: str, dtype: torch.dtype = torch.float32) -> Opened:
    """Loads a policy and repeats the hand-over check on it."""
    return _open(source, template, dtype, load_policy)


def open_reward(source: Input, template: str, dtype: torch.dtype = torch.float32) -> Opened:
    """Loads a reward model and repeats the hand-over check on it."""
    return _open(source, template, dtype, load_reward)


def open_as_reward(source: Input, template: str, dtype: torch.dtype = torch.float32) -> Opened:
    """A reward model with a new head on a policy's backbone. The policy itself is checked first."""
    policy = open_policy(source, template, dtype)
    return Opened(new_reward(source, policy.tokenizer, dtype), policy.tokenizer, policy.renderer)


def commit_policy(
    staging: AbstractContextManager[Path], trained: Any, opened: Opened, probes: Sequence[list[int]]
) -> tuple[Any, dict[str, Any]]:
    """Saves the effective policy (adapters merged) and checks the hand-over. Returns it and the check's result.

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
    expected = probe_values(trained, probes, is_reward=is_reward)
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
            dtype=effective.dtype,
            is_reward=is_reward,
        )
    return effective, result


def _open(source: Input, template: Any, dtype: torch.dtype, load: Loader) -> Opened:
    tokenizer = load_tokenizer(source)
    renderer = Renderer(tokenizer, template)
    model = load(source, tokenizer, dtype)
    verify_loaded(model, local_folder(source), tokenizer, renderer, source.source)
    return Opened(model, tokenizer, renderer)
