"""Token rows on disk: the same rows as without a cache, found again, whole or absent, and not held in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.context import Context
from align.data.load import load
from align.data.render import Renderer
from align.data.rows import asked
from align.data.split import places
from align.data.tokenizer import tokenizer_hash, tokenizer_of
from align.errors import DataError, Interrupted
from align.job import Job
from align.recipe.data_settings import DataSettings, Role
from align.recipe.training_settings import TrainingSettings
from align.training import prepared as cache
from align.training.prepared import Prepared, alone, prepared, write_table
from align.training.rows import preference_row
from tests.models.tiny import new_tokenizer

NUM_ROWS = 40
CONFIG = TrainingSettings(max_length=24)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(new_tokenizer())


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    """Forty pairs, of which every fourth has a long answer and one is not a pair."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"say {n}", "chosen": "yes " * (40 if n % 4 == 0 else 2), "rejected": "no"} for n in range(NUM_ROWS)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "say", "chosen": "yes"}]))
    return DataSettings(path=str(path), held_out=0.3, on_bad="skip")


def context(folder: Path, stage: str = "dpo") -> Context:
    """A stage in a folder; all of a test share its cache."""
    directory = folder / stage
    directory.mkdir(exist_ok=True)
    return Context(Job(stage, stage, 1, "0" * 64, 0, str(directory), {}, {}, {}, [], {}, str(folder / "cache")))


def made(data: DataSettings, renderer: Renderer, where: Context, **changes: Any) -> Prepared:
    config = CONFIG.model_copy(update=changes)
    return prepared(data, Role.PREFERENCES, renderer, preference_row, config, where)


def test_rows_are_those_of_the_file_in_its_order(data: DataSettings, renderer: Renderer, tmp_path: Path) -> None:
    """Row for row what rendering each gives, without those that are too long; prompts and places are of all rows."""
    rows = made(data, renderer, context(tmp_path))
    loaded = load(data, Role.PREFERENCES)
    for ours, theirs in ((rows.train, loaded.train), (rows.held_out, loaded.held_out)):
        rendered = [preference_row(renderer, row) for row in theirs]
        fitting = [one for one in rendered if len(one["prompt_ids"]) + len(one["chosen_ids"]) <= CONFIG.max_length]
        assert list(ours) == fitting
        assert 0 < len(fitting) < len(rendered)
    assert list(rows.prompts) == list(map(asked, loaded.held_out))
    assert list(rows.trained_on) == list(places(map(asked, loaded.train)))
    num_left = len(rows.train)
    assert rows.counts == {"rows": num_left, "rows_too_long": len(loaded.train) - num_left, "rows_skipped": 1}


def test_a_slice_is_a_view_of_rows(data: DataSettings, renderer: Renderer, tmp_path: Path) -> None:
    rows = made(data, renderer, context(tmp_path)).train
    assert list(rows[2:4]) == [rows[2], rows[3]]
    assert list(rows[len(rows) - 1 : 10**6]) == [rows[-1]]


def test_every_row_that_is_left_out_is_listed(data: DataSettings, renderer: Renderer, tmp_path: Path) -> None:
    """Also those that are too long, in every stage that uses the cache."""
    made(data, renderer, context(tmp_path))
    made(data, renderer, context(tmp_path, "reward"))
    first, second = ((tmp_path / stage / "rejected.jsonl").read_text() for stage in ("dpo", "reward"))
    assert first == second
    kinds = [json.loads(line)["kind"] for line in first.splitlines()]
    assert (kinds.count("missing"), kinds.count("over-long"), len(kinds)) == (1, NUM_ROWS // 4, NUM_ROWS // 4 + 1)


def test_a_second_start_reads_no_row(
    data: DataSettings, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(data, renderer, context(tmp_path))
    monkeypatch.setattr(cache, "load", None)  # calling it would raise
    again = made(data, renderer, context(tmp_path, "reward"))
    assert list(again.train) == list(first.train)


@pytest.mark.parametrize("change", ["data", "max_length", "held_out", "template", "tokenizer"])
def test_what_rows_follow_from_is_in_the_key(
    data: DataSettings, renderer: Renderer, tmp_path: Path, change: str
) -> None:
    """A changed file, setting, template or tokenizer never meets rows of the old one."""
    made(data, renderer, context(tmp_path))
    config = {}
    if change == "data":
        with Path(str(data.path)).open("a") as file:
            file.write('{"prompt": "say", "chosen": "yes", "rejected": "no"}\n')
    elif change == "max_length":
        config = {"max_length": 25}
    elif change == "held_out":
        data = data.model_copy(update={"held_out": 0.4})
    elif change == "template":
        data = data.model_copy(update={"template": "plain"})
    else:
        tokenizer = new_tokenizer()
        tokenizer.chat_template += " "
        renderer = Renderer(tokenizer)
    made(data, renderer, context(tmp_path), **config)
    assert len(list((tmp_path / "cache" / "rows").glob("[!.]*"))) == 2


def test_a_damaged_cache_is_made_again(data: DataSettings, renderer: Renderer, tmp_path: Path) -> None:
    """A file that was cut has another size than the manifest says."""
    rows = list(made(data, renderer, context(tmp_path)).train)
    (folder,) = (tmp_path / "cache" / "rows").glob("[!.]*")
    os.truncate(folder / "train.arrow", 100)
    assert list(made(data, renderer, context(tmp_path)).train) == rows


def test_nothing_is_left_of_a_failure(data: DataSettings, renderer: Renderer, tmp_path: Path) -> None:
    """`on_long: error` shows only once all rows were seen; what was written by then is no cache."""
    with pytest.raises(DataError, match="tokens, max_length is 24"):
        made(data, renderer, context(tmp_path), on_long="error")
    assert not list((tmp_path / "cache" / "rows").glob("[!.]*"))
    assert not list((tmp_path / "cache" / "rows").glob(".tmp-*"))


def test_a_signal_ends_the_preparation(
    data: DataSettings, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BATCH", 5)
    where = context(tmp_path)
    where.stop.is_set = True
    with pytest.raises(Interrupted, match="run the same command to continue"):
        made(data, renderer, where)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_prepared import context
from align.records import committed_folder
from align.training.prepared import alone
folder = Path(sys.argv[1])
with alone(folder / "rows" / "key", context(folder)), committed_folder(folder / "rows" / "key") as staging:
    (staging / "train.arrow").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    """The lock went with the process, and its half-written folder is neither taken for a cache nor kept; that of other
    rows is left alone."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    other = tmp_path / "rows" / ".tmp-other-1"
    other.mkdir()
    assert len(list((tmp_path / "rows").glob(".tmp-key-*"))) == 1
    with alone(tmp_path / "rows" / "key", context(tmp_path)):
        assert list((tmp_path / "rows").glob(".tmp-*")) == [other]


def test_two_runs_do_not_make_the_same_rows_at_once(tmp_path: Path) -> None:
    """The second waits; told to stop, it does."""
    waiting = context(tmp_path)
    with alone(tmp_path / "rows" / "key", context(tmp_path)):
        waiting.stop.is_set = True
        with pytest.raises(Interrupted), alone(tmp_path / "rows" / "key", waiting):
            pytest.fail("both hold it")
        with alone(tmp_path / "rows" / "other", waiting):
            pass


def test_no_rows_make_no_file(tmp_path: Path) -> None:
    assert write_table(tmp_path / "none.arrow", iter(())) == 0
    assert not (tmp_path / "none.arrow").exists()


MEMORY = """
import resource, sys
from pathlib import Path
from align.data import spool
from align.data.render import Renderer
from align.recipe.data_settings import DataSettings, Role
from align.recipe.training_settings import TrainingSettings
from align.training.prepared import prepared
from align.training.rows import preference_row
from tests.models.tiny import new_tokenizer
from tests.training.test_prepared import context

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def make(name):
    where, data = context(folder, name), DataSettings(path=str(folder / f"{name}.jsonl"))
    return prepared(data, Role.PREFERENCES, renderer, preference_row, TrainingSettings(max_length=10**6), where)

folder, renderer = Path(sys.argv[1]), Renderer(new_tokenizer())
spool.Spool.__init__.__defaults__ = (2**20,)
make("small")
before = peak()
rows = make("large")
print(len(rows.train), peak() - before)
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """3,000 pairs of about 3,000 tokens, over 70 MB as lists of Python's numbers: under 40 MB more than ten pairs."""
    for name, count in (("small", 10), ("large", 3000)):
        rows = ({"prompt": f"say {n}", "chosen": "zq" * 1000, "rejected": "qz" * 500} for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    number, growth = done.stdout.split()
    assert int(number) > 2500
    assert float(growth) < 40


def test_a_tokenizer_has_one_hash_wherever_it_lies(tmp_path: Path) -> None:
    """Loaded from two folders, with a PAD token added or there: the rows are the same."""
    tokenizer = new_tokenizer()
    for name in ("a", "b/c"):
        tokenizer.save_pretrained(tmp_path / name)
    first, second = (tokenizer_hash(tokenizer_of(str(tmp_path / name))) for name in ("a", "b/c"))
    assert first == second
    tokenizer.chat_template += " "
    assert tokenizer_hash(tokenizer) != first
