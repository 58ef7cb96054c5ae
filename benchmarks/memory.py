"""Peak memory of ppo by how its four roles are played, and what LoRA costs in quality: `python benchmarks/memory.py`.

Writes docs/memory.md. Its runs are kept under runs/ (the demo's in frontier.py's folders), so a second call only adds
what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chain import Finished, run
from curves import mean
from pages import save_page, table

LORA = {"rank": 16, "alpha": 32}
NF4 = {**LORA, "quantise": "nf4"}
HEAD_CRITIC = {"ppo.critic.kind": "shared-head"}


def adapters(lora: dict[str, Any]) -> dict[str, Any]:
    """Settings under which one frozen base serves all roles."""
    return {"reward.lora": lora, "ppo.lora": lora}


LAYOUTS: dict[str, dict[str, Any]] = {
    "four models": {},
    "all weights, critic a head": HEAD_CRITIC,
    "one base, adapters": adapters(LORA),
    "one base, adapters, critic a head": adapters(LORA) | HEAD_CRITIC,
    "one base in NF4, adapters": adapters(NF4),
}
SEEDS = (0, 1, 2)
ON_DEMO = {
    "all weights": {},
    "LoRA": {
        **adapters(LORA),
        "reward.optim.lr": 2e-3,
        "ppo.optim.lr": 3e-3,
        "ppo.critic.optim.lr": 5e-3,
    },
}
GIB = 2**30

PAGE = """# Memory of ppo, and what LoRA costs

Made by `python benchmarks/memory.py`.

## Peak memory of the stage
{layouts}

The most that the stage's process ever held resident (`peak_memory` in its record.json), on CPU in float32, one run
each, loading, both rollouts, evaluation, saving and the hand-over check included, and so are Python and its
libraries. The model is a Llama-shaped one with random weights and {parameters} million parameters, {weights} GiB
(`benchmarks/memory.yaml`); 8 answers of at most 16 tokens per rollout, so weights, gradients and AdamW's moments are
nearly all of it. Trained weights take 16 bytes each (weight, gradient, two moments), frozen ones 4. Adapters have
rank 16 on all linear layers.

- *four models*: actor and critic are trained in full; reference and reward model are frozen.
- *critic a head*: the critic is a linear head on the actor's own states.
- *one base, adapters*: one frozen base is the reference, and through an adapter each the actor, the critic and the
  reward model, which was trained as an adapter on this very base.
- *in NF4*: that base in 4 bits (bitsandbytes), the reward model trained on it as well.

## The same quality
The demo (`configs/demo.yaml`), all weights against LoRA for both the reward model and ppo:

{demo}

± is the 95% interval of sampling answers to the held-out instructions. Both get the same rollouts; the policy they
start from and measure the KL to is the same SFT policy.
"""


@dataclass(frozen=True)
class Measured:
    """One layout."""

    stage: Finished
    parameters: int

    @property
    def peak(self) -> int:
        """Most bytes resident in the stage's process."""
        return self.stage.record["peak_memory"]["resident"]


def measure(settings: dict[str, Any]) -> Measured:
    """Runs ppo in a layout on the random model."""
    stages = run(["ppo"], settings, recipe="benchmarks/memory.yaml", name="memory")
    return Measured(stages["ppo"], stages["base"].record["metrics"]["parameters"])


def on_demo(seed: int, settings: dict[str, Any]) -> Finished:
    """Runs the demo's ppo."""
    run_name = f"frontier-seed{seed}"
    return run(["ppo"], {"seed": seed, **settings}, recipe="configs/demo.yaml", name=run_name)["ppo"]


def layout_row(name: str, found: Measured, full: Measured) -> list[str]:
    """layout, models in memory, peak, ratio."""
    return [name, "<br>".join(found.stage.models), f"{found.peak / GIB:.2f}", f"{found.peak / full.peak:.2f}"]


def quality_row(name: str, stages: list[Finished]) -> list[str]:
    """training, learning rate, gold and KL over seeds, gold of each seed."""
    golds = [stage.measure("gold") for stage in stages]
    return [
        name,
        f"{stages[0].record['config']['optim']['lr']:g}",
        mean(golds).text(3),
        mean([stage.measure("kl") for stage in stages]).text(2),
        ", ".join(gold.text(3) for gold in golds),
    ]


def main() -> None:
    """Runs all layouts, then the demo; writes the page."""
    layouts = {name: measure(settings) for name, settings in LAYOUTS.items()}
    full = layouts["four models"]
    demo = {name: [on_demo(seed, settings) for seed in SEEDS] for name, settings in ON_DEMO.items()}
    bytes_per_model = 4 * full.parameters
    save_page(
        "memory",
        PAGE.format(
            layouts=table(
                ("layout", "models in memory, as `align plan` says it", "peak, GiB", "ratio"),
                [layout_row(name, found, full) for name, found in layouts.items()],
            ),
            parameters=f"{full.parameters / 1e6:.0f}",
            weights=f"{bytes_per_model / GIB:.2f}",
            demo=table(
                ("training", "learning rate", "gold", "KL", "gold of each seed"),
                [quality_row(name, stages) for name, stages in demo.items()],
            ),
        ),
    )


if __name__ == "__main__":
    main()
