"""What each format lets through, and that no bytes make a reader fail in a way of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.faults import FileFault, RowFault
from align.data.readers import read

ROWS = [{"prompt": "a"}, {"prompt": "b"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


Reader = Callable[[bytes, str], "Table"]


class Table(NamedTuple):
    """What a file held."""

    rows: list[tuple[int, dict]]
    bad: list[tuple[int, RowFault]]
    blank_lines: int


@pytest.fixture
def table(tmp_path: Path) -> Reader:
    """Reads bytes as a file whose name ends in a suffix."""
    return partial(table_of, tmp_path)


def table_of(folder: Path, content: bytes, suffix: str) -> Table:
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    rows = list(read(path))
    return Table(
        [(number, row) for number, row in rows if isinstance(row, dict)],
        [(number, row) for number, row in rows if isinstance(row, RowFault)],
        sum(row is None for _, row in rows),
    )


def test_blank_lines_are_counted_and_keep_the_numbers(table: Reader) -> None:
    found = table(b'\n{"prompt": "a"}\n \n\n{"prompt": "b"}\n', ".jsonl")
    assert found.rows == [(2, ROWS[0]), (5, ROWS[1])]
    assert found.blank_lines == 3


def test_last_line_needs_no_newline(table: Reader) -> None:
    assert table(b'{"prompt": "a"}\n{"prompt": "b"}', ".jsonl").rows == [(1, ROWS[0]), (2, ROWS[1])]


def test_crlf_and_byte_order_mark_leave_no_trace(table: Reader) -> None:
    expected = [(1, ROWS[0]), (2, ROWS[1])]
    assert table(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ".jsonl").rows == expected
    assert table(b'\xef\xbb\xbf[{"prompt": "a"},\r\n{"prompt": "b"}]\r\n', ".json").rows == expected
    assert table(b"\xef\xbb\xbfprompt\r\na\r\nb\r\n", ".csv").rows == [(2, ROWS[0]), (3, ROWS[1])]


def test_offset_of_a_bad_byte_counts_the_byte_order_mark(table: Reader) -> None:
    [(_, fault)] = table(b'\xef\xbb\xbf{"a": "\xff"}\n', ".jsonl").bad
    assert "offset 10 " in fault.what


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_lines(separator: str, table: Reader) -> None:
    row = {"prompt": f"a{separator}b"}
    if separator >= "\x20":
        assert table(json.dumps(row, ensure_ascii=False).encode() + b"\n", ".jsonl").rows == [(1, row)]
    assert table(f'prompt\n"a{separator}b"\n'.encode(), ".csv").rows == [(2, row)]


def test_csv_rows_are_named_by_the_line_they_start_on(table: Reader) -> None:
    found = table(b'prompt,chosen\n"a\nb","c, ""d"""\n\ne,f\n', ".csv")
    assert found.rows == [(2, {"prompt": "a\nb", "chosen": 'c, "d"'}), (5, {"prompt": "e", "chosen": "f"})]
    assert found.blank_lines == 1


def test_csv_cells_may_be_long(table: Reader) -> None:
    long = "a" * 200_000
    assert table(f"prompt\n{long}\n".encode(), ".csv").rows == [(2, {"prompt": long})]


def test_parquet_keeps_lists_of_messages(table: Reader) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": None}]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    assert table(buffer.getvalue(), ".parquet").rows == [(1, rows[0]), (2, rows[1])]


def test_one_bad_row_of_an_array_does_not_hide_the_others(table: Reader) -> None:
    found = table(b'[{"prompt": "a"}, 3, {"prompt": "b"}]', ".json")
    assert found.rows == [(1, ROWS[0]), (3, ROWS[1])]
    assert [number for number, _ in found.bad] == [2]


@given(st.lists(st.dictionaries(TEXT, TEXT | st.none() | st.lists(TEXT), min_size=1), min_size=1), st.booleans())
def test_json_round_trip(rows: list[dict], ascii_only: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    numbered = list(enumerate(rows, start=1))
    with TemporaryDirectory() as folder:
        assert table_of(Path(folder), "\n".join(lines).encode(), ".jsonl").rows == numbered
        assert table_of(Path(folder), f"[{','.join(lines)}]".encode(), ".json").rows == numbered


SUFFIXES = [f"{suffix}{packed}" for suffix in (".jsonl", ".json", ".csv") for packed in ("", ".gz", ".zst")]


@given(st.binary() | st.text('{}[]",:\\u0a1 \n').map(str.encode), st.sampled_from([*SUFFIXES, ".parquet", ".arrow"]))
def test_any_bytes_are_rows_or_faults(content: bytes, suffix: str) -> None:
    with TemporaryDirectory() as folder:
        try:
            found = table_of(Path(folder), content, suffix)
        except FileFault as fault:
            assert fault.what
        else:
            assert found.rows or found.bad
