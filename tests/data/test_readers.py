"""What each format lets through, and that no bytes make a reader fail in a way of its own."""

from __future__ import annotations

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.faults import FileFault
from align.data.readers import read

ROWS = [{"prompt": "a"}, {"prompt": "b"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def test_blank_lines_are_counted_and_keep_the_numbers() -> None:
    table = read(b'\n{"prompt": "a"}\n \n\n{"prompt": "b"}\n', ".jsonl")
    assert table.rows == [(2, ROWS[0]), (5, ROWS[1])]
    assert table.blank_lines == 3


def test_last_line_needs_no_newline() -> None:
    assert read(b'{"prompt": "a"}\n{"prompt": "b"}', ".jsonl").rows == [(1, ROWS[0]), (2, ROWS[1])]


def test_crlf_and_byte_order_mark_leave_no_trace() -> None:
    expected = [(1, ROWS[0]), (2, ROWS[1])]
    assert read(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ".jsonl").rows == expected
    assert read(b'\xef\xbb\xbf[{"prompt": "a"},\r\n{"prompt": "b"}]\r\n', ".json").rows == expected
    assert read(b"\xef\xbb\xbfprompt\r\na\r\nb\r\n", ".csv").rows == [(2, ROWS[0]), (3, ROWS[1])]


def test_offset_of_a_bad_byte_counts_the_byte_order_mark() -> None:
    [(_, fault)] = read(b'\xef\xbb\xbf{"a": "\xff"}\n', ".jsonl").bad
    assert "offset 10 " in fault.what


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_lines(separator: str) -> None:
    row = {"prompt": f"a{separator}b"}
    if separator >= "\x20":
        assert read(json.dumps(row, ensure_ascii=False).encode() + b"\n", ".jsonl").rows == [(1, row)]
    assert read(f'prompt\n"a{separator}b"\n'.encode(), ".csv").rows == [(2, row)]


def test_csv_rows_are_named_by_the_line_they_start_on() -> None:
    table = read(b'prompt,chosen\n"a\nb","c, ""d"""\n\ne,f\n', ".csv")
    assert table.rows == [(2, {"prompt": "a\nb", "chosen": 'c, "d"'}), (5, {"prompt": "e", "chosen": "f"})]
    assert table.blank_lines == 1


def test_csv_cells_may_be_long() -> None:
    long = "a" * 200_000
    assert read(f"prompt\n{long}\n".encode(), ".csv").rows == [(2, {"prompt": long})]


def test_parquet_keeps_lists_of_messages() -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": None}]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    assert read(buffer.getvalue(), ".parquet").rows == [(1, rows[0]), (2, rows[1])]


def test_one_bad_row_of_an_array_does_not_hide_the_others() -> None:
    table = read(b'[{"prompt": "a"}, 3, {"prompt": "b"}]', ".json")
    assert table.rows == [(1, ROWS[0]), (3, ROWS[1])]
    assert [number for number, _ in table.bad] == [2]


@given(st.lists(st.dictionaries(TEXT, TEXT | st.none() | st.lists(TEXT), min_size=1), min_size=1), st.booleans())
def test_json_round_trip(rows: list[dict], ascii_only: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    numbered = list(enumerate(rows, start=1))
    assert read("\n".join(lines).encode(), ".jsonl").rows == numbered
    assert read(f"[{','.join(lines)}]".encode(), ".json").rows == numbered


@given(st.binary() | st.text('{}[]",:\\u0a1 \n').map(str.encode), st.sampled_from([".jsonl", ".json", ".csv"]))
def test_any_bytes_are_rows_or_faults(content: bytes, suffix: str) -> None:
    try:
        table = read(content, suffix)
    except FileFault as fault:
        assert fault.what
    else:
        assert table.rows or table.bad
