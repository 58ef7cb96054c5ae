"""What samples when a trained policy is measured."""

from __future__ import annotations

import math

import pytest

from align.errors import ConfigError
from tests.models.tiny import FOR_VLLM, new_opened, save_policy
from tests.stages.harness import LORA, STEPS


def test_vllm_measures_a_trained_adapter(new_run, tmp_path):
    """Of a shape that vLLM can run; the engine is held against the policy before it is believed."""
    wide = save_policy(new_opened(config=FOR_VLLM), tmp_path / "wide" / "model")
    run = new_run("dpo", tmp_path / "dpo", **LORA).at(tmp_path / "dpo", policy=wide, evaluation={"engine": "vllm"})
    metrics = run().metrics
    assert metrics["prompts"] == 4 and metrics["response_length"] <= 6
    assert math.isfinite(metrics["kl"]) and metrics["kl"] != 0


def test_training_is_kept_when_the_engine_cannot_run_the_policy(new_run, tmp_path):
    """vLLM has no kernel for heads of 16 on a CPU. With another engine the stage goes on from its last step: the
    engine is no part of what the stage makes."""
    run = new_run("sft", tmp_path)
    with pytest.raises(ConfigError, match="engine vllm cannot run"):
        run.at(tmp_path, evaluation={"engine": "vllm"})()
    trained = run.metrics()
    steps: list[int] = []
    result = run(lambda context, step: steps.append(step))
    assert not steps and run.metrics() == trained and trained[-1]["step"] == STEPS
    assert result.metrics["prompts"] == 4
