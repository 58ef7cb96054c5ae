"""Speed of the rollout engines against each other, and against what the machine could do:
`python benchmarks/rollout.py`.

Writes docs/benchmark_rollout.md. Needs vLLM (docs/rollouts.md). Each engine has a process of its own, and they work in
turns; nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import packages_distributions, version
from itertools import count, product
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import torch
from floors import Machine, Shape, calibrate, rollout_floor
from machine import QUIET, Load, processor, settle, undisturbed
from pages import listed, save_page, spread, table
from rollout_models import LONGEST, NEVER, PAD, SHORTEST, STOPS, Subject, make_model, make_prompts, subjects
from turns import Round, Turn, ratios

Result = TypeVar("Result")

HERE = Path(__file__).parent
FILES = Path("runs/rollout-benchmark")
ENGINES = ("transformers", "vllm", "vllm-server")
BATCHES = (8, 32, 128)
RESPONSES = 64
"""Of a measurement, at least: small batches are several calls."""
WORKLOADS = {"equal": (NEVER,), "natural": STOPS}
"""What ends a response before its longest."""

BUSY = """
**Other processes were at work during this call, and were allowed to be (`--quiet`): the numbers are rough.**
"""

PAGE = """# Rollout engines

Made by `python benchmarks/rollout.py{options}` on {date}. Everything on this page was measured in that call.
{warning}
## Result
Tokens per second of an engine over those of transformers: median of {rounds} rounds, least and greatest.

{result}

- *{tiny}*: the demo's shape, {tiny_millions:.2f} million parameters, {tiny_vocabulary} tokens of vocabulary.
- *{small}*: of the Qwen2 family, {small_millions:.1f} million parameters, {small_vocabulary} tokens of vocabulary.
- *equal*: all responses have the same length, {tiny_tokens} and {small_tokens} tokens. *natural*: each token ends its
  response with about the same probability, so most are short and a few go on for long; at most as many tokens.

## What the numbers mean, and what not
Tokens per second, measured / floor and cores are medians of the rounds.

- A measurement is what a stage waits for: from the prompts' ids to all responses as a tensor, in calls of a batch each
  and at least {responses} responses. Only generated tokens are counted, up to the one that ends a response: not
  padding.
- Each engine has a process of its own, because vLLM changes how torch uses threads in a process. All are open and one
  works at a time: a round is a measurement of each, on the same prompts ({shortest} to {longest} random tokens), and
  a ratio is taken within a round. Before each measurement the others have come to rest: a server looks busily for more
  work for a second. A first round of each kind is not counted.
- One thread each (`OMP_NUM_THREADS=1`), float32. A server is three processes, and works while its client does: *cores*
  is what all processes of the benchmark used together.
- All give the log-probability of each token, which a stage needs to correct for tokens that are not the policy's own.
- Weights are random, which does not change what a token costs; responses of natural lengths differ from engine to
  engine, because each draws in its own way.
- Models and responses are far smaller than those that vLLM is made for, and this is a CPU: nothing here says how the
  engines compare on a GPU, on long contexts, or on large models.
- *measured / floor*: seconds over what the same tokens need at least at the speed that this machine reached in the
  same call: {gflops:.0f} GFLOP/s in a product of two float32 matrices of 1024 x 1024, {bandwidth:.1f} GB/s in a sum
  over main memory, both on one thread (`benchmarks/floors.py`). At each step only responses that go on count. What
  fits a cache can be read faster than that.

{details}

## Handing over the weights
Seconds of `sync` after all weights were changed in place, {rounds} times in turns: median, least and greatest.

{sync}

*opened in*: from the start of its process until the engine was ready, once. Before anything was timed, all weights
were changed and handed over, and the parity guard of the stages held each engine against its policy. The last two
columns are the largest difference between the engine's log-probability of a token that it sampled and the policy's, in
nats, before and after that hand-over; the guard allows 0.001. Weights that are shared have changed before it, and
transformers is the policy.

## Machine
{cpu}, {cores} cores. A round during which other processes used more than {quiet:g} cores does not count;
{disturbed} of {all_rounds} did not.

{versions}

## Reproduce
    python benchmarks/rollout.py{options}
"""


@dataclass
class Found:
    """What was measured with one model."""

    shape: Shape
    parameters: int
    engines: dict[str, dict[str, Any]]
    """How each was opened, and what the gate said of it."""
    sync: list[dict[str, float]] = field(default_factory=list)
    """Seconds of each engine, each time."""
    rounds: dict[tuple[str, int], list[Round]] = field(default_factory=dict)
    """By workload and batch size."""
    disturbed: list[float] = field(default_factory=list)
    """Cores that others used during the rounds that do not count."""


class EngineProcess:
    """An engine that is open in a process of its own, rollout_worker.py."""

    def __init__(self, engine: str, folder: Path, max_length: int):
        self.engine, self.log = engine, folder / f"{engine}.log"
        command = [sys.executable, HERE / "rollout_worker.py", engine, folder, str(max_length)]
        started = time.perf_counter()
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.opened = {**self._answer(), "seconds": time.perf_counter() - started}
        """How weights reach it, and seconds until it was ready."""

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """What it answers. Ends the benchmark when it has died."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the engine {self.engine} ended; its log {self.log} says why")
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


class Bench:
    """Takes turns with all engines on one model."""

    def __init__(self, subject: Subject, shape: Shape, machine: Machine, engines: Mapping[str, EngineProcess]):
        self.subject, self.shape, self.machine, self.engines = subject, shape, machine, engines
        self.max_tokens = subject.max_tokens
        self._seeds = count()

    def gate(self) -> dict[str, dict[str, Any]]:
        """Hands over to each engine and compares it with its policy. Ends the benchmark when they differ."""
        request = {"prompts": self._prompts(4, 0), "sampling": self._sampling(STOPS, 0)}
        return {name: {**engine.opened, **engine.ask("check", **request)} for name, engine in self.engines.items()}

    def sync(self) -> dict[str, float]:
        """Seconds of a hand-over of each."""
        return {name: self._sync(engine) for name, engine in self.engines.items()}

    def round(self, workload: str, batch: int) -> Round:
        """A measurement of each, with the same prompts, which are new."""
        seed = next(self._seeds)
        prompts = self._prompts(max(batch, RESPONSES), seed)
        calls = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
        sampling = self._sampling(WORKLOADS[workload], seed)
        turns = {name: self._turn(engine, calls, sampling) for name, engine in self.engines.items()}
        if workload == "equal" and {length for turn in turns.values() for length in turn.lengths} != {self.max_tokens}:
            sys.exit(
                f"{self.subject.name}: a response ended before {self.max_tokens} tokens, so its timing does not count"
            )
        return turns

    def _sync(self, engine: EngineProcess) -> float:
        settle()
        return engine.ask("sync")["seconds"]

    def _turn(self, engine: EngineProcess, calls: Sequence[Sequence[list[int]]], sampling: dict[str, Any]) -> Turn:
        settle()
        before = Load.now()
        answer = engine.ask("generate", calls=calls, sampling=sampling)
        cores = Load.now().own_since(before)
        floor = sum(
            rollout_floor(self.shape, self.machine, list(map(len, prompts)), lengths)
            for prompts, lengths in zip(calls, answer["lengths"], strict=True)
        )
        return Turn(answer["seconds"], floor, [length for call in answer["lengths"] for length in call], cores)

    def _prompts(self, number: int, seed: int) -> list[list[int]]:
        return list(make_prompts(self.subject.config.vocab_size, number, seed))

    def _sampling(self, stop_ids: Sequence[int], seed: int) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "temperature": 1.0,
            "stop_ids": list(stop_ids),
            "pad_id": PAD,
            "seed": seed,
        }


def measure(subject: Subject, machine: Machine, rounds: int, quiet: float) -> Found:
    """Everything with one model."""
    folder = FILES / subject.name
    model = make_model(subject.config, subject.mean_tokens)
    model.save_pretrained(folder)
    with ExitStack() as stack:
        longest = LONGEST + subject.max_tokens
        engines = {name: stack.enter_context(closing(EngineProcess(name, folder, longest))) for name in ENGINES}
        shape = Shape.of(subject.config.to_dict())
        bench = Bench(subject, shape, machine, engines)
        found = Found(shape, model.num_parameters(), bench.gate())
        found.sync = counted(f"{subject.name}: sync", bench.sync, found.disturbed, rounds, quiet)
        for workload, batch in product(WORKLOADS, BATCHES):
            what = f"{subject.name}: {workload} lengths, batches of {batch}"
            turns = partial(bench.round, workload, batch)
            found.rounds[workload, batch] = counted(what, turns, found.disturbed, rounds, quiet)
    return found


def counted(what: str, one: Callable[[], Result], disturbed: list[float], rounds: int, quiet: float) -> list[Result]:
    """The rounds that count, after one to warm up; adds the cores that others used to `disturbed` for the rest."""
    print(what, file=sys.stderr)
    one()
    results, rest = undisturbed(rounds, one, quiet)
    disturbed += rest
    return results


def faster(rounds: Sequence[Round], engine: str) -> str:
    """Speed over that of transformers, as tables show it."""
    return spread(ratios(rounds, engine, ENGINES[0]), 2)


def result_table(found: Mapping[str, Found]) -> str:
    """A row for each model, workload and engine; a column for each batch size."""
    rows = [
        [name, workload, engine, *(faster(one.rounds[workload, batch], engine) for batch in BATCHES)]
        for name, one in found.items()
        for workload in WORKLOADS
        for engine in ENGINES[1:]
    ]
    return table(("model", "lengths", "engine", *(f"batch {batch}" for batch in BATCHES)), rows)


def detail_row(batch: int, engine: str, rounds: Sequence[Round]) -> list[str]:
    """batch, engine, tokens per second, ratio, measured / floor, cores, mean and maximum length."""
    turns = [one[engine] for one in rounds]
    lengths = [length for turn in turns for length in turn.lengths]
    return [
        str(batch),
        engine,
        f"{median(turn.speed for turn in turns):.0f}",
        "" if engine == ENGINES[0] else faster(rounds, engine),
        f"{median(turn.seconds / turn.floor for turn in turns):.1f}",
        f"{median(turn.cores for turn in turns):.2f}",
        f"{mean(lengths):.1f}",
        str(max(lengths)),
    ]


def details(found: Mapping[str, Found]) -> str:
    """A section for each model and workload."""
    head = ("batch", "engine", "tokens/s", "/ transformers", "measured / floor", "cores", "mean length", "longest")
    parts = []
    for (name, one), workload in product(found.items(), WORKLOADS):
        rows = [detail_row(batch, engine, one.rounds[workload, batch]) for batch, engine in product(BATCHES, ENGINES)]
        parts.append(f"## {name}, {workload} lengths\n{table(head, rows)}")
    return "\n\n".join(parts)


def sync_table(found: Mapping[str, Found]) -> str:
    """Model, engine, hand-over, its seconds, opening, differences before and after."""
    head = ("model", "engine", "weights", "sync, s", "opened in, s", "difference before", "after")
    rows = []
    for name, one in found.items():
        for engine, facts in one.engines.items():
            gaps = [f"{facts[when]:.1e}" if facts[when] is not None else "" for when in ("before", "after")]
            seconds = spread([each[engine] for each in one.sync], 4)
            rows.append([name, engine, facts["summary"], seconds, f"{facts['seconds']:.0f}", *gaps])
    return table(head, rows)


def versions() -> dict[str, str]:
    """Of what computes. vLLM's distribution is named otherwise on a CPU."""
    names = ("torch", "transformers", packages_distributions()["vllm"][0])
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def page(found: Mapping[str, Found], machine: Machine, rounds: int, quiet: float) -> str:
    """The text of docs/benchmark_rollout.md."""
    chosen = [f" --rounds {rounds}" if rounds != 5 else "", f" --quiet {quiet:g}" if quiet != QUIET else ""]
    tiny, small = subjects()
    disturbed = sum(len(one.disturbed) for one in found.values())
    measured = sum(len(one.sync) + sum(map(len, one.rounds.values())) for one in found.values())
    return PAGE.format(
        options="".join(chosen),
        warning=BUSY if quiet > QUIET else "",
        date=datetime.now(UTC).date().isoformat(),
        rounds=rounds,
        result=result_table(found),
        tiny=tiny.name,
        tiny_millions=found[tiny.name].parameters / 1e6,
        tiny_vocabulary=tiny.config.vocab_size,
        tiny_tokens=tiny.max_tokens,
        small=small.name,
        small_millions=found[small.name].parameters / 1e6,
        small_vocabulary=small.config.vocab_size,
        small_tokens=small.max_tokens,
        responses=RESPONSES,
        shortest=SHORTEST,
        longest=LONGEST,
        gflops=machine.operations / 1e9,
        bandwidth=machine.bandwidth / 1e9,
        details=details(found),
        sync=sync_table(found),
        cpu=processor(),
        cores=os.cpu_count(),
        quiet=quiet,
        disturbed=disturbed,
        all_rounds=measured + disturbed,
        versions=listed(versions()),
    )


def main() -> None:
    """Both models, page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, of each model, workload and batch")
    parser.add_argument(
        "--quiet", type=float, default=QUIET, help="cores that other processes may use in a round that counts"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    machine = calibrate()
    found = {subject.name: measure(subject, machine, arguments.rounds, arguments.quiet) for subject in subjects()}
    save_page("benchmark_rollout", page(found, machine, arguments.rounds, arguments.quiet))


if __name__ == "__main__":
    main()
