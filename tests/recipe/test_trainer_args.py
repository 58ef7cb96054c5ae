"""`trainer_args` is checked against the installed TRL without importing it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from align.recipe.overrides import Origins
from align.recipe.recipe_settings import RecipeSettings
from align.recipe.schema import walk
from align.recipe.trainer_args import _MANAGED, RESERVED, check_trainer_args, config_fields
from stages import load_specs

CONFIGS = sorted({spec.trainer_config for spec in load_specs().values() if spec.trainer_config})


def test_the_fields_read_from_source_are_those_of_the_classes():
    code = f"""
import dataclasses, importlib, json
names = {{}}
for config in {CONFIGS}:
    module, _, name = config.partition(":")
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    names[config] = [field.name for field in fields if field.init]
print(json.dumps(names))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    for config, names in json.loads(answer.stdout.splitlines()[-1]).items():
        module, _, name = config.partition(":")
        assert config_fields(module, name) >= set(names)
        assert config_fields(module, name) - set(names) <= {"local_rank"}


@pytest.mark.parametrize("setting", sorted(set(RESERVED.values())))
def test_the_setting_to_use_instead_exists(setting):
    models = [RecipeSettings, *(spec.config for spec in load_specs().values() if spec.trainer_config)]
    assert any(setting == known.key for model in models for known in walk(model))


@pytest.mark.parametrize("config", CONFIGS)
def test_what_align_sets_is_refused_and_the_rest_is_not(config):
    refused = {"learning_rate", "output_dir", "seed", "report_to", "push_to_hub", "eos_token", "max_length"}
    names = [*refused, "neftune_noise_alpha", "dataloader_num_workers"]
    problems = check_trainer_args(names, config, ("sft", "trainer_args"), Origins("r.yaml", {("sft",): 1}))
    assert {problem.what.split(":")[0].rsplit(".", 1)[-1] for problem in problems} == refused
    assert all(problem.hint for problem in problems)


def test_no_argument_is_in_both_lists():
    assert not RESERVED.keys() & _MANAGED.keys()


def test_every_listed_argument_exists_somewhere():
    known = frozenset().union(*(config_fields(*config.split(":")) for config in CONFIGS))
    assert RESERVED.keys() - known <= {"warmup_ratio"}  # gone from transformers 5; still what people type
    assert _MANAGED.keys() <= known
