"""`align init`: what it copies, and that it overwrites nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.errors import ConfigError, WriteError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A shipped demo with data and a shipped recipe without, and an empty current folder."""
    shipped = tmp_path / "configs"
    (shipped / "demo").mkdir(parents=True)
    (shipped / "demo" / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    (shipped / "demo.yaml").write_text("# A small demo.\ndata: demo/rows.jsonl\n", encoding="utf-8")
    (shipped / "plain.yaml").write_text("name: plain\n", encoding="utf-8")
    monkeypatch.setattr("align.recipe.shipped.shipped_folder", lambda: shipped)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def init(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["init", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_copies_the_demo_and_its_data(here):
    output = init()
    assert files(here) == ["align.yaml", "demo/rows.jsonl"]
    assert output.startswith("wrote align.yaml\nwrote demo\n")


def test_copies_a_named_recipe_elsewhere(here):
    init("plain", "--to", "sub/mine.yaml")
    (here / "folder").mkdir()
    init("demo", "--to", "folder")
    assert files(here) == ["folder/align.yaml", "folder/demo/rows.jsonl", "sub/mine.yaml"]


def test_lists_with_descriptions():
    lines = [line.split() for line in init("--list").splitlines()]
    assert lines == [["demo", "A", "small", "demo."], ["plain"]]


@pytest.mark.parametrize("taken", ["align.yaml", "demo"])
def test_never_overwrites(here, taken):
    (here / taken).mkdir() if taken == "demo" else (here / taken).write_text("mine", encoding="utf-8")
    before = files(here)
    with pytest.raises(ConfigError, match=f"^{taken}: already exists, and is not overwritten"):
        init()
    assert files(here) == before


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no recipe of this name is shipped \(did you mean `plain`\?\)"):
        init("plian")


def test_a_folder_that_cannot_be_made(here):
    (here / "file").write_text("", encoding="utf-8")
    with pytest.raises(WriteError, match="cannot write"):
        init("plain", "--to", "file/mine.yaml")
