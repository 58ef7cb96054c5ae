"""The optimiser step that processes under DeepSpeed and a single one both take."""

from __future__ import annotations

from typing import Any

import torch

from tests.generation.vllm_models import VOCABULARY

LEARNING_RATE = 0.1


def batch() -> torch.Tensor:
    """Ids (2, 12): a row for each of two processes, as long as each other, so that the mean of their means is the mean
    over both."""
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def alone(model: Any) -> Any:
    """The model after the step on both rows in one process."""
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE)
    model(input_ids=batch(), labels=batch()).loss.backward()
    optimiser.step()
    return model
