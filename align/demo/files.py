"""Writes the demo's data files: `python -m align.demo.files configs/demo`. The same seed gives the same bytes.

Held-out instructions are drawn first and appear in no other file, so no stage ever trains on them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from align.demo import world
from align.records import write_text

SIZES = {"heldout": 300, "demonstrations": 4000, "preferences": 3000, "prompts": 2000, "corpus": 2500}
SEED = 20
SPOKEN = sorted(
    {
        *" ".join(
            (*world.POLITE, *world.RUDE, world.THANKS, *world.FILLERS, "list from repeat greet say hello and")
        ).split(),
        *world.CATEGORIES,
        *world.NUMBERS,
        *world.TIMES,
    }
)
"""Words of instructions and manners."""


def make_files(seed: int = SEED) -> dict[str, str]:
    """The text of each file by its name."""
    rng = random.Random(seed)
    held_out: set[str] = set()
    while len(held_out) < SIZES["heldout"]:
        held_out.add(world.draw_task(rng).instruction)

    def tasks(count: int) -> Iterator[world.Task]:
        while count:
            task = world.draw_task(rng)
            if task.instruction not in held_out:
                count -= 1
                yield task

    return {
        "heldout.jsonl": _lines({"prompt": instruction} for instruction in sorted(held_out)),
        "demonstrations.jsonl": _lines(
            {"prompt": task.instruction, "response": world.draw_answer(task, rng)}
            for task in tasks(SIZES["demonstrations"])
        ),
        "preferences.jsonl": _lines(_pairs(tasks(10**9), rng, SIZES["preferences"])),
        "prompts.jsonl": _lines({"prompt": task.instruction} for task in tasks(SIZES["prompts"])),
        "corpus.jsonl": _lines({"text": _sentence(rng)} for _ in range(SIZES["corpus"])),
    }


def _pairs(tasks: Iterator[world.Task], rng: random.Random, count: int) -> Iterator[dict[str, str]]:
    while count:
        task = next(tasks)
        first, second = world.draw_answer(task, rng), world.draw_answer(task, rng)
        gold_first, gold_second = world.gold(task.instruction, first), world.gold(task.instruction, second)
        if gold_first == gold_second:  # the judge is not asked about ties
            continue
        if not world.preferred(gold_first, gold_second, rng):
            first, second = second, first
        count -= 1
        yield {"prompt": task.instruction, "chosen": first, "rejected": second}


def _sentence(rng: random.Random) -> str:
    """A sentence of the language that is not an instruction: what the base model knows before it is taught."""
    category = rng.choice(sorted(world.CATEGORIES))
    form = rng.random()
    if form < 0.15:
        return f"words : {' '.join(rng.sample(SPOKEN, 5))} ."
    if form < 0.4:
        return f"{category} : {' '.join(rng.sample(world.CATEGORIES[category], 4))} ."
    words = " ".join(rng.sample(world.WORDS + world.NAMES, rng.choice((2, 3, 4))))
    return f"{rng.choice(world.NAMES)} said {words} and {rng.choice(world.NAMES)} said {words} ."


def _lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_files(folder: Path) -> None:
    """Writes every file of the demo into `folder`."""
    for name, text in make_files().items():
        write_text(folder / name, text)


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
