"""Over-optimisation of a weak reward model, and what holds it back: `python benchmarks/overoptimisation.py`.

Writes docs/overoptimisation.md and docs/overoptimisation.svg. Every seed is a run folder of its own under runs/, so a
second call only adds what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chain import Finished, run
from curves import Estimate, peak, smooth
from figures import panels, save_figure
from pages import save_page, table

RECIPE = "benchmarks/overoptimisation.yaml"
SEEDS = (0, 1, 2)
PAIRS, FEWER_PAIRS = 150, 80
WINDOW = 9
"""Rollouts that a point of a curve is the mean of."""
TOLERANCE = 0.01
"""Share of the peak's gold that the choice of the budget gives up for less KL."""
ENSEMBLE = ("reward", "second", "third")
NAMES = {"free": "no limit", "budget": "KL budget", "ensemble": "ensemble, no limit"}
BUDGET_HEAD = (
    "seed",
    "peak gold",
    "KL",
    "score",
    "final gold",
    "KL",
    "score",
    "gold with budget",
    "KL",
    "with budget / peak",
)
ENSEMBLE_HEAD = ("seed", "peak gold", "KL", "final gold", "KL")
PAGE = """# Over-optimisation, and a KL budget against it

Made by `python benchmarks/overoptimisation.py`, seeds 0, 1 and 2.

![scores against KL](overoptimisation.svg)

The demo's world with a reward model that was given {pairs} pairs only (a tenth of them held out), and ppo without a
KL penalty (`benchmarks/overoptimisation.yaml`). Above: the score that is maximised. Below: the gold score of the same
answers, on which nothing is trained. The score goes on rising; the gold score rises, then falls. Curves begin at the
SFT policy; every point is the mean of {window} rollouts in a row, of 128 answers each (at the ends, of as many as
there are on the shorter side). The dotted line is the budget.

## A KL budget
`kl.budget: {budget}` ends the stage with the first rollout whose KL is above it. That number, in tenths of a nat, is
the least KL at which seed 0, without a limit, is within 1% of its peak: the curve is flat around the peak, and less KL
is safer elsewhere. Seeds 1 and 2 get it unchanged.

{table}

- *peak* is the highest mean gold score over {window} rollouts in a row without a limit, with the KL and the reward
  model's score of the same rollouts; *final* is the last such mean. They are of answers to training prompts.
- *with budget* is the committed policy, on 300 held-out prompts, one answer each, with its 95% interval. *with budget
  / peak* divides that gold by the peak; the lowest is {worst}. The peak is the largest of noisy means, so the ratio
  leans against the budget.
- Up to where it stops, the run with a budget is the run without, number for number: the seed of a rollout does not
  depend on the budget.

### With {fewer_pairs} pairs
The same, with the budget chosen anew, {fewer_budget}:

{fewer_table}

The lowest ratio is {fewer_worst}. A budget chosen on one reward model stops another too early or too late when their
peaks are far apart, and with fewer pairs they are.

## An ensemble of three
With {pairs} pairs and without a limit: one reward model, and the lowest score of three (`combine: min`) that were
trained on the same pairs and differ in their seed: the head's first weights and the order of the pairs.

{ensemble}
"""


@dataclass(frozen=True)
class Curve:
    """One ppo run: means over WINDOW rollouts, and its committed policy on held-out prompts."""

    gold: list[float]
    score: list[float]
    kl: list[float]
    committed_gold: Estimate
    committed_kl: Estimate

    @property
    def peak(self) -> int:
        """Where the gold score is highest, among means over a whole window."""
        return peak(self.gold, WINDOW)

    @property
    def knee(self) -> int:
        """The first of those means that is within TOLERANCE of the highest: the curve is flat there."""
        side = WINDOW // 2
        enough = (1 - TOLERANCE) * self.gold[self.peak]
        return next(index for index in range(side, self.peak + 1) if self.gold[index] >= enough)

    @property
    def last(self) -> int:
        """The last mean over a whole window."""
        return len(self.gold) - 1 - WINDOW // 2


@dataclass(frozen=True)
class Study:
    """All runs with reward models of one size of data."""

    budget: float
    """The least KL at which the first seed's gold is within TOLERANCE of its peak, in tenths of a nat."""
    seeds: dict[int, dict[str, Curve]]
    """By the keys of NAMES."""


def read(stage: Finished) -> Curve:
    """The curve of a finished ppo stage."""
    names = ("samples/gold", "objective/scores", "objective/kl")
    gold, score, kl = (smooth([line[name] for line in stage.rollouts], WINDOW) for name in names)
    return Curve(gold, score, kl, stage.measure("gold"), stage.measure("kl"))


def run_ppo(seed: int, pairs: int, settings: dict[str, Any]) -> Curve:
    """ppo with some settings changed, on reward models of `pairs` pairs."""
    given: dict[str, Any] = {"seed": seed}
    for number, name in enumerate(ENSEMBLE):
        given |= {f"{name}.seed": seed + 100 * number, f"{name}.data.max_rows": pairs}
    stages = run(["ppo"], given | settings, recipe=RECIPE, name=f"overoptimisation-seed{seed}")
    return read(stages["ppo"])


def study(pairs: int, with_ensemble: bool) -> Study:
    """Chooses the budget on the first seed, and runs everything."""
    seeds = {seed: {"free": run_ppo(seed, pairs, {})} for seed in SEEDS}
    first = seeds[SEEDS[0]]["free"]
    budget = round(first.kl[first.knee], 1)
    ensemble = {"reward": {"model": list(ENSEMBLE), "combine": "min"}}
    for seed, curves in seeds.items():
        curves["budget"] = run_ppo(seed, pairs, {"ppo.kl.budget": budget})
        if with_ensemble:
            curves["ensemble"] = run_ppo(seed, pairs, {"ppo.reward": ensemble})
    return Study(budget, seeds)


def budget_row(seed: int, curves: dict[str, Curve]) -> list[str]:
    """As in BUDGET_HEAD."""
    free, limited = curves["free"], curves["budget"]
    cells = [str(seed)]
    for at in (free.peak, free.last):
        cells += [f"{free.gold[at]:.3f}", f"{free.kl[at]:.1f}", f"{free.score[at]:.2f}"]
    return [
        *cells,
        limited.committed_gold.text(3),
        limited.committed_kl.text(1),
        f"{limited.committed_gold.value / free.gold[free.peak]:.3f}",
    ]


def budget_table(found: Study) -> str:
    """One row per seed."""
    return table(BUDGET_HEAD, [budget_row(seed, curves) for seed, curves in found.seeds.items()])


def ensemble_rows(seed: int, curves: dict[str, Curve]) -> list[list[str]]:
    """One reward model and three: as in ENSEMBLE_HEAD."""
    rows = []
    for name, curve in (("one", curves["free"]), ("three", curves["ensemble"])):
        cells = [f"{seed}, {name}"]
        for at in (curve.peak, curve.last):
            cells += [f"{curve.gold[at]:.3f}", f"{curve.kl[at]:.1f}"]
        rows.append(cells)
    return rows


def draw(found: Study) -> None:
    """Above the reward models' score, below the gold score, against the KL; one column per seed."""
    figure, axes = panels(len(found.seeds), rows=2)
    for (seed, curves), (above, below) in zip(found.seeds.items(), axes.T, strict=True):
        for name, curve in curves.items():
            above.plot(curve.kl, curve.score, lw=1.2, label=NAMES[name])
            below.plot(curve.kl, curve.gold, lw=1.2, label=NAMES[name])
        free = curves["free"]
        below.plot(free.kl[free.peak], free.gold[free.peak], "k*", label="peak")
        for axis in (above, below):
            axis.axvline(found.budget, color="grey", ls=":", lw=1)
        above.set_title(f"seed {seed}")
        below.set_xlabel("KL to SFT, nats per answer")
    axes[0][0].set_ylabel("reward model's score")
    axes[1][0].set_ylabel("gold score")
    axes[1][-1].legend()
    save_figure(figure, "overoptimisation")


def worst(found: Study) -> float:
    """The lowest gold with budget over peak gold."""
    return min(
        curves["budget"].committed_gold.value / curves["free"].gold[curves["free"].peak]
        for curves in found.seeds.values()
    )


def main() -> None:
    """Runs everything, writes the page."""
    main_study, fewer = study(PAIRS, with_ensemble=True), study(FEWER_PAIRS, with_ensemble=False)
    draw(main_study)
    text = PAGE.format(
        pairs=PAIRS,
        window=WINDOW,
        budget=f"{main_study.budget:.1f}",
        table=budget_table(main_study),
        worst=f"{worst(main_study):.3f}",
        fewer_pairs=FEWER_PAIRS,
        fewer_budget=f"{fewer.budget:.1f}",
        fewer_table=budget_table(fewer),
        fewer_worst=f"{worst(fewer):.3f}",
        ensemble=table(
            ENSEMBLE_HEAD,
            [row for seed, curves in main_study.seeds.items() for row in ensemble_rows(seed, curves)],
        ),
    )
    save_page("overoptimisation", text)


if __name__ == "__main__":
    main()
