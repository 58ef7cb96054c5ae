"""The walk over settings classes that documentation, completion and messages share."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from align.recipe.data_settings import DataSettings
from align.recipe.recipe_settings import RecipeSettings
from align.recipe.schema import complete, dotted, fixed, model_at, places, walk
from align.recipe.settings import refuse
from align.recipe.training_settings import OptimSettings
from align.rewards.settings import RewardTerm
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
    assert model_at(SPECS["ppo"].config, ("reward",)) is None
    assert model_at(SPECS["ppo"].config, ("reward", "any name")) is RewardTerm


def test_keys_below_a_name_of_the_recipes_choice_are_walked_and_not_fixed():
    config = SPECS["ppo"].config
    assert "reward.<name>.url" in [setting.key for setting in walk(config)]
    assert [setting.key for setting in fixed(config) if setting.key.startswith("reward")] == ["reward"]


def test_places_are_all_mappings_that_become_settings():
    """Shorthands are complete by then; what is no mapping, and what is not in the schema, has no place."""
    config = SPECS["ppo"].config
    values = complete(config, {"reward": {"a": {"weight": 2}, "b": 5}, "ptx": {"data": "x"}, "kl": 3, "zzz": {}})
    found = {path: model for model, _, path in places(config, values)}
    ptx = model_at(config, ("ptx",))
    assert found == {(): config, ("reward", "a"): RewardTerm, ("ptx",): ptx, ("ptx", "data"): DataSettings}


def test_refuse_gives_every_problem_its_own_key():
    """A validator's problems arrive as errors of the keys they are about; no problem is no error."""
    refuse({})
    with pytest.raises(ValidationError) as error:
        refuse({"a.b": "one", "c": "two {x}"})
    assert [(item["loc"], item["msg"]) for item in error.value.errors()] == [(("a", "b"), "one"), (("c",), "two {x}")]


def test_complete_is_idempotent_and_passes_unknown_keys_through():
    given = {"optim": {"lr": 1.0, "zzz": 2}, "data": "a.jsonl", "yyy": 1}
    once = complete(SPECS["ppo"].config, given)
    assert complete(SPECS["ppo"].config, once) == once
    assert once["optim"]["zzz"] == 2 and once["optim"]["eps"] == 1e-5
    assert once["data"] == {"path": "a.jsonl"} and once["yyy"] == 1


def test_dotted():
    assert dotted(("ppo", "optim", "betas", 1)) == "ppo.optim.betas[1]"
