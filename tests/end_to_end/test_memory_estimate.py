"""What `align plan --memory` says is what a real stage needs: a small instance of benchmarks/memory_estimate.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
name: estimate
evaluation: {prompts: 2, max_response_tokens: 4}
base: {data: rows.jsonl, vocabulary: 300, embeddings: 8192, context: 256, hidden: 768, layers: 4, heads: 12, steps: 0}
sft: {data: {path: rows.jsonl, held_out: 0.2}, max_steps: 2, batch_size: 4, max_length: 256,
  gradient_checkpointing: auto}
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    words = "the moon and a red lamp over some old boat with no door at all " * 3
    rows = [{"prompt": f"{number} {words}", "response": words} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "align.yaml").write_text(RECIPE)
    return tmp_path


def test_the_peak_of_sft_is_within_fifteen_percent(here):
    """44 million numbers, 170 MiB of weights; the estimate is made before the stage runs. When it starts, the same
    estimate says whether activations have to be computed again; where memory is ample they are not."""

    def align(*arguments: str) -> str:
        command = [sys.executable, "-m", "align", *arguments]
        return subprocess.run(command, cwd=here, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout

    align("run", "base")
    planned = json.loads(align("plan", "sft", "--memory", "--json"))
    estimate = planned["memory"]["sft"]
    assert estimate["steps"] == 2 and estimate["tokens"] > 0
    align("run", "sft")
    record = json.loads(Path(planned["stages"][-1]["directory"], "record.json").read_text())
    decided = record["decided"]
    assert decided["gradient_checkpointing"] == ("none" if decided["needs"] <= 0.85 * decided["room"] else "full")
    assert decided["needs"] == estimate["peak"]
    assert record["metrics"]["trained_parameters"] == estimate["trained_parameters"]
    assert estimate["peak"] == pytest.approx(record["peak_memory"]["resident"], rel=0.15)
