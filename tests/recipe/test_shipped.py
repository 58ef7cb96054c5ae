"""Contract: every shipped recipe loads, says what it is, and its resolved form loads back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from align.errors import ConfigError
from align.recipe.load import load_recipe
from align.recipe.shipped import (
    description,
    find_recipe,
    shipped_folder,
    shipped_recipe,
    shipped_recipes,
)
from stages import load_specs

SPECS = load_specs()


@pytest.mark.parametrize("path", shipped_recipes().values(), ids=shipped_recipes())
def test_a_shipped_recipe_loads_and_its_resolved_form_is_equal(path, tmp_path):
    recipe = load_recipe(path, specs=SPECS)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False), encoding="utf-8")
    assert load_recipe(copy, specs=SPECS) == recipe
    assert description(path)


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A folder of shipped recipes with a demo, and an empty current folder."""
    folder = tmp_path / "configs"
    here = tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    (folder / "demo.yaml").write_text("# A small demo.\nname: demo\n", encoding="utf-8")
    monkeypatch.setattr("align.recipe.shipped.shipped_folder", lambda: folder)
    monkeypatch.chdir(here)
    return folder


def test_find_recipe_in_order(shipped):
    named = Path("some/where.yaml")
    assert find_recipe(named) == (named, "named on the command line")
    assert find_recipe(Path("demo")) == (shipped / "demo.yaml", "comes with align")
    path, how = find_recipe(None)
    assert path == shipped / "demo.yaml" and "demo" in how
    assert find_recipe(None, model="m")[0] is None
    Path("align.yaml").write_text("name: x\n", encoding="utf-8")
    assert find_recipe(None, model="m") == (Path("align.yaml"), "in the current folder")


def test_shipped_recipe_by_name(shipped):
    assert shipped_recipes() == {"demo": shipped / "demo.yaml"}
    assert description(shipped_recipe("demo")) == "A small demo."
    with pytest.raises(ConfigError, match=r"^demmo: no recipe of this name is shipped \(did you mean `demo`\?\)$"):
        shipped_recipe("demmo")


def test_the_source_tree_ships_its_configs_folder():
    assert shipped_folder().name == "configs"
