"""The demo keeps its promise: PPO is measurably better than SFT on held-out instructions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_improves_on_sft_with_intervals_apart(tmp_path: Path) -> None:
    """`make demo`'s command, seed 0. The bounds are the demo's promise; benchmarks/demo_seeds.py shows three seeds."""
    command = [sys.executable, "-m", "align", "run", "sft", "reward", "ppo", "-c", str(ROOT / "configs/demo.yaml")]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=2400)
    stages = json.loads((tmp_path / "runs/demo/summary.json").read_text(encoding="utf-8"))["stages"]
    sft, ppo, reward = stages["sft"], stages["ppo"], stages["reward"]
    assert ppo["gold"] >= sft["gold"] + 0.15
    assert ppo["gold_ci95"][0] > sft["gold_ci95"][1]
    assert reward["accuracy"] >= 0.75
    assert ppo["eos_rate"] > 0.95
    assert ppo["kl"] > 0
