"""Speed and memory of preparing preferences, against TRL's own preparation of the same file:
`python benchmarks/data.py`.

Writes docs/benchmark_data.md. Each measurement is a process of its own with an empty cache, and both sides take turns;
nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from machine import QUIET, processor, undisturbed
from pages import listed, save_page, spread, table

from align.data.rows import Document
from stages.base.config import Config
from stages.base.run import new_model, train_tokenizer

HERE = Path(__file__).parent
FILES = Path("runs/data-benchmark")
PACKAGES = ("trl", "transformers", "datasets")
SIDES = ("align", "trl")
WORDS = [
    f"{start}{end}" for start in ("ba", "ke", "mi", "no", "tu", "sha") for end in ("", "ld", "n", "rk", "st", "ve")
]
PROMPT, ANSWER = 30, 60
"""Words."""

PAGE = """# Preparing preferences

Made by `python benchmarks/data.py{options}` on {date}. Everything on this page was measured in that call.

## Result
Preference pairs per second, from the file to token ids that a trainer takes: median of {pairs} pairs of runs, least and
greatest.

{result}

{details}

## What the numbers mean, and what not
- {rows} pairs of conversations in {megabytes:.0f} MB of JSONL: a question of {prompt} words and two answers of
  {answer}, random and made up, in a chat template. TRL {trl}: `load_dataset` and what `DPOTrainer` does with a data
  set when it is made. align: what a `dpo` stage does with its data. Both gave the same token ids for every row{same}.
- *read*: for align, every row is parsed strictly, checked and split; for TRL, the file is converted to Arrow. *second
  start*: the same once more in the same process, with what both keep on disk.
- *peak memory* is that of the whole process, its libraries included (without any data about {floor:.0f} MiB).
- align does more work per row (it checks every row and computes every loss mask from where turns end), TRL asks its
  tokenizer for batches of one; neither used more than one process.
- Each measurement is a process of its own with an empty cache folder; A B A B, and a ratio is taken within a pair.

## Machine
{cpu}, {cores} cores. A pair during which other processes used more than {quiet:g} cores does not count; {disturbed} of
{all_pairs} did not.

{versions}

## Reproduce
    python benchmarks/data.py{options}
"""


def make_model(folder: Path) -> None:
    """A tiny model whose tokenizer and chat template are those of the demo."""
    rng = random.Random(0)
    texts = [Document(" ".join(rng.choices(WORDS, k=50)), "texts:1") for _ in range(200)]
    config = Config(vocabulary=1000, context=1024, hidden=32, layers=1, heads=2)
    tokenizer = train_tokenizer(texts, config.vocabulary, config.context)
    model = new_model(config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_pairs(path: Path, number: int) -> None:
    """Conversations of random words; no prompt twice."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for place in range(number):
            prompt, *answers = (" ".join(rng.choices(WORDS, k=words)) for words in (PROMPT, ANSWER, ANSWER))
            row = {"prompt": [{"role": "user", "content": f"{place} {prompt}"}]}
            for name, answer in zip(("chosen", "rejected"), answers, strict=True):
                row[name] = [{"role": "assistant", "content": answer}]
            file.write(json.dumps(row) + "\n")


def measure_pair() -> dict[str, dict[str, Any]]:
    """A run of each side. Ends the benchmark when one fails."""
    found = {}
    for side in SIDES:
        folder = FILES / "run"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, HERE / "data_worker.py", side, FILES / "pairs.jsonl", FILES / "model", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "."}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(FILES / "run", ignore_errors=True)
    return found


def page(pairs: list[dict[str, dict[str, Any]]], disturbed: list[float], rows: int, quiet: float, options: str) -> str:
    """The text of docs/benchmark_data.md."""
    speeds = {side: [one[side]["rows"] / one[side]["seconds"]["all"] for one in pairs] for side in SIDES}
    ratios = [a / b for a, b in zip(speeds["align"], speeds["trl"], strict=True)]
    peaks = {side: median(one[side]["peak"] for one in pairs) / 2**20 for side in SIDES}
    head = ("", "pairs/s", "read, s", "all, s", "second start, s", "peak memory, MiB")
    details = [
        [
            side,
            spread(speeds[side], 0),
            *(f"{median(one[side]['seconds'][name] for one in pairs):.1f}" for name in ("check", "all", "again")),
            f"{peaks[side]:.0f}",
        ]
        for side in SIDES
    ]
    same = all(one["align"]["digest"] == one["trl"]["digest"] for one in pairs)
    return PAGE.format(
        options=options,
        date=datetime.now(UTC).date().isoformat(),
        pairs=len(pairs),
        result=f"align / TRL: **{spread(ratios, 2)}**",
        details=table(head, details),
        rows=f"{rows:,}",
        megabytes=(FILES / "pairs.jsonl").stat().st_size / 1e6,
        prompt=PROMPT,
        answer=ANSWER,
        trl=version("trl"),
        same="" if same else " but for those that the two render otherwise: THE DIGESTS DIFFER",
        floor=600,
        cpu=processor(),
        cores=os.cpu_count(),
        quiet=quiet,
        disturbed=len(disturbed),
        all_pairs=len(pairs) + len(disturbed),
        versions=listed({"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}),
    )


def main() -> None:
    """Files, pairs of runs, page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000, help="preference pairs in the file")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs that count")
    parser.add_argument("--quiet", type=float, default=QUIET, help="cores that others may use in a pair that counts")
    parser.add_argument("--print", action="store_true", help="print the page and write none")
    arguments = parser.parse_args()
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir(parents=True)
    make_model(FILES / "model")
    make_pairs(FILES / "pairs.jsonl", arguments.rows)
    pairs, disturbed = undisturbed(arguments.pairs, measure_pair, arguments.quiet)
    chosen = [
        f" --{name} {getattr(arguments, name)}"
        for name in ("rows", "pairs", "quiet")
        if getattr(arguments, name) != parser.get_default(name)
    ]
    text = page(pairs, disturbed, arguments.rows, arguments.quiet, "".join(chosen))
    print(text) if arguments.print else save_page("benchmark_data", text)


if __name__ == "__main__":
    main()
