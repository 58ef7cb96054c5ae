"""Token rows in a cache on disk: made once, row by row, and memory-mapped by every stage that trains on the same.

A cache is a committed folder (align.records), `rows/<key>` in the cache that runs share. The key is the hash of all
that the rows follow from, so it is never wrong and never changed; removing it costs the time to make it again. What is
in memory does not grow with the data, but for a few bytes a row.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import pyarrow
from datasets import Dataset as Table

from align.context import Context
from align.data.files import RowProblem
from align.data.load import content_hash, load
from align.data.render import Renderer
from align.data.rows import Prompt, asked
from align.data.split import Place, places
from align.data.spool import Spool
from align.data.tokenizer import tokenizer_hash
from align.errors import ArtifactError, Interrupted, WriteError
from align.recipe.data_settings import DataSettings, Role
from align.recipe.training_settings import TrainingSettings
from align.records import committed_folder, fingerprint, read_manifest, sweep, write_json, write_lines
from align.training.progress import StageProgress
from align.training.rows import REJECTED, TokenRow, rejected_line, token_rows

VERSION = 1
"""Goes up whenever the same data and settings would give other rows."""
COUNTS = "counts.json"
BATCH = 500
"""Rows that are written at a time."""
POLL = 0.5
"""Seconds between two looks at whether another run is done with the same rows."""

T = TypeVar("T")
Convert = Callable[[Renderer, Any], TokenRow]


class Stored(Sequence[T], Generic[T]):
    """Rows of a memory-mapped table. `make` gives the value of a row; a slice is a view."""

    def __init__(self, table: Table, make: Callable[[dict[str, Any]], T]):
        self.table = table
        self._make = make

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Stored(self.table.select(range(len(self))[index]), self._make)
        return self._make(self.table[index])

    def __iter__(self) -> Iterator[T]:
        return (self._make(row) for row in self.table)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Prepared:
    """What a stage trains and measures on."""

    train: Stored[TokenRow]
    held_out: Sequence[TokenRow]
    prompts: Sequence[Prompt]
    """Those of the held-out rows, also of rows that are too long."""
    trained_on: Sequence[Place]
    """Keys and places of the training prompts, also of rows that are too long."""
    counts: dict[str, int]
    """rows, rows_too_long, rows_skipped: for the stage's metrics."""


def prepared(
    data: DataSettings, role: Role, renderer: Renderer, convert: Convert, config: TrainingSettings, context: Context
) -> Prepared:
    """The rows of a stage as token ids, found in the cache or made now. Rows that are left out are listed in the
    stage's rejected.jsonl with the reason. Raises DataError with everything that is wrong."""
    key = fingerprint(
        {
            "version": VERSION,
            "content": content_hash(data),
            "data": data.model_dump(mode="json"),
            "role": str(role),
            "convert": convert.__name__,
            "tokenizer": tokenizer_hash(renderer.tokenizer),
            "max_length": config.max_length,
            "on_long": config.on_long,
        }
    )
    folder = context.cache / "rows" / key[:16]
    with alone(folder, context):
        if not _is_whole(folder):
            with committed_folder(folder) as staging:
                _make(staging, data, role, partial(convert, renderer), config, context)
    rejected = folder / REJECTED
    if rejected.exists() and context.is_main:
        with rejected.open(encoding="utf-8") as lines:
            write_lines(context.directory / REJECTED, lines)
    return Prepared(
        train=Stored(Table.from_file(str(folder / "train.arrow")), dict),
        held_out=_stored(folder / "held_out.arrow", dict),
        prompts=_stored(folder / "prompts.arrow", lambda row: Prompt(json.loads(row["messages"]), row["source"])),
        trained_on=_stored(folder / "trained_on.arrow", lambda row: Place(row["key"], row["source"])),
        counts=json.loads((folder / COUNTS).read_text(encoding="utf-8")),
    )


@contextmanager
def alone(folder: Path, context: Context) -> Iterator[None]:
    """Held by one process at a time, so that two runs do not make the same folder at once. Clears what a run left that
    was killed while it made it. Raises Interrupted when the stage is to stop."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".lock-{folder.name}").open("w")
    except OSError as error:
        raise WriteError(f"{folder}: cannot write: {error.strerror or error}") from error
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _go_on(context)
                time.sleep(POLL)
        sweep(folder.parent, folder.name)
        yield


def _is_whole(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder))
    except ArtifactError:
        return False


def _make(
    folder: Path,
    data: DataSettings,
    role: Role,
    convert: Callable[[Any], TokenRow],
    config: TrainingSettings,
    context: Context,
) -> None:
    """Reads, checks and tokenises everything into `folder`."""
    dataset = load(data, role)
    sides = {"train": dataset.train, "held_out": dataset.held_out}
    too_long = {name: Spool(RowProblem) for name in sides}
    kept = {}
    with StageProgress(context.job.stage, sum(map(len, sides.values())), "rows tokenised") as progress:
        for name, rows in sides.items():
            seen = _watched(rows, len(dataset.train) if name == "held_out" else 0, progress, context)
            converted = token_rows(seen, convert, config, context.job.stage, too_long[name])
            kept[name] = write_table(folder / f"{name}.arrow", converted)
    prompts = map(asked, dataset.held_out)
    kept_whole = ({"messages": json.dumps(one.messages), "source": one.source} for one in prompts)
    write_table(folder / "prompts.arrow", kept_whole)
    write_table(folder / "trained_on.arrow", (place._asdict() for place in places(map(asked, dataset.train))))
    skipped = dataset.report.skipped
    if skipped or any(too_long.values()):
        write_lines(folder / REJECTED, map(rejected_line, chain(skipped, *too_long.values())))
    counts = {"rows": kept["train"], "rows_too_long": len(too_long["train"]), "rows_skipped": len(skipped)}
    write_json(folder / COUNTS, counts)


def _watched(rows: Iterable[Any], done: int, progress: StageProgress, context: Context) -> Iterator[Any]:
    """The rows, with the progress shown and the stop flag looked at now and then. `done`: how many came before."""
    for number, row in enumerate(rows, start=done + 1):
        if number % BATCH == 0:
            progress.show(number)
            _go_on(context)
        yield row


def _go_on(context: Context) -> None:
    if context.stop.is_set:
        raise Interrupted(f"{context.job.stage}: stopped before its rows were ready; run the same command to continue")


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows of text, bytes, true and false, and lists of token ids as an Arrow stream; returns how many there
    were. None: no file."""
    rows = iter(rows)
    batch = list(islice(rows, BATCH))
    if not batch:
        return 0
    schema = pyarrow.schema({name: _arrow_type(value) for name, value in batch[0].items()})
    number = 0
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        while batch:
            stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
            number += len(batch)
            batch = list(islice(rows, BATCH))
    return number


def _arrow_type(value: object) -> pyarrow.DataType:
    """Ids of tokens and labels fit 32 bits."""
    if isinstance(value, list):
        return pyarrow.list_(pyarrow.int32())
    return {bool: pyarrow.bool_(), str: pyarrow.string(), bytes: pyarrow.binary()}[type(value)]


def _stored(path: Path, make: Callable[[dict[str, Any]], T]) -> Sequence[T]:
    """The rows of a file of `write_table`; none where there is no file."""
    return Stored(Table.from_file(str(path)), make) if path.exists() else ()
