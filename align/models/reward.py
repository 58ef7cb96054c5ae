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


def score_sequences(model: Any, sequences: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Normalised scores (B,) fp32 of token sequences, each read at its last token.

    The position comes from the length, never from token ids, so PAD may be any id.
    """
    device = model.device
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    width = int(lengths.max())
    ids = torch.full((len(sequences), width), pad_id, device=device)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    positions = torch.arange(width, device=device).expand_as(ids)
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
    ).last_hidden_state
    last = hidden[torch.arange(len(sequences), device=device), lengths - 1]
    # The head in fp32: a bf16 head has steps of 0.008 around 1, and answers would tie.
    scores = torch.nn.functional.linear(last.float(), model.score.weight.float())[:, 0]
    return scores + getattr(model.config, OFFSET_FIELD, 0.0)


def normalise(model: Any, mean: float, std: float) -> None:
    """Folds (r - mean) / std into the model, in place: the order of any two scores stays."""
    offset = getattr(model.config, OFFSET_FIELD, 0.0)
    with torch.no_grad():
        model.score.weight.div_(std)
    setattr(model.config, OFFSET_FIELD, (offset - mean) / std)
