"""Speed of ppo against the last PPO of TRL, and against what the machine could do: `python benchmarks/ppo.py`.

Writes docs/benchmark_ppo.md. TRL's side runs in an environment of its own, which the first call makes under
runs/venv-trl. Runs are taken in turns and always anew; nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from chain import Finished, run
from floors import Machine, Shape, Work, calibrate, floors
from machine import QUIET, processor, undisturbed
from pages import listed, save_page, table

HERE = Path(__file__).parent
RECIPE, RUN = "benchmarks/ppo.yaml", "ppo-benchmark"
FILES = Path("runs") / RUN
VENV = Path("runs/venv-trl")
TORCH, TRL = "torch==2.13.0", ("trl==1.12.0", "transformers==5.17.0", "accelerate==1.15.0")
SKIPPED = 2
"""Rollouts of each run that are left out."""
PHASES = ("rollout", "score", "observe", "learn", "sync", "other")
MEANING = {
    "rollout": "sampling",
    "score": "the reward model",
    "observe": "policy, reference and critic before the update, advantages",
    "learn": "the epochs: actor and critic, forward and backward, AdamW",
    "sync": "passing the weights on to the engine",
    "other": "prompts, metrics, logs, garbage collection",
}
ONE_UPDATE = {"ppo.rollouts": 1, "ppo.epochs": 1, "ppo.minibatches": 1, "ppo.micro_batch_size": 128}
MIB = 2**20

CASES = {
    "The demo's vocabulary": {},
    "A vocabulary of 32,768": {
        "base.embeddings": 32768,
        "base.steps": 50,
        "sft.epochs": 1,
        "reward.epochs": 1,
        "ppo.rollouts": 8,
    },
}
"""What is measured, with what differs from the recipe. The second has the rows that the embedding of a published model
has at least; its policy is trained for less long, because that takes long."""

PAGE = """# ppo against TRL's PPO

Made by `python benchmarks/ppo.py{options}` on {date}. Everything on this page was measured in that call.

`align` against `trl.experimental.ppo.PPOTrainer` of TRL {trl}, the last version that has it, with a tiny model on a CPU
of {cores} cores. Samples per second, a sample being a response, from its prompt to the update:

{summary}

With the demo's vocabulary most of the work is the body's, which both have to do. Logits are most of the work of a small
model with a usual vocabulary, and many of those that TRL computes are of no use: of prompts, of padding, of tokens past
the end.

{sections}

## What the numbers are
Seconds are per rollout, median over the runs of each run's mean. The floor is what the same work needs at least at the
speed that this machine reached in the same call: {gflops:.0f} GFLOP/s in a product of two float32 matrices of
1024 x 1024, {bandwidth:.1f} GB/s in a sum over main memory, both on {threads} threads (`benchmarks/floors.py`). What
fits a cache can be read faster than that.

{meaning}

TRL's loop is timed from outside, by wrapping the functions that it calls. Its policy's log-probabilities come with the
sampling, where it keeps all scores, so its `observe` is one pass shorter. Memory is the most that a process ever held
resident, Python and its libraries included; ours also loads the model that it saved once more, for the hand-over check.

## The same work
The demo's model ({parameters:.2f} million parameters, float32; in the second case with more rows of the embedding), its
SFT policy and its reward model, made once; the same prompts in the same order, {rows} per rollout; at most {cap}
response tokens at temperature {temperature:g}; {epochs} epochs of {minibatches} minibatches, each one pass; the first
{skipped} rollouts of a run not counted. Learning rates {rate:g}, constant, AdamW (fused) with eps {eps:g} and without
weight decay; KL coefficient {kl:g} (k1, in the reward); the critic starts as the reward model. `benchmarks/ppo.yaml`
has all of it.

What differs is each side's own:

- TRL does not clip gradients; ours still computes their norms, against a limit that is never reached.
- TRL puts the score one token past the end, on padding, and trains the critic there as well.
- TRL computes padding, and logits at all places, prompts included; we compute neither the padding nor logits that are
  not of a response token.
- In sampling, rows that have ended stay in TRL's batch and leave ours.

Before anything was timed, both had to agree on what they define alike: log-probabilities, values and scores of the same
responses, each by its side's own code, and the first update of a run of one rollout with one epoch of one minibatch, on
each side's own samples.

## Machine
{cpu}, {cores} cores; {threads} threads each (`OMP_NUM_THREADS={threads}`), one process at a time. A pair during which
other processes used more than {quiet:g} cores does not count.

- align: {our_versions}; rollouts by {engine}
- TRL: {trl_versions}

## Reproduce
    python benchmarks/ppo.py{options}

The environment of TRL is made on the first call: `pip install {torch}`, then `pip install {packages}`.
"""

SECTION = """## {name}
{parameters:.2f} million parameters. Both sampled answers that end by themselves, of {ours_length:.1f} tokens on average
(TRL {trl_length:.1f}).

{speed}

{phases}

{gate}

Pairs that did not count: {disturbed}."""


@dataclass(frozen=True)
class Measured:
    """One run of either side."""

    steps: list[dict[str, float]]
    """Seconds of each phase and in `total`, of the rollouts that count."""
    rows: int
    length: float
    """Mean response tokens."""
    peak: int

    @property
    def speed(self) -> float:
        """Samples per second."""
        return self.rows / mean(step["total"] for step in self.steps)

    def phase(self, name: str) -> float:
        """Mean seconds of a phase."""
        return mean(step[name] for step in self.steps)


def measured(lines: list[dict[str, Any]], prefix: str, length: str, rows: int, peak: int) -> Measured:
    """From a line per rollout, each stamped with the `time` at which it was done."""
    steps = []
    for before, line in zip(lines[SKIPPED - 1 :], lines[SKIPPED:], strict=False):
        step = {name: line.get(f"{prefix}{name}", 0.0) for name in PHASES[:-1]}
        total = line["time"] - before["time"]
        steps.append({**step, "other": total - sum(step.values()), "total": total})
    return Measured(steps, rows, mean(line[length] for line in lines[SKIPPED:]), peak)


def trl_python() -> Path:
    """The Python of TRL's environment, made if it is not there. torch comes first and alone, as in ours."""
    python, done = VENV / "bin" / "python", VENV / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        for packages in ([TORCH], TRL):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


def ours(settings: dict[str, Any]) -> dict[str, Finished]:
    """Runs the ppo stage anew, with the stages it needs."""
    return run(["ppo"], settings, recipe=RECIPE, name=RUN, force=["ppo"])


def prepare(stage: Finished, name: str) -> Path:
    """What TRL is to do, from a stage that is complete."""
    task = FILES / f"{name}.json"
    subprocess.run([sys.executable, HERE / "ppo_probe.py", stage.folder, task], check=True)
    return task


def theirs(what: str, task: Path) -> dict[str, Any]:
    """Runs TRL's side."""
    out = FILES / f"{what}-trl.json"
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)  # its packages are others
    command = [trl_python(), HERE / "ppo_trl.py", what, task, out]
    with out.with_suffix(".txt").open("w", encoding="utf-8") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(out.read_text(encoding="utf-8"))


def gate(settings: dict[str, Any]) -> tuple[list[list[str]], int]:
    """Compares what both define alike. Returns the rows of the table and the number of responses compared; ends the
    benchmark when a difference is too large."""
    stage = ours({**settings, **ONE_UPDATE})["ppo"]
    task = prepare(stage, "gate")
    differences, their_first = theirs("check", task), theirs("train", task)["rows"][0]["metrics"]
    first = stage.rollouts[0]
    compared = [
        ("log-probability of a token, policy", differences["logp"], 1e-4),
        ("log-probability of a token, reference", differences["reference"], 1e-4),
        ("value of a token", differences["values"], 1e-4),
        ("score of a response", differences["scores"], 1e-4),
    ]
    for side, metrics in (("align", first), ("TRL", their_first)):
        compared += [
            (f"first update, {side}: KL to the reference", abs(metrics["objective/kl"]), 1e-3),
            (f"first update, {side}: mean ratio less 1", abs(metrics["val/ratio"] - 1), 1e-4),
            (f"first update, {side}: policy loss", abs(metrics["loss/policy_avg"]), 1e-4),
        ]
    failed = [f"{what}: {found:.3g} is above {bound:g}" for what, found, bound in compared if not found <= bound]
    if failed:
        sys.exit("the two do not compute the same, so nothing was timed:\n" + "\n".join(failed))
    probes = len(json.loads(task.read_text(encoding="utf-8"))["probe"]["scores"])
    return [[what, f"{found:.1e}", f"{bound:g}"] for what, found, bound in compared], probes


def our_run(stage: Finished) -> Measured:
    """Our side, as measured by the stage itself."""
    rollout, record = stage.record["config"]["rollout"], stage.record
    rows = rollout["prompts"] * rollout["responses_per_prompt"]
    return measured(stage.rollouts, "time/", "val/response_length", rows, record["peak_memory"]["resident"])


def speed_rows(mine: Sequence[Measured], other: Sequence[Measured]) -> list[list[str]]:
    """run, samples and tokens per second of both, ratio."""
    rows = []
    for number, (one, two) in enumerate(zip(mine, other, strict=True), 1):
        speeds = [f"{side.speed:.1f}" for side in (one, two)]
        tokens = [f"{side.speed * side.length:.0f}" for side in (one, two)]
        rows.append([str(number), *speeds, *tokens, f"{one.speed / two.speed:.2f}"])
    return rows


def phase_rows(mine: Sequence[Measured], other: Sequence[Measured], floor: dict[str, float]) -> list[list[str]]:
    """phase, seconds of both, TRL / align, floor, align / floor."""
    rows = []
    for name in (*PHASES, "total"):
        one, two = (median(measured.phase(name) for measured in side) for side in (mine, other))
        least = floor.get(name, 0.0)
        above = [f"{least:.3f}", f"{one / least:.1f}"] if least else ["", ""]
        rows.append([name, f"{one:.3f}", f"{two:.3f}", f"{two / one:.2f}" if one > 1e-3 else "", *above])
    return rows


def floor_of(stage: Finished, shape: Shape, task: Path, mine: Sequence[Measured], machine: Machine) -> dict[str, float]:
    """Seconds of each phase of our runs at least, and in all."""
    prompts, config = json.loads(task.read_text(encoding="utf-8"))["prompts"], stage.record["config"]
    counted = prompts[SKIPPED * mine[0].rows :]
    length = mean(one.length for one in mine)
    work = Work(mine[0].rows, mean(map(len, counted)), length, config["epochs"], config["minibatches"])
    found = floors(shape, machine, work)
    return {**found, "total": sum(found.values())}


def summary_row(name: str, facts: dict[str, Any]) -> list[str]:
    """case, ratio, its range, pairs, peaks."""
    mine, other = facts["mine"], facts["other"]
    ratios = [one.speed / two.speed for one, two in zip(mine, other, strict=True)]
    peaks = [f"{max(measured.peak for measured in side) / MIB:.0f}" for side in (mine, other)]
    found = [f"**{median(ratios):.2f}**", f"{min(ratios):.2f} to {max(ratios):.2f}", str(len(ratios))]
    return [name, *found, *peaks]


def section(name: str, facts: dict[str, Any]) -> str:
    """The tables of a case."""
    mine, other = facts["mine"], facts["other"]
    speeds = ("pair", "align, samples/s", "TRL, samples/s", "align, tokens/s", "TRL, tokens/s", "ratio")
    phases = ("phase", "align", "TRL", "TRL / align", "floor", "align / floor")
    return SECTION.format(
        name=name,
        parameters=parameters(facts),
        ours_length=mean(one.length for one in mine),
        trl_length=mean(one.length for one in other),
        speed=table(speeds, speed_rows(mine, other)),
        phases=table(phases, phase_rows(mine, other, facts["floor"])),
        gate=table((f"of {facts['probes']} responses", "largest difference", "allowed"), facts["gate"]),
        disturbed=len(facts["disturbed"]) or "none",
    )


def parameters(facts: dict[str, Any]) -> float:
    """Of the policy, in millions."""
    return facts["stages"]["base"].record["metrics"]["parameters"] / 1e6


def setting(stages: dict[str, Finished]) -> dict[str, Any]:
    """What was done, for the page."""
    record = stages["ppo"].record
    config, versions = record["config"], record["versions"]
    rollout = config["rollout"]
    return {
        "cap": rollout["max_response_tokens"],
        "temperature": rollout["temperature"],
        "rows": rollout["prompts"] * rollout["responses_per_prompt"],
        "epochs": config["epochs"],
        "minibatches": config["minibatches"],
        "skipped": SKIPPED,
        "rate": config["optim"]["lr"],
        "eps": config["optim"]["eps"],
        "kl": config["kl"]["coef"],
        "our_versions": listed({name: versions[name] for name in ("python", "torch", "transformers")}),
    }


def page(arguments: argparse.Namespace, machine: Machine, cases: dict[str, dict[str, Any]]) -> str:
    """The text of docs/benchmark_ppo.md."""
    columns = ("model", "align / TRL", "range", "pairs", "align, peak MiB", "TRL, peak MiB")
    first = next(iter(cases.values()))
    return PAGE.format(
        **setting(first["stages"]),
        summary=table(columns, [summary_row(name, facts) for name, facts in cases.items()]),
        sections="\n\n".join(section(name, facts) for name, facts in cases.items()),
        parameters=parameters(first),
        gflops=machine.operations / 1e9,
        bandwidth=machine.bandwidth / 1e9,
        threads=arguments.threads,
        options="".join(f" {option}" for option in sys.argv[1:]),
        date=datetime.now(UTC).date().isoformat(),
        meaning="\n".join(f"- *{name}*: {what}" for name, what in MEANING.items()),
        cpu=processor(),
        cores=os.cpu_count(),
        quiet=QUIET,
        trl=first["versions"]["trl"],
        trl_versions=listed(first["versions"]),
        engine=arguments.engine,
        torch=TORCH,
        packages=" ".join(TRL),
    )


def in_turns(repeats: int, settings: dict[str, Any]) -> dict[str, Any]:
    """align, TRL, align, TRL ... : our stages, the task, and what was measured of each side in the pairs that count.
    Ends the benchmark when others used the machine during too many of them."""

    def pair() -> tuple[dict[str, Finished], Path, dict[str, Any], Measured]:
        stages = ours(settings)
        task = prepare(stages["ppo"], "task")
        return stages, task, theirs("train", task), our_run(stages["ppo"])

    pairs, disturbed = undisturbed(repeats, pair)
    mine = [one for *_, one in pairs]
    other = [their_run(result, one.rows) for _, _, result, one in pairs]
    stages, task, result, _ = pairs[-1]
    versions = result["versions"]
    return {"mine": mine, "other": other, "disturbed": disturbed, "stages": stages, "task": task, "versions": versions}


def their_run(result: dict[str, Any], rows: int) -> Measured:
    """TRL's side, as ppo_trl.py timed it."""
    return measured(result["rows"], "", "response_length", rows, result["peak_memory"])


def case(settings: dict[str, Any], repeats: int, machine: Machine) -> dict[str, Any]:
    """Everything about a case: gate, runs in turns, floors."""
    facts: dict[str, Any] = {}
    facts["gate"], facts["probes"] = gate(settings)
    facts |= in_turns(repeats, settings)
    stages = facts["stages"]
    config = json.loads((stages["base"].folder / "model" / "config.json").read_text(encoding="utf-8"))
    facts["floor"] = floor_of(stages["ppo"], Shape.of(config), facts["task"], facts["mine"], machine)
    return facts


def main() -> None:
    """All cases, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="transformers", help="rollout.engine of align")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs that count")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    machine = calibrate()
    engine = {"ppo.rollout.engine": arguments.engine}
    cases = {name: case({**changes, **engine}, arguments.repeats, machine) for name, changes in CASES.items()}
    save_page("benchmark_ppo", page(arguments, machine, cases))


if __name__ == "__main__":
    main()
