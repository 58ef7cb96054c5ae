"""A start policy, data files and runs of the TRL stages. What a finished run leaves is shared and never changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from align.job import Input, StageResult
from tests.models.tiny import new_opened, save_policy
from tests.stages.harness import KINDS, Run, write_data

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Input:
    """The committed policy that stages start from."""
    return save_policy(new_opened(), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The data file of each kind of stage."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def new_run(base: Input, files: dict[str, str]) -> Callable[..., Run]:
    """Makes a run of a kind of stage in a folder of the test's own; keywords change settings."""

    def make(kind: str, directory: Path, **settings: Any) -> Run:
        data = {"path": files[kind], "held_out": 0.2}
        return Run(kind, directory, base, {**KINDS[kind], "data": data, **settings})

    return make


@pytest.fixture(scope="session")
def finished(
    new_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Run, StageResult]]:
    """Gives a run to the end, made on first use; `lora` is a bool. Read only."""

    @cache
    def get(kind: str, lora: bool = False) -> tuple[Run, StageResult]:
        settings = {"lora": {"rank": 4, "alpha": 8}} if lora else {}
        run = new_run(kind, tmp_path_factory.mktemp(kind), **settings)
        return run, run()

    return get
