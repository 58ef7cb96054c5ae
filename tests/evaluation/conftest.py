"""A tiny policy in memory, shared and never changed."""

from __future__ import annotations

import pytest
import torch

from align.models.opened import Opened
from tests.models.tiny import new_opened

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy() -> Opened:
    """A policy with random weights."""
    return new_opened()


@pytest.fixture(scope="session")
def other() -> Opened:
    """Another one, with the same tokenizer."""
    return new_opened(seed=1)
