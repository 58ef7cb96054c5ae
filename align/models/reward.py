"""Scores of a reward model: pooled by length, normalised, the same in training, in PPO and after loading.

The saved model is a plain sequence-classification folder. Normalisation r' = (r - mean) / std is part of it: 1/std is
folded into the head's weight; -mean/std is `reward_offset` in config.json, because the head of a sequence
classification model has no bias. `AutoModelForSequenceClassification` gives scores that differ from ours by that
constant only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align.models.load import OFFSET_FIELD
from align.models.roles import Role


def score_sequences(role: Role, sequences: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Normalised scores (B,), float32 or wider, of token sequences, each read at its last token. `role` is a reward
    model's.

    The position comes from the length, never from token ids, so PAD may be any id.
    """
    with role.active():
        device = role.device
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        width = int(lengths.max())
        ids = torch.full((len(sequences), width), pad_id, device=device)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, device=device)
        positions = torch.arange(width, device=device).expand_as(ids)
        states = role.states(ids, (positions < lengths[:, None]).long(), positions)
        last = states[torch.arange(len(sequences), device=device), lengths - 1]
        return role.head(last)[:, 0]


def normalise(model: Any, mean: float, std: float) -> None:
    """Folds (r - mean) / std into the model, in place: the order of any two scores stays."""
    offset = getattr(model.config, OFFSET_FIELD, 0.0)
    with torch.no_grad():
        model.score.weight.div_(std)
    setattr(model.config, OFFSET_FIELD, (offset - mean) / std)
