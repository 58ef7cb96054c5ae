"""One side of data.py in a process of its own: `python data_worker.py align|trl PAIRS MODEL FOLDER`. Prints what it
measured as JSON. FOLDER is new: nothing is found in a cache."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_LENGTH = 512
SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")


def align(pairs: Path, model: Path, folder: Path) -> tuple[dict[str, float], Iterable[Mapping[str, Any]]]:
    """Seconds of checking and of all, and the rows."""
    from align.context import Context
    from align.data.load import load
    from align.data.tokenizer import renderer_of
    from align.job import Job
    from align.recipe.data_settings import DataSettings, Role
    from align.recipe.training_settings import TrainingSettings
    from align.training.prepared import prepared
    from align.training.rows import preference_row

    data = DataSettings(path=str(pairs), held_out=0.0)
    context = Context(Job("dpo", "dpo", 1, "0" * 64, 0, str(folder), {}, {}, {}, [], {}))
    renderer = renderer_of(model)
    start = time.perf_counter()
    load(data, Role.PREFERENCES)
    checked = time.perf_counter()
    config = TrainingSettings(max_length=MAX_LENGTH)
    rows = prepared(data, Role.PREFERENCES, renderer, preference_row, config, context)
    done = time.perf_counter()
    again = prepared(data, Role.PREFERENCES, renderer, preference_row, config, context)
    found = time.perf_counter()
    assert len(again.train) == len(rows.train)
    return {"check": checked - start, "all": done - checked, "again": found - done}, rows.train


def trl(pairs: Path, model: Path, folder: Path) -> tuple[dict[str, float], Iterable[Mapping[str, Any]]]:
    """Seconds of reading, of all and of a second time, and the rows."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config = DPOConfig(
        str(folder / "out"), max_length=MAX_LENGTH, report_to="none", bf16=False, use_cpu=True, disable_tqdm=True
    )

    def prepare() -> tuple[float, Any]:
        dataset = load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(folder / "cache"))
        read = time.perf_counter()
        trainer = DPOTrainer(policy, args=config, train_dataset=dataset, processing_class=tokenizer)
        return read, trainer.train_dataset

    start = time.perf_counter()
    read, rows = prepare()
    done = time.perf_counter()
    prepare()
    found = time.perf_counter()
    return {"check": read - start, "all": done - start, "again": found - done}, rows


def main(side: str, pairs: Path, model: Path, folder: Path) -> None:
    """Measures one side; a hash of all rows tells whether both made the same."""
    folder.mkdir(parents=True)
    seconds, rows = {"align": align, "trl": trl}[side](pairs, model, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    digest, number = hashlib.sha256(), 0
    for row in rows:
        number += 1
        digest.update(json.dumps([list(row[name]) for name in SIDES]).encode())
    print(json.dumps({"seconds": seconds, "peak": peak, "rows": number, "digest": digest.hexdigest()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
