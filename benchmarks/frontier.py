"""Gold score against KL for ppo, rloo, grpo and dpo at several strengths: `python benchmarks/frontier.py [SEED ...]`.

Writes docs/frontier.md and docs/frontier.svg. Every seed is a run folder of its own under runs/, so a second call only
adds what is missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property

from chain import Finished, run
from curves import Estimate, Point, ceiling, envelope, height, mean
from figures import panels, save_figure
from pages import save_page, table

RECIPE = "configs/demo.yaml"
STRENGTHS = {
    "ppo": ("ppo.kl.coef", (0.01, 0.03, 0.1, 0.3)),
    "rloo": ("rloo.kl.coef", (0.01, 0.03, 0.1, 0.3)),
    "grpo": ("grpo.kl.coef", (0.03, 0.1, 0.3, 1.0)),
    "dpo": ("dpo.beta", (0.03, 0.1, 0.3, 1.0)),
}
MARKERS = {"ppo": "o", "rloo": "s", "grpo": "^", "dpo": "D"}
HEAD = ("method", "strength", "gold", "KL", "distance", "of each seed", "reward model's score")


PAGE = """# The frontier of gold score and KL

Made by `python benchmarks/frontier.py`, seeds {seeds}.

![gold score against KL](frontier.svg)

{table}

The world is the demo's (`configs/demo.yaml`): a Llama-shaped model of {parameters} million parameters, and a gold
score between 0 and 1 that no method trains on. Everything is measured on one answer, at temperature 1, to each of
{prompts} held-out instructions. Within a seed all methods start from the same SFT policy (gold {starts}); ppo, rloo
and grpo maximise the same reward model, and dpo learns from the pairs that it was trained on.

- *strength* is `kl.coef`, for dpo `beta`. It does not compare between methods: grpo divides scores by their standard
  deviation in the group, and dpo's beta is in another loss.
- *gold*, *KL* (nats per answer, to the SFT policy) and the score are means over seeds. ± is the 95% interval of
  sampling answers; it does not hold the spread between seeds, which the figure shows.
- *distance* is how much gold a run lacks to the best found at its KL: to the least function above all runs of its
  seed, the SFT policy at KL 0 included, that is concave and never falls. Concave, because answering by lot with one
  of two policies reaches every point of the chord between them. ± is that of the run's gold: a distance below it is
  none that was measured. The best found is the largest of noisy numbers, so it is itself too high by about as much.
- A run whose gold is low at a high KL has over-optimised the reward model
  ([overoptimisation.md](overoptimisation.md)).

What each method was given, per run:

{budgets}

With exact optimisation of the same reward, all of these methods end on one frontier: what is compared here is how
they are optimised in this budget, in this world, at these settings, not the methods in general.

## The frontier inequality
No policy is above its ceiling: gold <= min over beta of beta KL + beta log E[exp(gold / beta)], the expectation over
the SFT policy's answers. The dotted line is that ceiling, estimated from its {prompts} held-out answers: {above} of
the {runs} runs are above it, and the nearest is {nearest} below. It is the ceiling of one who knows the gold score and
may choose the prompts. What can be reached from noisy comparisons is not known, so nothing here says how far the best
found is from it.
"""


@dataclass(frozen=True)
class Trial:
    """One method at one strength and seed, on held-out prompts."""

    gold: Estimate
    kl: Estimate
    reward: Estimate | None

    @property
    def point(self) -> Point:
        """(KL, gold). An estimate of a KL near 0 may be negative."""
        return max(0.0, self.kl.value), self.gold.value


@dataclass(frozen=True)
class Seed:
    """What one seed found."""

    start: Estimate
    """Gold score of the policy that all methods start from."""
    start_golds: list[float]
    """Of each of its answers."""
    trials: dict[tuple[str, float], Trial]
    """By method and strength."""
    budgets: dict[str, str]
    """What each method was given."""
    parameters: int

    @cached_property
    def corners(self) -> list[Point]:
        """The envelope of what was found, the start included."""
        return envelope([(0.0, self.start.value), *(trial.point for trial in self.trials.values())])

    def distance(self, trial: Trial) -> Estimate:
        """What a trial lacks to the envelope at its own KL; the interval is that of its gold score."""
        kl, gold = trial.point
        return Estimate(height(self.corners, kl) - gold, trial.gold.half)

    def margin(self, trial: Trial) -> float:
        """How far a trial is below what no policy at its KL can exceed."""
        kl, gold = trial.point
        return ceiling(self.start_golds, kl) - gold


def run_seed(seed: int) -> Seed:
    """Runs what is missing."""
    trials, budgets, stages = {}, {}, {}
    for method, (key, strengths) in STRENGTHS.items():
        for strength in strengths:
            stages = run([method], {"seed": seed, key: strength}, recipe=RECIPE, name=f"frontier-seed{seed}")
            trials[method, strength] = read_trial(stages[method])
        budgets[method] = budget(stages[method])
    sft = stages["sft"]
    return Seed(
        sft.measure("gold"),
        [row["gold"] for row in sft.answers],
        trials,
        budgets,
        stages["base"].record["metrics"]["parameters"],
    )


def read_trial(stage: Finished) -> Trial:
    """What a finished stage measured."""
    scored = "reward" in stage.record["metrics"]  # dpo has no reward model
    return Trial(stage.measure("gold"), stage.measure("kl"), stage.measure("reward") if scored else None)


def budget(stage: Finished) -> str:
    """What a stage had to learn from."""
    config, metrics = stage.record["config"], stage.record["metrics"]
    if stage.record["kind"] == "dpo":
        return f"{metrics['rows']} pairs, {config['epochs']:g} epochs in batches of {config['batch_size']}"
    rollout = config["rollout"]
    answers = rollout["prompts"] * rollout["responses_per_prompt"]
    return (
        f"{config['rollouts'] * answers} answers ({config['rollouts']} rollouts of {rollout['prompts']} prompts, "
        f"{rollout['responses_per_prompt']} to each), {metrics['optimiser_steps']} optimiser steps"
    )


def row(method: str, strength: float, seeds: list[Seed]) -> list[str]:
    """Means over seeds, as in HEAD."""
    trials = [seed.trials[method, strength] for seed in seeds]
    distances = [seed.distance(trial) for seed, trial in zip(seeds, trials, strict=True)]
    rewards = [trial.reward for trial in trials if trial.reward is not None]
    return [
        method,
        f"{strength:g}",
        mean([trial.gold for trial in trials]).text(3),
        mean([trial.kl for trial in trials]).text(2),
        mean(distances).text(3),
        ", ".join(f"{distance.value:.3f}" for distance in distances),
        mean(rewards).text(2) if rewards else "–",
    ]


def draw(seeds: dict[int, Seed]) -> None:
    """One panel per seed: the trials, the envelope of what was found, the ceiling."""
    figure, axes = panels(len(seeds))
    for (number, seed), axis in zip(seeds.items(), axes[0], strict=True):
        right = 1.05 * max(trial.kl.value for trial in seed.trials.values())
        steps = [right * step / 200 for step in range(201)]
        axis.plot(steps, [ceiling(seed.start_golds, kl) for kl in steps], ":", color="grey", label="ceiling")
        axis.plot(steps, [height(seed.corners, kl) for kl in steps], "-", color="grey", lw=1, label="best found")
        axis.plot(0, seed.start.value, "*", color="black", ms=9, label="sft")
        for method, marker in MARKERS.items():
            trials = [trial for (name, _), trial in seed.trials.items() if name == method]
            kls, golds = zip(*(trial.point for trial in trials), strict=True)
            axis.errorbar(
                kls, golds, [trial.gold.half for trial in trials], fmt=f"{marker}-", ms=4, lw=0.7, label=method
            )
        axis.set(title=f"seed {number}", xlabel="KL to SFT, nats per answer")
    axes[0][0].set_ylabel("gold score")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside right upper")
    save_figure(figure, "frontier")


def page(seeds: dict[int, Seed]) -> str:
    """docs/frontier.md."""
    found = list(seeds.values())
    margins = [seed.margin(trial) for seed in found for trial in seed.trials.values()]
    return PAGE.format(
        seeds=", ".join(str(seed) for seed in seeds),
        table=table(HEAD, [row(method, strength, found) for method, strength in found[0].trials]),
        parameters=f"{found[0].parameters / 1e6:.2f}",
        prompts=len(found[0].start_golds),
        starts=", ".join(seed.start.text(3) for seed in found),
        budgets="\n".join(f"- {method}: {text}" for method, text in found[0].budgets.items()),
        above=sum(margin < 0 for margin in margins),
        runs=len(margins),
        nearest=f"{min(margins):.3f}",
    )


def main() -> None:
    """Runs all seeds, writes the page."""
    seeds = {seed: run_seed(seed) for seed in [int(argument) for argument in sys.argv[1:]] or [0, 1, 2]}
    draw(seeds)
    save_page("frontier", page(seeds))


if __name__ == "__main__":
    main()
