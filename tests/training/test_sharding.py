"""What DeepSpeed is told, and what is refused before it starts."""

from __future__ import annotations

import pytest

from align.errors import ConfigError
from align.recipe.shipped import shipped_folder
from align.training.sharding import sharding_arguments


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a process that was launched with zero3-nvme."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(shipped_folder("deepspeed") / "zero3_nvme.json"))
    return monkeypatch


def test_a_disk_that_deepspeed_cannot_use_is_refused(launched):
    """It needs a program to be built with libaio; here there is no compiler. Said before a model is loaded."""
    launched.setenv("CC", "false")
    with pytest.raises(ConfigError, match="libaio"):
        sharding_arguments(1, 1, 1.0, in_bfloat16=False)
