"""The walk over settings classes that documentation, completion and messages share."""

from __future__ import annotations

import pytest

from align.recipe.schema import complete, dotted, model_at, walk
from align.recipe.settings import OptimSettings, RecipeSettings
from stages import load_specs

SPECS = load_specs()


@pytest.mark.parametrize("model", [RecipeSettings, *(spec.config for spec in SPECS.values())])
def test_every_setting_is_documented(model):
    assert [setting.key for setting in walk(model) if not setting.field.description] == []


def test_walk_gives_the_defaults_of_the_place():
    defaults = {setting.key: setting.default for setting in walk(SPECS["base"].config)}
    assert defaults["optim.lr"] == 3e-3
    assert defaults["optim.schedule"] == "cosine"


def test_walk_goes_into_optional_settings():
    keys = [setting.key for setting in walk(SPECS["sft"].config)]
    assert {"lora.rank", "data.path", "checkpoint.keep"} <= set(keys)


def test_model_at():
    assert model_at(SPECS["ppo"].config, ("critic", "optim")) is OptimSettings
    assert model_at(SPECS["ppo"].config, ("gamma",)) is None
    assert model_at(SPECS["ppo"].config, ("gamma", "x")) is None


def test_complete_is_idempotent_and_passes_unknown_keys_through():
    given = {"optim": {"lr": 1.0, "zzz": 2}, "data": "a.jsonl", "yyy": 1}
    once = complete(SPECS["ppo"].config, given)
    assert complete(SPECS["ppo"].config, once) == once
    assert once["optim"]["zzz"] == 2 and once["optim"]["eps"] == 1e-5
    assert once["data"] == {"path": "a.jsonl"} and once["yyy"] == 1


def test_dotted():
    assert dotted(("ppo", "optim", "betas", 1)) == "ppo.optim.betas[1]"
