"""Models of this folder's tests: made once, never downloaded, never changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from align.job import Input
from align.models.lora import without_wrapper
from align.models.opened import Opened, commit_reward, open_as_reward, open_policy, open_reward
from align.models.reward import normalise
from align.records import committed_folder
from tests.models.tiny import model_input, new_opened, probes, save_policy, trained_adapter

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    """A committed policy. Read only."""
    return save_policy(new_opened(), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def reward(base: Input, tmp_path_factory: pytest.TempPathFactory) -> Input:
    """A committed reward model with an offset. Read only."""
    torch.manual_seed(1)
    opened = open_as_reward(base, "auto")
    opened.model.config.reward_offset = -0.75
    folder = tmp_path_factory.mktemp("reward") / "model"
    commit_reward(committed_folder(folder), opened.model, opened, probes(opened.renderer))
    return model_input(folder, "reward")


@pytest.fixture(scope="session")
def lora_reward(base: Input, tmp_path_factory: pytest.TempPathFactory) -> Input:
    """A committed reward model that was trained as an adapter on the policy: whole, with the adapter beside it. Read
    only."""
    opened = open_as_reward(base, "auto")
    lora = trained_adapter(opened.model, is_reward=True)
    normalise(without_wrapper(lora), 0.3, 0.5)
    folder = tmp_path_factory.mktemp("lora_reward") / "model"
    commit_reward(committed_folder(folder), lora, opened, probes(opened.renderer))
    return model_input(folder, "reward")


@pytest.fixture
def policy(base: Input) -> Opened:
    """The policy in memory, a fresh one for every test."""
    return open_policy(base, "auto")


@pytest.fixture
def scorer(reward: Input) -> Opened:
    """The reward model in memory, a fresh one for every test."""
    return open_reward(reward, "auto")


@pytest.fixture
def damaged(base: Input, tmp_path: Path) -> Path:
    """A copy of the policy's folder, to be damaged."""
    return Path(shutil.copytree(base.path, tmp_path / "damaged"))
