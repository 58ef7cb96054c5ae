"""`align data`: what the commands print and write, and how they exit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from align.cli import app
from align.cli.row import render_row, visible
from align.data.checking.check import Order, check
from align.data.checking.clean import write_clean
from align.data.load import load
from align.data.render import Renderer
from align.data.rows import Demonstration, Document
from align.errors import AlignError, DataError
from align.recipe.data_settings import DataSettings, Role
from tests.data.test_render import make_tokenizer


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pair(number: int, chosen: str = "Yes.", **more: object) -> dict[str, object]:
    return {"prompt": f"Question {number}?", "chosen": chosen, "rejected": "No.", **more}


def write(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def align(*arguments: str, code: int = 0) -> str:
    """What `align data ...` prints. An error that reaches the top counts with its exit code and its text."""
    done = CliRunner().invoke(app, ["data", *arguments], env={"COLUMNS": "200"})
    if isinstance(done.exception, AlignError):
        assert done.exception.exit_code == code
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.stdout


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_check_of_good_rows_exits_0() -> None:
    output = align("check", write("a.jsonl", pair(1, id=7)))
    assert "read as preferences" in output
    assert "ignored: `id`" in output
    assert "nothing was found" in output


def test_check_of_bad_rows_exits_3_and_names_them() -> None:
    output = align("check", write("a.jsonl", pair(1), pair(2, ""), pair(1)), code=3)
    assert "error: empty, 1\n  a.jsonl:2: `chosen` is empty\n" in output
    assert "warning: duplicate, 1 (it counts double)\n  a.jsonl:3: the same as a.jsonl:1\n" in output
    assert "1 error, 1 warning" in output
    assert "next: align data check a.jsonl --fix clean.jsonl   # a copy of 1 rows" in output


def test_rows_with_the_same_fault_are_on_one_line() -> None:
    """Of seven duplicates of other rows, five are shown."""
    rows = [pair(number) for number in range(1, 8)]
    output = align("check", write("a.jsonl", *rows, *rows, pair(1, ""), pair(2, "")), code=3)
    assert "  a.jsonl:15, 16: `chosen` is empty\n" in output
    assert "  a.jsonl:12: the same as a.jsonl:5\n  and 2 more\n" in output


def test_what_is_clean_can_be_trained_on() -> None:
    make_tokenizer().save_pretrained("model")
    assert "--tokenizer MODEL" in align("check", write("a.jsonl", pair(1)))
    output = align("check", "a.jsonl", "--tokenizer", "model")
    assert output.endswith("next: align run dpo --model MODEL --data a.jsonl\n")


def test_warnings_alone_exit_0() -> None:
    assert "1 warning" in align("check", write("a.jsonl", pair(1), pair(1)))


def test_a_role_can_be_named() -> None:
    assert "read as prompts" in align("check", write("a.jsonl", pair(1)), "--role", "prompts")
    align("check", "a.jsonl", "--role", "demonstrations", code=3)


def test_messages_hold_no_markup_and_no_escape_codes() -> None:
    """A file named, and a row that says, what a terminal or rich would obey."""
    row = {"prompt": [{"role": "\x1b[31m", "content": "Hi"}], "chosen": "a", "rejected": "b"}
    output = align("check", write("[red].jsonl", pair(1, **{"[bold]\x1b[2J": 1}), row), code=3)
    assert "\x1b" not in output
    assert "[red].jsonl:2: message 1 of `prompt` has the role" in output
    assert "`[bold]\\u001b[2J`" in output


def test_json_is_one_document() -> None:
    report = json.loads(align("check", write("a.jsonl", pair(1), pair(2, ""), pair(1)), "--json", code=3))
    assert report["role"] == "preferences"
    assert report["counts"] == {"error": 1, "warning": 1, "hint": 0}
    assert report["files"][0]["shape"] == "prompt + chosen + rejected"
    (error, warning) = report["findings"]
    assert (error["kind"], error["severity"], error["count"]) == ("empty", "error", 1)
    assert warning["places"] == [{"where": "a.jsonl:3", "what": "the same as a.jsonl:1", "hint": ""}]
    assert report["good_rows"] == 2
    assert report["fixed"] is None


def test_fix_writes_a_clean_copy_and_the_reasons() -> None:
    """The error is mended by leaving the row out, so the exit code is 0; the copy has nothing left to find, and the
    original is as it was."""
    source = write("a.jsonl", pair(1, system="Be kind."), pair(2, ""), pair(3), pair(3))
    before = Path(source).read_bytes()
    output = align("check", source, "--fix", "clean.jsonl")
    assert "wrote clean.jsonl: 2 rows; 2 left out, with reasons in clean.rejected.jsonl" in output
    assert Path(source).read_bytes() == before
    assert [(one["where"], one["kind"]) for one in lines("clean.rejected.jsonl")] == [
        ("a.jsonl:2", "empty"),
        ("a.jsonl:4", "duplicate"),
    ]
    assert [row["source"] for row in lines("clean.jsonl")] == ["a.jsonl:1", "a.jsonl:3"]
    assert "nothing was found" in align("check", "clean.jsonl")


ROWS = {
    Role.PREFERENCES: pair(1, "Yes. \n"),
    Role.DEMONSTRATIONS: {"prompt": "Hi", "response": "Hello", "system": "Be kind."},
    Role.JUDGEMENTS: {"prompt": "Hi", "completion": "Hello", "label": False},
    Role.PROMPTS: {"prompt": "Hi"},
    Role.CORPUS: {"text": " Hi\n"},
}


@pytest.mark.parametrize("role", ROWS)
def test_a_clean_copy_gives_the_same_rows(role: Role) -> None:
    """Of every role, byte for byte."""
    align("check", write("a.jsonl", ROWS[role]), "--fix", "clean.jsonl")
    original, copy = (
        [{**vars(row), "source": ""} for row in load(DataSettings(path=name, held_out=0), role).train]
        for name in ("a.jsonl", "clean.jsonl")
    )
    assert copy == original


@pytest.mark.parametrize("taken", ["clean.jsonl", "clean.rejected.jsonl"])
def test_fix_overwrites_nothing(taken: str) -> None:
    write("a.jsonl", pair(1))
    Path(taken).write_text("mine")
    assert "already exists" in align("check", "a.jsonl", "--fix", "clean.jsonl", code=2)
    assert Path(taken).read_text() == "mine"


def test_fix_refuses_a_file_that_was_changed_since_it_was_checked() -> None:
    """Findings go by position, so they would be those of other rows. Nothing is written."""
    order = Order([write("a.jsonl", pair(1), pair(2))], Role.PREFERENCES)
    checked = check(order, lambda number: None)
    write("a.jsonl", pair(3))
    with pytest.raises(DataError, match="the file was changed"):
        write_clean(order, checked, Path("clean.jsonl"), lambda number: None)
    assert [path.name for path in Path().iterdir()] == ["a.jsonl"]


def test_fix_keeps_the_columns_that_are_not_read() -> None:
    """Here a list and a number; a column called `source` stays as it is. What is read has our names, and a name that
    would give the copy another shape goes."""
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "id": 7, "tags": ["x"], "source": "mine", "output": "c"}
    align("check", write("a.jsonl", row), "--fix", "clean.jsonl")
    (kept,) = lines("clean.jsonl")
    assert {name: kept[name] for name in ("id", "tags", "source")} == {"id": 7, "tags": ["x"], "source": "mine"}
    assert "output" not in kept


def test_settings_say_how_files_are_read() -> None:
    """As in a recipe, under the same names; `show` takes them too."""
    source = write("a.jsonl", {"ask": {"text": "Hi"}, "good": "a", "bad": "b"})
    settings = ("columns.prompt=ask.text", "columns.chosen=good", "columns.rejected=bad")
    assert "read as preferences" in align("check", source, *settings)
    assert "user: Hi\nchosen: a" in align("show", source, *settings, "--row", "1")
    assert "columns" in align("check", source, code=3)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("colums.prompt=ask", "colums.prompt=ask (command line): colums: no such setting (did you mean `columns`?)"),
        ("pairs=most", "pairs=most (command line): "),
        ("path=b.jsonl", "the files are named without a key"),
    ],
)
def test_wrong_settings(setting: str, problem: str) -> None:
    assert problem in align("check", write("a.jsonl", pair(1)), setting, code=2)


def test_fix_writes_jsonl_only() -> None:
    write("a.jsonl", pair(1))
    assert "--fix clean.jsonl" in align("check", "a.jsonl", "--fix", "clean.csv", code=2)


def test_fix_writes_nothing_where_leaving_rows_out_does_not_help() -> None:
    Path("empty.jsonl").touch()
    output = align("check", write("a.jsonl", pair(1)), "empty.jsonl", "--fix", "clean.jsonl", code=3)
    assert "leaving rows out does not mend: file" in output
    assert not Path("clean.jsonl").exists()


def test_fix_of_rows_that_are_all_wrong() -> None:
    align("check", write("a.jsonl", pair(1, ""), pair(2, "No.")), "--fix", "clean.jsonl", code=3)
    assert not list(Path().glob("clean*"))


def test_a_length_without_a_tokenizer() -> None:
    assert "--tokenizer" in align("check", write("a.jsonl", pair(1)), "--max-length", "9", code=2)


def test_a_tokenizer_that_is_not_there() -> None:
    assert "no such folder" in align("check", write("a.jsonl", pair(1)), "--tokenizer", "no", code=4)


def test_check_with_a_tokenizer_from_a_folder() -> None:
    """One token per byte: row 1 has 30 of the prompt, 5 and 4 of the answers."""
    make_tokenizer().save_pretrained("model")
    source = write("a.jsonl", pair(1))
    output = align(
        "check", source, "--tokenizer", "model", "--max-length", "34", "--against", write("e.jsonl", pair(2))
    )
    assert "tokens of rows (chat template): median 35" in output
    assert "a.jsonl:1: 35 tokens; cut to 34, it would lose 1, EOS with them" in output


def test_show_of_a_row() -> None:
    output = align("show", write("a.jsonl", pair(1), pair(2, system="Be kind.")), "--row", "2")
    assert output.split("\n")[:5] == [
        "a.jsonl:2  preference",
        "system: Be kind.",
        "user: Question 2?",
        "chosen: Yes.",
        "rejected: No.",
    ]


def test_show_of_a_bad_row_says_what_is_wrong() -> None:
    source = write("a.jsonl", pair(1), pair(2, ""))
    assert align("show", source, "--row", "2", code=3) == "a.jsonl:2: `chosen` is empty"


def test_show_of_no_row() -> None:
    assert "the file has 1" in align("show", write("a.jsonl", pair(1)), "--row", "2", code=2)


def test_what_a_terminal_would_obey_or_hide_is_shown() -> None:
    """Escapes, carriage returns, and the marks that turn the direction of writing."""
    assert visible("a\x1b[2J\r\n\u202eb\ufeff é") == "a\\x1b[2J\\r\n\\u202eb\\ufeff é"
    row = Document("[bold]a[/bold]\x1b[31m", "[x].jsonl:1")
    assert printed(row) == "[x].jsonl:1  document\ntext: [bold]a[/bold]\\x1b[31m\n\n"


def printed(row: Demonstration | Document, renderer: Renderer | None = None, *, colours: bool = False) -> str:
    console = Console(width=200, highlight=False, force_terminal=colours, color_system="standard" if colours else None)
    with console.capture() as capture:
        console.print(render_row(row, renderer))
    return capture.get()


HELLO = Demonstration([{"role": "user", "content": "é"}, {"role": "assistant", "content": "b\nc"}], "a.jsonl:1")


def test_show_renders_the_tokens_with_special_ones_and_newlines() -> None:
    """A character of two tokens is one. <start>user\\n is 6 tokens, é 2, <end>\\n 2, <start>assistant\\n 11, the answer
    3 and its end 1: 25, of which 4 count."""
    output = printed(HELLO, Renderer(make_tokenizer()))
    assert "conversation: 25 tokens, 4 of them count in the loss (these), special\n" in output
    assert output.endswith("<|im_start|>user↵\né<|im_end|>↵\n<|im_start|>assistant↵\nb↵\nc<|im_end|>\n\n")


def test_show_colours_the_loss_mask() -> None:
    """Green (32) is what counts, reversed (7) what is special, dim (2) the rest."""
    output = printed(HELLO, Renderer(make_tokenizer()), colours=True)
    assert "\x1b[32mb\x1b[0m" in output
    assert "\x1b[7;32m<|im_end|>\x1b[0m" in output
    assert "\x1b[2mé\x1b[0m" in output
    assert "\x1b[7m<|im_start|>\x1b[0m" in output


def test_a_new_card_is_measured_and_is_not_done() -> None:
    source = write("a.jsonl", pair(1), pair(2), pair(2))
    align("card", "mine", "--init", source)
    text = Path("data_cards/mine.md").read_text(encoding="utf-8")
    card = (
        "splits:\n    train: 1\n    held_out: 2\n  role: preferences\n  intended_use:\n  - reward\n  - dpo\n  - kto\n"
    )
    assert card in text
    assert "Found by `align data check` (warning): duplicate, 1." in text
    assert "TODO left" in align("card", "mine", "--check", code=3)
    assert "already exists" in align("card", "mine", "--init", source, code=2)


@pytest.fixture
def finished() -> Path:
    """A card whose TODOs are replaced."""
    align("card", "mine", "--init", write("a.jsonl", pair(1), pair(2)))
    path = Path("data_cards/mine.md")
    text = path.read_text(encoding="utf-8").replace("personal_data: TODO", "personal_data: none")
    path.write_text(text.replace("license: TODO", "license: mit").replace("TODO", "said"), encoding="utf-8")
    return path


def test_a_finished_card_agrees(finished: Path) -> None:
    assert "agrees with its file" in align("card", "mine", "--check")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("license: mit", "license:", "`license` is missing or empty"),
        ("license: mit", "license: mti", "`license` mti is not a licence that the Hub knows (did you mean `mit`?)"),
        ("license: mit", "license: other", "`license` is other, so `license_name` and `license_link` must say which"),
        ("    held_out: 1", "    held_out: 0", 'splits of a.jsonl: {"train": 1, "held_out": 1}, the card says'),
        ("  - chosen\n", "", 'columns of a.jsonl: ["prompt", "chosen", "rejected"], the card says'),
        ("n<1K", "1K<n<10K", "size_categories is ['1K<n<10K'], the file's is [n<1K]"),
        ("rows: 2", "rows: 3", "rows of a.jsonl: 2, the card says 3"),
        ("## Licence\nsaid", "## Licence\n", "the heading '## Licence' is missing or empty"),
        ("role: preferences", "role: pairs", "align.role: "),
        ("pretty_name: said", "pretty_name: a: b", "the front matter is not YAML"),
    ],
)
def test_a_card_that_is_wrong(finished: Path, old: str, new: str, problem: str) -> None:
    text = finished.read_text(encoding="utf-8")
    assert old in text
    finished.write_text(text.replace(old, new), encoding="utf-8")
    assert problem in align("card", "mine", "--check", code=3)


def test_a_card_of_a_file_that_was_changed(finished: Path) -> None:
    write("a.jsonl", pair(1), pair(3))
    assert "sha256 of a.jsonl" in align("card", "mine", "--check", code=3)


def test_a_card_that_is_not_there(finished: Path) -> None:
    assert "did you mean `mine`?" in align("card", "mien", "--check", code=3)


def test_card_wants_one_of_its_two_options() -> None:
    assert "--init FILE and --check" in align("card", "mine", code=2)
