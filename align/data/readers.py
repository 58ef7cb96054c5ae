"""A file to numbered rows, one at a time."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from align.data.faults import FileFault, RowFault, quoted, type_name
from align.data.streams import MAGIC, compression, data_format, opened
from align.data.strict_json import StrictDecoder, place, position, reason, skip_space

RawRow = dict[str, object]
Numbered = tuple[int, RawRow | RowFault | None]
"""A row and its number, or what is wrong with it, or None for a blank line."""

BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
MAX_LINE = 4 * 2**20
"""Bytes of a line: a row that is longer fits no model's context, and would have to fit in memory."""
SAMPLE = 100
"""Rows that are looked at for shapes that are told by their values."""
BATCH = 256
"""Rows of a columnar file that are in memory at a time."""


class Cell(str):
    """A cell of a CSV file: it can only be text, so a number or true and false are read from it."""


def read(path: Path) -> Iterator[Numbered]:
    """The rows of a file by the suffix of its name. Raises FileFault, at the latest where the file turns bad."""
    suffix = data_format(path)
    if suffix not in READERS or (compression(path) and suffix not in COMPRESSIBLE):
        name = "".join(path.suffixes[-2:]) if compression(path) else path.suffix
        wanted = f"wanted {quoted(list(READERS))}; {quoted(list(COMPRESSIBLE))} also with {quoted(list(MAGIC))}"
        raise FileFault(f"`{name or 'no suffix'}` is not a format align reads", wanted)
    with opened(path) as stream:
        found_row = False
        for numbered in READERS[suffix](stream):
            found_row = found_row or numbered[1] is not None
            yield numbered
    if not found_row:
        raise FileFault("the file has no rows")


class Survey(NamedTuple):
    """What a first look at a file shows."""

    columns: list[str]
    """Every column that some row has, in the order of first appearance."""
    sample: list[RawRow]
    """The first rows."""
    num_rows: int
    """Rows and blank lines."""


def survey(path: Path) -> Survey:
    """Looks at every row once. Raises FileFault."""
    columns: dict[str, None] = {}
    sample: list[RawRow] = []
    num_rows = 0
    for _, row in read(path):
        num_rows += 1
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
            if len(sample) < SAMPLE:
                sample.append(row)
    return Survey(list(columns), sample, num_rows)


def read_jsonl(stream: IO[bytes]) -> Iterator[Numbered]:
    """One object per line. Lines end at \\n only: U+2028 and its like are text."""
    decoder = StrictDecoder()
    first = True
    for number, offset, line in _lines(stream):
        if not line.strip():
            yield number, None
            continue
        if first:
            _check_jsonl(line.strip())
            first = False
        try:
            yield number, _object(_line(line.removesuffix(b"\n"), offset, decoder))
        except RowFault as fault:
            is_cut = not line.endswith(b"\n") and fault.kind == "not JSON"
            yield number, _cut(len(line)) if is_cut else fault


def read_json(stream: IO[bytes]) -> Iterator[Numbered]:
    """One array of objects; rows are numbered from 1. The text is in memory whole, its rows are not."""
    text = "".join(line for _, line in _text_lines(stream, longest=sys.maxsize))
    at = skip_space(text, 0)
    if text[at] != "[":
        raise _not_an_array(text, at)
    decoder = StrictDecoder()
    at = skip_space(text, at + 1)
    is_open = text[at : at + 1] != "]"
    number = 0
    while is_open:
        number += 1
        try:
            value, at = decoder.decode(text, at)
        except ValueError as error:
            raise FileFault(f"not JSON at {place(text, position(error, at))}", reason(error), number) from None
        try:
            decoder.check()
            yield number, _object(value)
        except RowFault as fault:
            yield number, fault
        at, is_open = _after_item(text, skip_space(text, at), number)
    if text[at + 1 :].strip():
        raise FileFault(f"there is more after the end of the array, at {place(text, at + 1)}")


def read_csv(stream: IO[bytes]) -> Iterator[Numbered]:
    """Comma-separated with a header; a row is named by the line it starts on."""
    csv.field_size_limit(MAX_LINE)
    lines = csv.reader((line for _, line in _text_lines(stream)), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in lines:
            number, start = start, lines.line_num + 1
            if not cells:
                yield number, None
            elif not header:
                header = _checked_header(cells)
            elif len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)} columns"
                yield number, RowFault("wrong number of cells", what, "quote cells that hold commas")
            else:
                yield number, dict(zip(header, map(Cell, cells), strict=True))
    except csv.Error as error:
        raise FileFault(
            f"not CSV: {error}", "quote cells with double quotes, and double a quote in a cell", start
        ) from None


def read_parquet(stream: IO[bytes]) -> Iterator[Numbered]:
    """Any parquet file; rows are numbered from 1."""
    import pyarrow.parquet

    def batches() -> Iterable[Any]:
        return pyarrow.parquet.ParquetFile(stream).iter_batches(BATCH)

    return _columnar(batches, "parquet")


def read_arrow(stream: IO[bytes]) -> Iterator[Numbered]:
    """An Arrow file, in the stream format (as `datasets` writes them) or the file format; rows are numbered from 1."""
    import pyarrow

    def batches() -> Iterable[Any]:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if not is_file:
            return pyarrow.ipc.open_stream(stream)
        file = pyarrow.ipc.open_file(stream)
        return (file.get_batch(index) for index in range(file.num_record_batches))

    return _columnar(batches, "Arrow")


READERS: dict[str, Callable[[IO[bytes]], Iterator[Numbered]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
COMPRESSIBLE = (".jsonl", ".json", ".csv")


def _columnar(batches: Callable[[], Iterable[Any]], name: str) -> Iterator[Numbered]:
    # Imported here: it costs more than the rest of `align plan`, and most data is JSON.
    import pyarrow

    number = 0
    try:
        for batch in batches():
            _refuse_repeats(batch.schema.names)
            for start in range(0, len(batch), BATCH):
                for row in batch.slice(start, BATCH).to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FileFault(f"not a readable {name} file: {str(error).partition(chr(10))[0]}") from None


def _lines(stream: IO[bytes], longest: int = MAX_LINE) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset in the file, and bytes of each line, its newline included. Raises FileFault when there is no
    text at all, when it is UTF-16, and for a line of over `longest` bytes."""
    at_once = -1 if longest == sys.maxsize else longest + 1
    first = stream.readline(at_once)
    if first.startswith(UTF16_BOMS) or b"\0" in first[:4]:
        raise FileFault("the file is UTF-16 or UTF-32", "save it as UTF-8")
    offset = len(BOM) if first.startswith(BOM) else 0
    is_blank = True
    for number, line in enumerate(chain([first[offset:]], iter(lambda: stream.readline(at_once), b"")), start=1):
        if len(line) > longest:
            raise FileFault(f"the line is over {longest} bytes", "no model reads so long a row: split it", number)
        is_blank = is_blank and not line.strip()
        if line:
            yield number, offset, line
        offset += len(line)
    if is_blank:
        raise FileFault("the file has only blank lines" if first else "the file is empty")


def _text_lines(stream: IO[bytes], longest: int = MAX_LINE) -> Iterator[tuple[int, str]]:
    """Number and text of each line. Raises FileFault for a byte that is not UTF-8."""
    for number, offset, line in _lines(stream, longest):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            what = f"byte 0x{line[error.start]:02x} at offset {offset + error.start} (line {number}) is not UTF-8"
            raise FileFault(what, "save the file as UTF-8") from None


def _check_jsonl(first: bytes) -> None:
    if first.startswith(b"["):
        raise FileFault("the file starts with `[`: it is a JSON array, not one object per line", "rename it to .json")
    if b"\r" in first:
        raise FileFault("its lines end in carriage returns alone", "save it with newlines")
    if first == b"{":
        raise FileFault("objects are spread over several lines", "write each object on one line")


def _line(line: bytes, offset: int, decoder: StrictDecoder) -> object:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RowFault(
            "not UTF-8",
            f"byte 0x{line[error.start]:02x} at offset {offset + error.start} of the file is not UTF-8",
            "save the file as UTF-8",
        ) from None
    start = skip_space(text, 0)
    try:
        value, end = decoder.decode(text, start)
    except ValueError as error:
        column = position(error, start) + 1
        raise RowFault("not JSON", f"not JSON at column {column}", reason(error)) from None
    decoder.check()
    rest = skip_space(text, end)
    if rest < len(text):
        raise RowFault("not JSON", f"the line goes on after its object, at column {rest + 1}", "one object per line")
    return value


def _object(value: object) -> RawRow:
    if not isinstance(value, dict):
        raise RowFault("not an object", f"the row is {type_name(value)}", 'wanted an object such as {"prompt": ...}')
    return value


def _after_item(text: str, at: int, number: int) -> tuple[int, bool]:
    """Where the next item of the array starts and True, or where the array ends and False."""
    if text[at : at + 1] == ",":
        following = skip_space(text, at + 1)
        if text[following : following + 1] == "]":
            raise FileFault(f"a comma after the last row, at {place(text, at)}", "remove it", number)
        return following, True
    if text[at : at + 1] == "]":
        return at, False
    if at == len(text):
        raise FileFault("the array is not closed", "the file was cut: export or copy it again", number)
    raise FileFault(f"no comma before {place(text, at)}", "", number)


def _cut(length: int) -> RowFault:
    what = f"the last line is not complete JSON ({length} bytes, no newline)"
    return RowFault("not JSON", what, "the file was cut: export or copy it again")


def _not_an_array(text: str, at: int) -> FileFault:
    wanted = "wanted an array of objects, [{...}, {...}]"
    try:
        value, end = StrictDecoder().decode(text, at)
    except ValueError as error:
        return FileFault(f"not JSON at {place(text, position(error, at))}", wanted)
    if isinstance(value, dict) and text[skip_space(text, end) :].startswith("{"):
        return FileFault("the file holds one object after another, not a JSON array", "rename it to .jsonl")
    inside = [key for key, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    hint = f"; save what is under {quoted(inside[:1])} as the file" if inside else ""
    return FileFault(f"the file is {type_name(value)} at its top level", wanted + hint)


def _checked_header(names: list[str]) -> list[str]:
    _refuse_repeats(names)
    if len(names) == 1 and ";" in names[0]:
        raise FileFault("the header has semicolons and no commas", "separate the cells with commas", 1)
    if not all(name.strip() for name in names):
        raise FileFault("the header has a column without a name", "the first line must name the columns", 1)
    return names


def _refuse_repeats(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FileFault(f"two columns have the name {quoted(twice[:1])}", "rename one of them")
