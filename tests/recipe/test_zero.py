"""The files of `deepspeed/`: what they may say, and that each strategy has one."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from align.errors import ConfigError
from align.recipe.launch_settings import LaunchSettings
from align.recipe.shipped import shipped_folder
from align.recipe.zero import FROM_RECIPE, nvme_folder, read_zero

STRATEGIES = [one for one in get_args(LaunchSettings.model_fields["strategy"].annotation) if one.startswith("zero")]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_has_a_file_that_says_nothing_else(strategy):
    """ZeRO with its offloading: all the rest is the recipe's."""
    path = shipped_folder("deepspeed") / f"{strategy.replace('-', '_')}.json"
    content = json.loads(path.read_text())
    assert list(content) == ["zero_optimization"]
    assert read_zero(path) == content
    assert f"zero{content['zero_optimization']['stage']}" == strategy.partition("-")[0]
    assert nvme_folder(content) == ("/local_nvme" if strategy.endswith("nvme") else None)


def test_the_folder_holds_no_python():
    """It would hide the library of the same name."""
    names = {path.stem: path.suffix for path in shipped_folder("deepspeed").iterdir()}
    assert names == {strategy.replace("-", "_"): ".json" for strategy in STRATEGIES} | {"README": ".md"}


@pytest.mark.parametrize("key", FROM_RECIPE)
def test_what_the_recipe_says_is_refused_unless_it_is_auto(key, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: {"of": "auto"}}))
    assert read_zero(path) == {"zero_optimization": {"stage": 2}}
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: {"of": 3}}))
    with pytest.raises(ConfigError, match=rf"zero.json: {key}: the recipe says this \(remove it and set"):
        read_zero(path)


def test_weights_on_a_disk_are_refused(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}))
    with pytest.raises(ConfigError, match="offload_param: weights cannot be on a disk"):
        read_zero(path)
