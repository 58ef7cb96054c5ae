"""The demo over several seeds, as a Markdown table: `python benchmarks/demo_seeds.py [SEED ...]`.

Every seed is its own run folder under runs/, so a second call reuses what is there. With `--twice` the first seed is
run a second time from nothing, and the hashes of all weights are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STAGES = ("base", "sft", "reward", "ppo", "dpo")
RUNS = Path("runs")


def run(seed: int, name: str) -> dict[str, Any]:
    """Runs the demo with a seed; returns the record of each stage."""
    command = [sys.executable, "-m", "align", "run", "sft", "reward", "ppo", "dpo", f"seed={seed}"]
    subprocess.run([*command, "--run", name, "--runs", str(RUNS), "-c", "configs/demo.yaml"], check=True)
    return {stage: newest_record(RUNS / name / stage) for stage in STAGES}


def newest_record(folder: Path) -> dict[str, Any]:
    """The record of a stage's latest finished attempt."""
    records = sorted(folder.glob("*/record.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(records[-1].read_text(encoding="utf-8"))


def with_interval(metrics: dict[str, Any], key: str, digits: int) -> str:
    """A metric and its 95 % interval as text."""
    low, high = metrics[f"{key}_ci95"]
    return f"{metrics[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(results: dict[int, dict[str, Any]]) -> str:
    """One row per seed."""
    lines = [
        "| seed | base gold | SFT gold | PPO gold | PPO KL | PPO EOS | DPO gold | DPO KL | reward accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, records in results.items():
        metrics = {stage: record["metrics"] for stage, record in records.items()}
        cells = [
            str(seed),
            *(with_interval(metrics[stage], "gold", 3) for stage in ("base", "sft", "ppo")),
            with_interval(metrics["ppo"], "kl", 1),
            f"{metrics['ppo']['eos_rate']:.3f}",
            with_interval(metrics["dpo"], "gold", 3),
            with_interval(metrics["dpo"], "kl", 1),
            with_interval(metrics["reward"], "accuracy", 3),
            " + ".join(f"{records[stage]['seconds']:.0f}" for stage in STAGES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weights(records: dict[str, Any]) -> dict[str, str]:
    """sha256 of each stage's weights."""
    return {stage: record["files"]["model.safetensors"]["sha256"] for stage, record in records.items()}


def main() -> None:
    """Parses the seeds, runs, prints."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--twice"]
    seeds = [int(argument) for argument in arguments] or [0, 1, 2]
    results = {seed: run(seed, f"seed-{seed}") for seed in seeds}
    print(table(results))
    if "--twice" in sys.argv:
        first, again = weights(results[seeds[0]]), weights(run(seeds[0], f"seed-{seeds[0]}-again"))
        for stage in STAGES:
            print(f"{stage}: {'same' if first[stage] == again[stage] else 'DIFFERENT'} weights, {first[stage][:16]}")


if __name__ == "__main__":
    main()
