"""docs/recipe.md, "Wrong recipes and the messages they get": every block gives exactly its messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"
BLOCK = re.compile(r"```yaml\n(.*?)```\n```console\n\$ align ([^\n]*)\n(.*?)```", re.DOTALL)
SECTION = PAGE.read_text(encoding="utf-8").partition("## Wrong recipes and the messages they get")[2]
BLOCKS = BLOCK.findall(SECTION)


def arguments(command: str) -> list[str]:
    """The words of a command; a `{...}` value keeps its spaces."""
    return re.findall(r"(?:[^\s{]|\{[^}]*\})+", command)


def test_every_block_of_the_page_is_found():
    assert len(BLOCKS) == SECTION.count("```yaml") == SECTION.count("```console") > 10


@pytest.mark.parametrize(("recipe", "command", "expected"), BLOCKS, ids=[block[1] for block in BLOCKS])
def test_message(recipe, command, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "align.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["align", *arguments(command)])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().err
    assert said.replace(str(tmp_path), "/home/me") == expected
    assert exit_.value.code == 2
    assert "abc" not in re.sub(r"^wandb_api_key.*", "", said)
