"""Over-optimisation of a weak reward model, and what holds it back: `python benchmarks/overoptimisation.py`.

Writes docs/overoptimisation.md and docs/overoptimisation.svg. Seeds 0, 1 and 2, each a run folder of its own under
runs/, so a second call only adds what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chain import Finished, run
from curves import Estimate, peak, rises, smooth
from figures import panels, save_figure
from pages import save_page, table

RECIPE = "benchmarks/overoptimisation.yaml"
SEEDS = (0, 1, 2)
WINDOW = 9
"""Rollouts that a point of a curve is the mean of."""
ENSEMBLE = ("reward", "second", "third")
PARTS = 6
"""Equal parts of a run whose mean scores must rise for the score to count as rising throughout."""
HEAD = (
    "seed",
    "peak gold",
    "at KL",
    "final gold, no limit",
    "at KL",
    "gold with budget",
    "at KL",
    "with budget / peak",
    "score rises throughout, no limit",
)
ENSEMBLE_HEAD = (
    "seed",
    "peak gold, one",
    "ensemble",
    "at KL, one",
    "ensemble",
    "committed gold, one",
    "ensemble",
    "at KL, one",
    "ensemble",
)
NAMES = {"free": "no limit", "budget": "KL budget", "ensemble": "ensemble, min"}


PAGE = """# Over-optimisation, and a KL budget against it

Made by `python benchmarks/overoptimisation.py`, seeds 0, 1 and 2.

![scores against KL](overoptimisation.svg)

The demo's world with a reward model that was trained on {pairs} pairs only, and ppo without a KL penalty
(`benchmarks/overoptimisation.yaml`). Above: the score that is maximised. Below: the gold score of the same answers,
that nothing is trained on. Curves are over the {rollouts} rollouts of {answers} answers each, every point the mean of
{window} rollouts in a row; the dotted line is the budget.

## A KL budget
`kl.budget: {budget}` ends the stage at the first rollout whose KL is above it. That number is the KL at the peak of
seed 0 without a limit, in tenths of a nat; seeds 1 and 2 were not looked at for it.

{table}

- *peak gold* is the highest mean gold score of {window} rollouts in a row without a limit, and its KL is of the same
  rollouts: answers to training prompts, on which gold was never trained. *Final* is the last such mean.
- *with budget* is the committed policy on 300 held-out prompts, with its 95% interval. *with budget / peak* divides
  the two; at the lowest it is {worst}. The peak is a maximum of noisy means, so it favours the peak.
- *score rises throughout*: whether the means of the reward model's score over {parts} equal parts of the run without
  a limit rise from each to the next.

Until it stops, the run with a budget is the run without a limit, number for number: the seed of a rollout does not
depend on the budget.

## An ensemble of three
The same, without a limit, with the lowest score of three reward models (`combine: min`) that differ in their seed
only: the head's first weights and the order of the same pairs. *committed* is at the end of all rollouts, on held-out
prompts.

{ensemble}
"""


@dataclass(frozen=True)
class Curve:
    """One ppo run: means over WINDOW rollouts, and its committed policy on held-out prompts."""

    gold: list[float]
    score: list[float]
    kl: list[float]
    committed: Estimate
    committed_kl: Estimate

    @property
    def peak(self) -> int:
        """Where the gold score is highest, among means over a whole window."""
        return peak(self.gold, WINDOW)

    @property
    def last(self) -> int:
        """The last mean over a whole window."""
        return len(self.gold) - 1 - WINDOW // 2


def read(stage: Finished) -> Curve:
    """The curve of a finished ppo stage."""
    lines = stage.rollouts
    gold, score, kl = (
        smooth([line[name] for line in lines], WINDOW) for name in ("samples/gold", "objective/scores", "objective/kl")
    )
    return Curve(gold, score, kl, stage.measure("gold"), stage.measure("kl"))


def run_ppo(seed: int, settings: dict[str, Any]) -> Finished:
    """ppo with some settings changed."""
    seeds = {"seed": seed} | {f"{name}.seed": seed + 100 * number for number, name in enumerate(ENSEMBLE)}
    return run(["ppo"], seeds | settings, recipe=RECIPE, name=f"overoptimisation-seed{seed}")["ppo"]


def run_seed(seed: int, free: Curve, budget: float) -> dict[str, Curve]:
    """The three runs of a seed."""
    ensemble = {"reward": {"model": list(ENSEMBLE), "combine": "min"}}
    return {
        "free": free,
        "budget": read(run_ppo(seed, {"ppo.kl.budget": budget})),
        "ensemble": read(run_ppo(seed, {"ppo.reward": ensemble})),
    }


def row(seed: int, curves: dict[str, Curve]) -> list[str]:
    """As in HEAD."""
    free, limited = curves["free"], curves["budget"]
    top = free.gold[free.peak]
    return [
        str(seed),
        f"{top:.3f}",
        f"{free.kl[free.peak]:.1f}",
        f"{free.gold[free.last]:.3f}",
        f"{free.kl[free.last]:.1f}",
        limited.committed.text(3),
        limited.committed_kl.text(1),
        f"{limited.committed.value / top:.3f}",
        "yes" if rises(free.score[: free.last + 1], PARTS) else "no",
    ]


def ensemble_row(seed: int, curves: dict[str, Curve]) -> list[str]:
    """As in ENSEMBLE_HEAD."""
    one, three = curves["free"], curves["ensemble"]
    return [
        str(seed),
        *(f"{curve.gold[curve.peak]:.3f}" for curve in (one, three)),
        *(f"{curve.kl[curve.peak]:.1f}" for curve in (one, three)),
        *(curve.committed.text(3) for curve in (one, three)),
        *(curve.committed_kl.text(1) for curve in (one, three)),
    ]


def draw(seeds: dict[int, dict[str, Curve]], budget: float) -> None:
    """Above the reward model's score, below the gold score, against the KL; one column per seed."""
    figure, axes = panels(len(seeds), rows=2)
    for (seed, curves), (above, below) in zip(seeds.items(), axes.T, strict=True):
        for name, curve in curves.items():
            above.plot(curve.kl, curve.score, lw=1, label=NAMES[name])
            below.plot(curve.kl, curve.gold, lw=1, label=NAMES[name])
        free = curves["free"]
        below.plot(free.kl[free.peak], free.gold[free.peak], "k*", label="peak")
        for axis in (above, below):
            axis.axvline(budget, color="grey", ls=":", lw=1)
        above.set_title(f"seed {seed}")
        below.set_xlabel("KL to SFT, nats per answer")
    axes[0][0].set_ylabel("reward model's score")
    axes[1][0].set_ylabel("gold score")
    axes[1][-1].legend()
    save_figure(figure, "overoptimisation")


def main() -> None:
    """Chooses the budget on the first seed, runs everything, writes the page."""
    free = {seed: read(run_ppo(seed, {})) for seed in SEEDS}
    budget = round(free[SEEDS[0]].kl[free[SEEDS[0]].peak], 1)
    seeds = {seed: run_seed(seed, free[seed], budget) for seed in SEEDS}
    draw(seeds, budget)
    ratios = [curves["budget"].committed.value / curves["free"].gold[curves["free"].peak] for curves in seeds.values()]
    save_page(
        "overoptimisation",
        PAGE.format(
            budget=f"{budget:.1f}",
            window=WINDOW,
            parts=PARTS,
            table=table(HEAD, [row(seed, curves) for seed, curves in seeds.items()]),
            worst=f"{min(ratios):.3f}",
            ensemble=table(ENSEMBLE_HEAD, [ensemble_row(seed, curves) for seed, curves in seeds.items()]),
        ),
    )


if __name__ == "__main__":
    main()
