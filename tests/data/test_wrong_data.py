"""Every message that wrong data gets, and the same text in docs/data.md; the cases are in wrong_data.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.data.load import Dataset, load
from align.errors import DataError
from align.recipe.data_settings import DataSettings, Role
from tests.data.wrong_data import ACCEPTED, BY_ID, CASES, ELSEWHERE, HELD_OUT, LINES, MESSAGES, ROWS, Accepted, Case

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def read(case: Case | Accepted, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Dataset:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    for name in (case.file, *(case.also if isinstance(case, Case) else ())):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(case.content)
    Path("held.jsonl").write_bytes(HELD_OUT)
    Path("empty").mkdir(exist_ok=True)
    return load(DataSettings.model_validate({"path": case.file, **case.settings, **settings}), case.role)


def first_message(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(DataError) as error:
        read(case, folder, monkeypatch)
    return str(error.value.problems[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says where and what, in one line of printable text, and the docs have it word for word."""
    message = first_message(case, tmp_path / "data", monkeypatch)
    assert case.expected in message
    assert message.isprintable()
    assert message in shown_in_docs()


def test_docs_show_no_other_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that no file gets any more is not in the docs."""
    made = {first_message(case, tmp_path / str(index), monkeypatch) for index, case in enumerate(CASES.values())}
    assert shown_in_docs() == made


AFTER_A_GOOD_ROW = {
    name: case
    for name, case in {**LINES, **ROWS, **MESSAGES}.items()
    if ":2: " in case.expected and not case.file.endswith(".csv")
}


@pytest.mark.parametrize("case", AFTER_A_GOOD_ROW.values(), ids=AFTER_A_GOOD_ROW)
def test_a_bad_row_can_be_skipped(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`on_bad: skip` leaves out row 2 and no other, and says why. A row 1 of one answer has nothing to be compared
    with, and is used as a prompt."""
    role = Role.PROMPTS if case.file.startswith("scored") else case.role
    dataset = read(case._replace(role=role), tmp_path / "data", monkeypatch, on_bad="skip")
    assert [problem.where for problem in dataset.report.skipped] == [f"{case.file}:2"]
    assert len(dataset.train) == 1


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_read(case: Accepted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that look wrong, or need a stated rule, come out as they should."""
    assert list(read(case, tmp_path / "data", monkeypatch, held_out=0).train) == case.rows


def test_every_bad_input_is_accounted_for() -> None:
    """Each of the 104 has cases, or is tested or explained elsewhere; the files named exist."""
    assert sorted({*BY_ID, *ELSEWHERE}) == sorted(f"B{number:02}" for number in range(1, 105))
    assert not BY_ID.keys() & ELSEWHERE.keys()
    assert {name for names in BY_ID.values() for name in names} <= {*CASES, *ACCEPTED}
    named = re.findall(r"tests/[\w/]+\.py", " ".join(ELSEWHERE.values()))
    assert all((DOCS.parents[1] / path).is_file() for path in named)


def shown_in_docs() -> set[str]:
    section = DOCS.read_text(encoding="utf-8").split("## Wrong data and the messages it gets")[1]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return {line for block in blocks for line in block.splitlines()}
