"""The toy run of tests/pipeline on a fake Slurm. Modules that workers import are in no package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))
sys.path.append(str(Path(__file__).parent))

from cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A fresh one."""
    return Cluster(tmp_path)
