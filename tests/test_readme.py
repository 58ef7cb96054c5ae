"""What README.md says is there, is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.cli import app
from align.recipe.load import load_recipe
from stages import load_specs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    """`make demo` runs the main job; both install what they need first."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target, does in (("demo", "align run sft reward ppo"), ("test", "pytest")):
        assert f"make {target}" in README
        rule = re.search(rf"^{target}: \$\(VENV\)/\.installed.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert rule and does in rule[1]


def test_the_recipe_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example for one's own files passes validation as it stands."""
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "path/to/model").mkdir(parents=True)
    (tmp_path / "align.yaml").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tmp_path / "align.yaml", overrides=[], requested=["sft", "reward", "ppo"], specs=load_specs())
    assert list(recipe.stages) == ["sft", "reward", "ppo"]


def test_every_command_exists() -> None:
    """Each `align VERB` of an indented example is a command."""
    verbs = set(re.findall(r"^    (?:\$ )?align (\w+)", README, re.MULTILINE))
    assert {"run", "plan", "show", "lineage", "init", "env"} <= verbs
    commands = {(command.name or command.callback.__name__) for command in app.registered_commands if command.callback}
    assert verbs <= commands | {group.typer_instance.info.name for group in app.registered_groups}


def test_every_link_leads_somewhere() -> None:
    """Of all pages of the documentation."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("stages/*/*.md")]
    broken = [
        (page.name, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not broken


def test_it_is_short() -> None:
    """A page a newcomer reads to the end."""
    assert len(README.splitlines()) <= 200
