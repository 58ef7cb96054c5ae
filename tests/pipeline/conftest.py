"""The toy run, for every test here. Its modules are also imported by workers, so they are no package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from toy_run import Toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A fresh folder with a recipe of base, sft, reward and ppo."""
    return Toy(tmp_path)
