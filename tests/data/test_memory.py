"""Data need not fit in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
from align.data import spool
from align.data.load import content_hash, load
from align.recipe.data_settings import DataSettings, Role

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

sys.argv[2:] and __import__("pyarrow.parquet")
load(DataSettings(path="small.jsonl"), Role.PREFERENCES)
spool.HELD, before = 2**20, peak()
spool.Spool.__init__.__defaults__ = (2**20,)
settings = DataSettings(path=sys.argv[1])
data = load(settings, Role.PREFERENCES)
content_hash(settings)
print(sum(len(row.chosen) for row in data.train) + sum(len(row.chosen) for row in data.held_out), peak() - before)
"""
CHECK = """
import resource
from align.data.checking import check as checking
from align.data import spool
from align.recipe.data_settings import Role

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def check(name):
    return checking.check(checking.Order([name], Role.PREFERENCES), lambda number: None)

check("small.jsonl")
before = peak()
spool.Spool.__init__.__defaults__ = (2**20,)
print(len(check("large.jsonl").left_out), peak() - before)
"""
NUM_ROWS, LENGTH = 20_000, 2_000


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("small.jsonl", 10)


def write(name: str, count: int) -> None:
    with Path(name).open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = {"prompt": f"Question {number}?", "chosen": "a" * LENGTH, "rejected": "b" * LENGTH}
            stream.write(json.dumps(row) + "\n")


def test_memory_does_not_grow_with_the_file() -> None:
    """80 MB of rows, of which 1 MB are held: loading and reading them all takes under 20 MB more than ten rows do."""
    write("large.jsonl", NUM_ROWS)
    assert Path("large.jsonl").stat().st_size > 80e6
    done = subprocess.run([sys.executable, "-c", SCRIPT, "large.jsonl"], capture_output=True, text=True, check=True)
    total, growth = done.stdout.split()
    assert int(total) == NUM_ROWS * LENGTH
    assert float(growth) < 20


def test_checking_keeps_no_texts() -> None:
    """80 MB of rows take under 20 MB more than ten do: hashes, and the few words in which two answers differ."""
    write("large.jsonl", NUM_ROWS)
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True, timeout=120)
    num_rows, growth = done.stdout.split()
    assert int(num_rows) == NUM_ROWS
    assert float(growth) < 20
