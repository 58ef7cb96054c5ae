"""Loading whole data sets: reports, skipping, limits, held-out files, hashes, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.data.load import content_hash, load
from align.errors import DataError
from align.recipe.data_settings import DataSettings, Role


def pairs(count: int, start: int = 0) -> list[dict]:
    numbers = range(start, start + count)
    return [{"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in numbers]


def write(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def preferences(**settings: object):
    return load(DataSettings.model_validate(settings), Role.PREFERENCES)


def messages(**settings: object) -> list[str]:
    with pytest.raises(DataError) as error:
        preferences(**settings)
    assert error.value.exit_code == 3
    return [str(problem) for problem in error.value.problems]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_report_counts_each_file() -> None:
    write("a.jsonl", [{**row, "id": 1} for row in pairs(30)])
    Path("b.json").write_text(json.dumps(pairs(20, start=30)), encoding="utf-8")
    data = preferences(path=["a.jsonl", "b.json"])
    assert [(file.name, file.rows, file.kept) for file in data.report.files] == [
        ("a.jsonl", 30, 30),
        ("b.json", 20, 20),
    ]
    assert [file.ignored_columns for file in data.report.files] == [["id"], []]
    assert data.report.files[0].shape == "prompt + chosen + rejected"
    assert len(data.train) + len(data.held_out) == 50


def test_reading_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With the number of rows; nowhere else is there any."""
    write("a.jsonl", pairs(30))
    preferences(path="a.jsonl")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    preferences(path="a.jsonl")
    shown = capsys.readouterr()
    assert "reading" in shown.err and "30/30" in shown.err
    assert shown.out == ""


def test_ignored_columns_have_the_names_of_the_file() -> None:
    write("a.jsonl", [{**row, "question": "x", "other": 1} for row in pairs(3)])
    data = preferences(path="a.jsonl", columns={"prompt": "prompt", "response": "question"})
    assert data.report.files[0].ignored_columns == ["question", "other"]


def test_files_may_differ_in_shape_and_keep_their_order() -> None:
    write("a.jsonl", pairs(2))
    write("b.jsonl", [{"instruction": "Question 7?", "chosen": "Yes.", "rejected": "No."}])
    data = preferences(path=["b.jsonl", "a.jsonl"], held_out=0)
    assert [row.source for row in data.train] == ["b.jsonl:1", "a.jsonl:1", "a.jsonl:2"]


def test_source_uses_the_shorter_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", pairs(1))
    [row] = preferences(path=str(tmp_path / "a.jsonl")).train
    assert row.source == "a.jsonl:1"
    deep = tmp_path / "/".join("abcdefghijklmnopqrstuvwxyz")
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    [row] = preferences(path=str(tmp_path / "a.jsonl")).train
    assert row.source in (f"{tmp_path}/a.jsonl:1", "../" * 26 + "a.jsonl:1")


def test_all_problems_of_all_files_are_shown_up_to_twenty() -> None:
    write("a.jsonl", [{**row, "chosen": "" if number % 2 else None} for number, row in enumerate(pairs(31))])
    shown = messages(path=["a.jsonl", "b.jsonl"])
    assert shown[0].startswith("b.jsonl: there is no such file")
    assert shown[1:4] == [
        "a.jsonl:1: `chosen` is null",
        "a.jsonl:2: `chosen` is empty",
        "a.jsonl:3: `chosen` is null",
    ]
    assert len(shown) == 22
    assert shown[-1].startswith("data: 31 bad rows: 16 missing, 15 empty (the first 20 are shown; `on_bad: skip`")


def test_skip_leaves_bad_rows_out_and_says_which() -> None:
    rows = pairs(10)
    rows[3]["chosen"] = ""
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{", encoding="utf-8")
    data = preferences(path="a.jsonl", on_bad="skip")
    assert len(data.train) + len(data.held_out) == 9
    assert [problem.where for problem in data.report.skipped] == ["a.jsonl:4", "a.jsonl:11"]
    assert (data.report.files[0].rows, data.report.files[0].kept) == (11, 9)


def test_skip_never_drops_everything() -> None:
    write("a.jsonl", [{**pairs(1)[0], "chosen": bad} for bad in ("", None)])
    assert messages(path="a.jsonl", on_bad="skip")[-1] == "data: no row is left to train on"
    write("b.jsonl", pairs(1))
    assert messages(path="b.jsonl", held_out_path="a.jsonl", on_bad="skip")[-1] == "data: no row is left to hold out"


def test_few_ties_are_left_out_and_many_are_an_error() -> None:
    rows = pairs(200)
    rows[0]["rejected"] = rows[1]["rejected"] = "Yes."
    data = preferences(path=write("a.jsonl", rows))
    assert [problem.where for problem in data.report.skipped] == ["a.jsonl:1", "a.jsonl:2"]
    assert len(data.train) + len(data.held_out) == 198
    rows[2]["rejected"] = "Yes."
    assert messages(path=write("a.jsonl", rows))[-1].startswith("data: 3 bad rows: 3 tie")


def test_max_rows_takes_the_first_after_all_are_checked() -> None:
    data = preferences(path=write("a.jsonl", pairs(50)), max_rows=10)
    assert {row.source for row in [*data.train, *data.held_out]} == {f"a.jsonl:{number}" for number in range(1, 11)}
    write("a.jsonl", [*pairs(50), {"prompt": "a", "chosen": "b"}])
    assert messages(path="a.jsonl", max_rows=10) == ["a.jsonl:51: `rejected` is missing (there is: prompt, chosen)"]


def test_held_out_path_is_held_out_whole() -> None:
    write("a.jsonl", pairs(10))
    write("b.jsonl", pairs(5, start=10))
    data = preferences(path="a.jsonl", held_out_path="b.jsonl", max_rows=3)
    assert [row.source for row in data.train] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert len(data.held_out) == 5
    assert [file.is_held_out for file in data.report.files] == [False, True]


def test_every_leaked_row_is_named_with_its_twin() -> None:
    write("a.jsonl", pairs(4))
    write("b.jsonl", pairs(2, start=2))
    assert messages(path="a.jsonl", held_out_path="b.jsonl") == [
        "a.jsonl:3: its prompt is also held out, in b.jsonl:1 (remove one)",
        "a.jsonl:4: its prompt is also held out, in b.jsonl:2 (remove one)",
        "data: 2 bad rows: 2 leaked prompts (what is measured on must not be trained on)",
    ]


def test_corpus_splits_texts_by_text_and_conversations_by_prompt() -> None:
    rows = [{"prompt": f"Question {number}?", "response": answer} for number in range(50) for answer in "ab"]
    data = load(DataSettings(path=write("a.jsonl", rows), held_out=0.3), Role.CORPUS)
    sides = [{row.text.split("?")[0] for row in side} for side in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    texts = [{"text": f"Text {number}."} for number in range(50)] * 2
    data = load(DataSettings(path=write("b.jsonl", texts), held_out=0.3), Role.CORPUS)
    assert not {row.text for row in data.train} & {row.text for row in data.held_out}


def test_content_hash_is_of_bytes_in_order(tmp_path: Path) -> None:
    for name, content in {"a": "1", "b": "2", "ab": "12", "copy": "1"}.items():
        Path(f"{name}.jsonl").write_text(content, encoding="utf-8")

    def hashed(*names: str, held: str | None = None) -> str:
        paths = [str(tmp_path / f"{name}.jsonl") for name in names]
        return content_hash(DataSettings(path=paths, held_out_path=held))

    assert hashed("a") == hashed("copy")
    others = [hashed("a"), hashed("a", "b"), hashed("b", "a"), hashed("ab"), hashed("a", held="b.jsonl")]
    assert len(set(others)) == 5
    with pytest.raises(DataError, match=r"c\.jsonl: there is no such file"):
        hashed("c")


def test_reading_json_imports_nothing_heavy() -> None:
    write("a.jsonl", pairs(3))
    script = (
        "import sys; from align.data.load import load; from align.recipe.data_settings import DataSettings, Role; "
        "load(DataSettings(path='a.jsonl'), Role.PREFERENCES); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
