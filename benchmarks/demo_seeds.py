"""The demo over several seeds, as a Markdown table: `python benchmarks/demo_seeds.py [SEED ...]`.

Every seed is its own run folder under runs/, so a second call reuses what is there. With `--twice` the first seed is
run a second time from nothing, and the hashes of all weights are compared.
"""

from __future__ import annotations

import sys

from chain import Finished, run
from pages import table

STAGES = ("base", "sft", "reward", "ppo", "dpo")
HEAD = (
    "seed",
    "base gold",
    "SFT gold",
    "PPO gold",
    "PPO KL",
    "PPO EOS",
    "DPO gold",
    "DPO KL",
    "reward accuracy",
    "seconds",
)


def run_demo(seed: int, name: str) -> dict[str, Finished]:
    """Runs the demo with a seed; returns its stages."""
    return run(("sft", "reward", "ppo", "dpo"), {"seed": seed}, recipe="configs/demo.yaml", name=name)


def with_interval(stage: Finished, name: str, digits: int) -> str:
    """A metric and its 95 % interval as text."""
    metrics = stage.record["metrics"]
    low, high = metrics[f"{name}_ci95"]
    return f"{metrics[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def row(seed: int, stages: dict[str, Finished]) -> list[str]:
    """A seed's cells, as in HEAD."""
    return [
        str(seed),
        *(with_interval(stages[stage], "gold", 3) for stage in ("base", "sft", "ppo")),
        with_interval(stages["ppo"], "kl", 1),
        f"{stages['ppo'].record['metrics']['eos_rate']:.3f}",
        with_interval(stages["dpo"], "gold", 3),
        with_interval(stages["dpo"], "kl", 1),
        with_interval(stages["reward"], "accuracy", 3),
        " + ".join(f"{stages[stage].record['seconds']:.0f}" for stage in STAGES),
    ]


def weights(stages: dict[str, Finished]) -> dict[str, str]:
    """sha256 of each stage's weights."""
    return {stage: stages[stage].record["files"]["model.safetensors"]["sha256"] for stage in STAGES}


def main() -> None:
    """Parses the seeds, runs, prints."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--twice"]
    seeds = [int(argument) for argument in arguments] or [0, 1, 2]
    results = {seed: run_demo(seed, f"seed-{seed}") for seed in seeds}
    print(table(HEAD, [row(seed, stages) for seed, stages in results.items()]))
    if "--twice" in sys.argv:
        first, again = weights(results[seeds[0]]), weights(run_demo(seeds[0], f"seed-{seeds[0]}-again"))
        for stage in STAGES:
            print(f"{stage}: {'same' if first[stage] == again[stage] else 'DIFFERENT'} weights, {first[stage][:16]}")


if __name__ == "__main__":
    main()
