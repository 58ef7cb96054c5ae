"""Gold score against KL for ppo, rloo, grpo and dpo at several strengths: `python benchmarks/frontier.py [SEED ...]`.

Writes docs/frontier.md and docs/frontier.svg. Every seed is a run folder of its own under runs/, so a second call only
adds what is missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from curves import Estimate, Point, ceiling, envelope, height, mean
from pages import panels, save_figure, save_page, table
from runs import Finished, run

RECIPE = "configs/demo.yaml"
STRENGTHS = {
    "ppo": ("ppo.kl.coef", (0.01, 0.03, 0.1, 0.3)),
    "rloo": ("rloo.kl.coef", (0.01, 0.03, 0.1, 0.3)),
    "grpo": ("grpo.kl.coef", (0.01, 0.03, 0.1, 0.3)),
    "dpo": ("dpo.beta", (0.03, 0.1, 0.3, 1.0)),
}
MARKERS = {"ppo": "o", "rloo": "s", "grpo": "^", "dpo": "D"}


@dataclass(frozen=True)
class Trial:
    """One method at one strength and seed."""

    gold: Estimate
    kl: Estimate
    reward: Estimate | None

    @property
    def point(self) -> Point:
        """(KL, gold)."""
        return self.kl.value, self.gold.value


@dataclass(frozen=True)
class Seed:
    """All trials of one seed, by method and strength, and the policy they start from."""

    start: Estimate
    start_golds: list[float]
    trials: dict[tuple[str, float], Trial]

    @property
    def corners(self) -> list[Point]:
        """The envelope of what was found, the policy that all started from included."""
        return envelope([(0.0, self.start.value), *(trial.point for trial in self.trials.values())])

    def distance(self, trial: Trial) -> Estimate:
        """What a trial lacks to the envelope at its own KL; the interval is that of its gold score."""
        return Estimate(height(self.corners, max(0.0, trial.kl.value)) - trial.gold.value, trial.gold.half)

    def ceiling(self, trial: Trial) -> float:
        """What no policy at the trial's KL can exceed."""
        return ceiling(self.start_golds, max(0.0, trial.kl.value))


def run_seed(seed: int) -> Seed:
    """Runs what is missing."""
    name = f"frontier-seed{seed}"
    trials = {}
    for method, (key, strengths) in STRENGTHS.items():
        for strength in strengths:
            stages = run([method], {"seed": seed, key: strength}, recipe=RECIPE, name=name)
            trials[method, strength] = read_trial(stages[method])
    sft = stages["sft"]
    return Seed(sft.measure("gold"), [row["gold"] for row in sft.answers], trials)


def read_trial(stage: Finished) -> Trial:
    """What a finished stage measured on the held-out prompts."""
    scored = "reward" in stage.record["metrics"]  # dpo has no reward model
    return Trial(stage.measure("gold"), stage.measure("kl"), stage.measure("reward") if scored else None)


def rows(seeds: dict[int, Seed]) -> list[list[str]]:
    """One row per method and strength: means over seeds."""
    found = []
    for method, strength in next(iter(seeds.values())).trials:
        pairs = [(seed, seed.trials[method, strength]) for seed in seeds.values()]
        rewards = [trial.reward for _, trial in pairs if trial.reward is not None]
        found.append(
            [
                method,
                f"{strength:g}",
                mean([trial.gold for _, trial in pairs]).text(3),
                mean([trial.kl for _, trial in pairs]).text(2),
                mean([seed.distance(trial) for seed, trial in pairs]).text(3),
                ", ".join(f"{seed.distance(trial).value:.3f}" for seed, trial in pairs),
                mean(rewards).text(2) if rewards else "–",
            ]
        )
    return found


def figure(seeds: dict[int, Seed]) -> None:
    """One panel per seed: the trials, the envelope of what was found, the ceiling."""
    picture, axes = panels(len(seeds))
    for (number, seed), axis in zip(seeds.items(), axes[0], strict=True):
        right = 1.05 * max(trial.kl.value for trial in seed.trials.values())
        steps = [right * step / 200 for step in range(201)]
        axis.plot(steps, [ceiling(seed.start_golds, x) for x in steps], ":", color="grey", label="ceiling")
        axis.plot(steps, [height(seed.corners, x) for x in steps], "-", color="grey", lw=1, label="best found")
        axis.plot(0, seed.start.value, "*", color="black", ms=9, label="sft")
        for method, marker in MARKERS.items():
            trials = [trial for (name, _), trial in seed.trials.items() if name == method]
            x, y = zip(*(trial.point for trial in trials), strict=True)
            axis.errorbar(x, y, [trial.gold.half for trial in trials], fmt=f"{marker}-", ms=4, lw=0.7, label=method)
        axis.set(title=f"seed {number}", xlabel="KL to the SFT policy, nats per answer")
    axes[0][0].set_ylabel("gold score")
    axes[0][-1].legend(loc="lower right")
    save_figure(picture, "frontier")


def checked(seeds: dict[int, Seed]) -> str:
    """The frontier inequality on every run: how far the run that comes nearest to its ceiling is below it."""
    margins = [seed.ceiling(trial) - trial.gold.value for seed in seeds.values() for trial in seed.trials.values()]
    return f"{sum(margin < 0 for margin in margins)} of {len(margins)} runs are above it; the nearest is {min(margins):.3f} below"


def budgets(stages: dict[str, Finished]) -> dict[str, str]:
    """What each method was given, from its record."""
    found = {}
    for method in STRENGTHS:
        record = stages[method].record
        config, metrics = record["config"], record["metrics"]
        if method == "dpo":
            found[method] = f"{metrics['rows']} pairs, {config['epochs']:g} epochs of {config['batch_size']}"
            continue
        rollout = config["rollout"]
        each = rollout["prompts"] * rollout["responses_per_prompt"]
        found[method] = (
            f"{config['rollouts'] * each} answers: {config['rollouts']} rollouts of {rollout['prompts']} prompts x "
            f"{rollout['responses_per_prompt']}, {metrics['optimiser_steps']} optimiser steps at {config['optim']['lr']:g}"
        )
    return found
