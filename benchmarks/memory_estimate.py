"""What `align plan --memory` says against what a stage needed: `python benchmarks/memory_estimate.py`.

Measures every row and writes docs/memory_estimate.md. With patterns of rows, such as 'ppo *' or '* zero3', measures
those alone, and takes the others from memory_estimate.json; `none` makes the page anew after a change of a formula.
What ended under runs/ is taken from there. Another combination is a line of ONE_PROCESS or SEVERAL.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from chain import ALIGN, run
from pages import save_page, table

from align.demo.world import WORDS

RECIPE, NAME = "benchmarks/memory_estimate.yaml", "memory-estimate"
DATA = Path("runs/memory_estimate_data")
MEASURED = Path(__file__).with_suffix(".json")
"""Bytes, by row."""
LORA = {"rank": 16, "alpha": 32}
NF4 = {**LORA, "quantise": "nf4"}


@dataclass(frozen=True)
class Combination:
    """A stage, how its model is trained, and how processes share the work."""

    stage: str
    method: str
    settings: dict[str, Any]
    strategy: str = "one"

    def __str__(self) -> str:
        return f"{self.stage} {self.method} {self.strategy}"

    @property
    def name(self) -> str:
        """Of its run: how a stage is launched is in no fingerprint, so each strategy has a run of its own."""
        return NAME if self.strategy == "one" else f"{NAME}-{self.strategy}"

    @property
    def changes(self) -> dict[str, Any]:
        """Of the recipe. A reward model that a stage needs is a row of the same run, so it is launched alike."""
        if self.strategy == "one":
            return self.settings
        launch = {"processes": PROCESSES, "strategy": self.strategy}
        return self.settings | {f"{stage}.launch": launch for stage in (self.stage, "reward")}


ONE_PROCESS = (
    Combination("sft", "full", {}),
    Combination("sft", "LoRA", {"sft.lora": LORA}),
    Combination("sft", "QLoRA", {"sft.lora": NF4}),
    Combination("sft", "full, micro-batches of 2", {"sft.micro_batch_size": 2}),
    Combination("sft", "full, checkpointing", {"sft.gradient_checkpointing": True}),
    Combination("reward", "full", {}),
    Combination("reward", "LoRA", {"reward.lora": LORA}),
    Combination("dpo", "full", {}),
    Combination("dpo", "full, cached reference", {"dpo.precompute_reference": True}),
    Combination("dpo", "full, simpo", {"dpo.loss": "simpo"}),
    Combination("dpo", "LoRA", {"dpo.lora": LORA}),
    Combination("dpo", "QLoRA", {"dpo.lora": NF4}),
    Combination("kto", "full", {}),
    Combination("kto", "LoRA", {"kto.lora": LORA}),
    Combination("ppo", "full", {}),
    Combination("ppo", "LoRA", {"reward.lora": LORA, "ppo.lora": LORA}),
    Combination("grpo", "full", {}),
)
SHARDED = ("zero2", "zero3", "fsdp")
SEVERAL = tuple(
    Combination(stage, method, settings, strategy)
    for stage, method, settings, strategies in (
        ("sft", "full", {}, ("ddp", *SHARDED)),
        ("reward", "full", {}, ("ddp", *SHARDED)),
        ("dpo", "full", {}, ("ddp", *SHARDED)),
        ("sft", "LoRA", {"sft.lora": LORA}, ("ddp", *SHARDED)),
        ("sft", "QLoRA", {"sft.lora": NF4}, ("ddp",)),
        ("ppo", "full", {}, ("ddp", *SHARDED)),
        ("grpo", "LoRA", {"reward.lora": LORA, "grpo.lora": LORA}, ("ddp", "zero2", "zero3")),
    )
    for strategy in strategies
)
PROCESSES = 2
ROWS, WORDS_PER_TEXT = 40, 48
MIB = 2**20
BOUND = 0.15

PAGE = """# Memory: estimated and measured

Made by `python benchmarks/memory_estimate.py`, a few rows at a time.

{rows}

*estimated* is what `align plan --memory` says before anything runs, *measured* the most that a process of the stage
ever held resident (`peak_memory` in its record.json), both in MiB: on a CPU, in float32, one run each. ddp, zero2,
zero3 and fsdp have {processes} processes; measured is the larger. *made of* is the estimate, part by part. {within} of
{count} combinations are within {bound:.0%}, {within_several} of {count_several} of those with several processes; the
largest difference is {largest:+.1%}.

The model is a Llama-shaped one with random weights and {parameters:.1f} million parameters, {weights:.0f} MiB
(`benchmarks/memory_estimate.yaml`); rows have about 104 tokens, passes 8 of them, 4 in each of two processes (ppo: 4
of 117, packed). *process* is Python and its libraries: measured in this environment, {process:.0f} MiB in every row.
*heap* is what the C library keeps of blocks below 32 MiB that were freed. That size of *process* and the rule for
*heap* were found by measuring sft and dpo of this table in one process; all other parts follow from the recipe alone.

What several processes add follows from the code of the libraries (`align/pipeline/estimate/strategies.py`). ddp has
flat buckets, a copy of all gradients to the end of the stage. DeepSpeed has its bucket of gradients, the copy of it
that is reduced, the share of gradients that is kept, and a second copy of its share of the weights, also in float32.
zero3 has the weights that are gathered and, after training, the whole ones beside their shares; on a CPU also what gloo
copies, and weights that were let go and stay in the heap, both found by following sft. fsdp has two layers whole at a
time. With two processes and fewer than half a billion weights ZeRO needs as much as ddp or more, because all gradients
fit into one bucket, and all weights may stay gathered.

The loop of ppo and grpo is our own: but for fsdp it adds up 64 MiB of gradients at a time, and of models that are in
parts only the policy is ever whole. What the estimate leaves out under zero3 is the file of a reward model: its head,
which stays whole, keeps all of it mapped. Processes share those pages, and give them back where memory is short.

What was measured varies from run to run: reward, full, in one process took 2302, 2633 and 2721 MiB. `base`, which is
not in the table, was estimated 10% too low in one process and 22% under zero2. Not measured: GPUs, zero1, offloading,
more than {processes} processes. Their figures are the same formulas with other bytes per number.
"""


@dataclass(frozen=True)
class Compared:
    """An estimate and what came of it, in bytes."""

    what: Combination
    estimate: dict[str, Any]
    measured: int

    @property
    def off(self) -> float:
        """The estimate's error as a share of what was measured."""
        return self.estimate["peak"] / self.measured - 1

    def row(self) -> list[str]:
        """One line of the page."""
        parts = {name: round(value / MIB) for name, value in self.estimate["parts"].items()}
        made_of = ", ".join(f"{name} {value}" for name, value in parts.items() if value)
        numbers = [f"{self.estimate['peak'] / MIB:.0f}", f"{self.measured / MIB:.0f}", f"{self.off:+.1%}"]
        return [self.what.stage, self.what.method, self.what.strategy, self.estimate["phase"], made_of, *numbers]


def write_data() -> None:
    """Rows of equal length in words, drawn from the demo's."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(WORDS_PER_TEXT))

    DATA.mkdir(parents=True, exist_ok=True)
    for name, columns in (
        ("demonstrations", ("prompt", "response")),
        ("preferences", ("prompt", "chosen", "rejected")),
        ("prompts", ("prompt",)),
        ("judgements", ("prompt", "completion")),
    ):
        rows = [{column: text() for column in columns} for _ in range(ROWS)]
        if name == "judgements":
            rows = [{**row, "label": place % 2 == 0} for place, row in enumerate(rows)]
        (DATA / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def estimate(what: Combination) -> dict[str, Any]:
    """What the plan says of the stage, as if it had not run."""
    changes = [f"{key}={json.dumps(value)}" for key, value in what.changes.items()]
    command = [*ALIGN, "plan", what.stage, *changes, "-c", RECIPE, "--run", NAME, "--force", what.stage]
    done = subprocess.run([*command, "--memory", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["memory"][what.stage]


def measure(what: Combination) -> int:
    """Runs the stage and those that it needs; the most bytes that one of its processes held."""
    stages = run([what.stage], what.changes, recipe=RECIPE, name=what.name)
    return stages[what.stage].record["peak_memory"]["resident"]


def within(found: Sequence[Compared]) -> int:
    """How many estimates are good enough."""
    return sum(abs(one.off) <= BOUND for one in found)


def page(found: Sequence[Compared]) -> str:
    """The text of docs/memory_estimate.md."""
    several = [one for one in found if one.what.strategy != "one"]
    parameters = found[0].estimate["parameters"]
    return PAGE.format(
        rows=table(
            ("stage", "training", "strategy", "peak while", "made of, MiB", "estimated", "measured", "difference"),
            [one.row() for one in found],
        ),
        within=within(found),
        count=len(found),
        within_several=within(several),
        count_several=len(several),
        processes=PROCESSES,
        bound=BOUND,
        largest=max((one.off for one in found), key=abs),
        parameters=parameters / 1e6,
        weights=4 * parameters / MIB,
        process=found[0].estimate["parts"]["process"] / MIB,
    )


def main(patterns: Sequence[str]) -> None:
    """Measures what is named, or everything, one row at a time; then estimates all that is known, for the page."""
    write_data()
    run(["base"], {}, recipe=RECIPE, name=NAME)  # rows are counted in its tokens
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    combinations = (*ONE_PROCESS, *SEVERAL)
    for one in combinations:
        if any(fnmatch(str(one), pattern) for pattern in patterns or ("*",)):
            measured[str(one)] = measure(one)
            MEASURED.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    known = [one for one in combinations if str(one) in measured]
    save_page("memory_estimate", page([Compared(one, estimate(one), measured[str(one)]) for one in known]))


if __name__ == "__main__":
    main(sys.argv[1:])
