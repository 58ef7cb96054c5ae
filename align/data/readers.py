"""Bytes of a file to numbered rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field

from align.data.faults import FileFault, RowFault, quoted, type_name
from align.data.strict_json import StrictDecoder, place, position, reason, skip_space

RawRow = dict[str, object]
BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass
class Table:
    """The rows of a file by number, and what is wrong with those that could not be read."""

    rows: list[tuple[int, RawRow]] = field(default_factory=list)
    bad: list[tuple[int, RowFault]] = field(default_factory=list)
    blank_lines: int = 0


def read(content: bytes, suffix: str) -> Table:
    """Reads a file's bytes by the suffix of its name. Raises FileFault when no row can be had from it."""
    if suffix not in READERS:
        raise FileFault(f"`{suffix or 'no suffix'}` is not a format align reads", f"wanted {quoted(list(READERS))}")
    if not content.removeprefix(BOM).strip():
        raise FileFault("the file has only blank lines" if content else "the file is empty")
    table = READERS[suffix](content)
    if not (table.rows or table.bad):
        raise FileFault("the file has no rows")
    return table


def read_jsonl(content: bytes) -> Table:
    """One object per line. Lines end at \\n only: U+2028 and its like are text."""
    _refuse_utf16(content)
    offset = len(BOM) if content.startswith(BOM) else 0
    lines = content[offset:].split(b"\n")
    first = next(line.strip() for line in lines if line.strip())
    if first.startswith(b"["):
        raise FileFault("the file starts with `[`: it is a JSON array, not one object per line", "rename it to .json")
    if first == b"{":
        raise FileFault("objects are spread over several lines", "write each object on one line")
    table = Table()
    decoder = StrictDecoder()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                table.rows.append((number, _object(_line(line, offset, decoder))))
            except RowFault as fault:
                is_cut = number == len(lines) and fault.kind == "not JSON"
                table.bad.append((number, _cut(len(line)) if is_cut else fault))
        elif number < len(lines):
            table.blank_lines += 1
        offset += len(line) + 1
    return table


def read_json(content: bytes) -> Table:
    """One array of objects; rows are numbered from 1."""
    text = _decoded(content)
    at = skip_space(text, 0)
    if text[at] != "[":
        raise _not_an_array(text, at)
    table = Table()
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
            table.rows.append((number, _object(value)))
        except RowFault as fault:
            table.bad.append((number, fault))
        at, is_open = _after_item(text, skip_space(text, at), number)
    if text[at + 1 :].strip():
        raise FileFault(f"there is more after the end of the array, at {place(text, at + 1)}")
    return table


def read_csv(content: bytes) -> Table:
    """Comma-separated with a header; a row is named by the line it starts on."""
    text = _decoded(content)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    table = Table()
    header: list[str] = []
    start = 1
    try:
        for cells in lines:
            number, start = start, lines.line_num + 1
            if not cells:
                table.blank_lines += 1
            elif not header:
                header = _checked_header(cells)
            elif len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)} columns"
                table.bad.append((number, RowFault("wrong number of cells", what, "quote cells that hold commas")))
            else:
                table.rows.append((number, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise FileFault(
            f"not CSV: {error}", "quote cells with double quotes, and double a quote in a cell", start
        ) from None
    return table


def read_parquet(content: bytes) -> Table:
    """Any parquet file; rows are numbered from 1."""
    # Imported here: it costs more than the rest of `align plan`, and most data is JSON.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        _refuse_repeats(table.column_names)
        return Table(rows=list(enumerate(table.to_pylist(), start=1)))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FileFault(f"not a readable parquet file: {str(error).partition(chr(10))[0]}") from None


READERS: dict[str, Callable[[bytes], Table]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


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


def _refuse_utf16(content: bytes) -> None:
    if content.startswith(UTF16_BOMS) or b"\0" in content[:4]:
        raise FileFault("the file is UTF-16 or UTF-32", "save it as UTF-8")


def _decoded(content: bytes) -> str:
    _refuse_utf16(content)
    try:
        return content.decode().removeprefix(BOM.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{content[error.start]:02x} at offset {error.start} (line {line}) is not UTF-8"
        raise FileFault(what, "save the file as UTF-8") from None


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
