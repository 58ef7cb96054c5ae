"""What `submit:` takes, and what it says to what it does not."""

from __future__ import annotations

import pytest

from align.errors import ConfigError
from align.recipe.load import load_recipe
from align.recipe.submit_settings import Resources, SubmitSettings
from stages import load_specs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("submit.slurm.partition=a b", "'a b' is not one plain word"),
        ('submit.slurm.account="a\\nb"', "is not one plain word"),
        ("submit.slurm.qos=$(id)", "is not one plain word"),
        ("submit.slurm.options=[exclusive]", "submit.slurm.options[0]: 'exclusive' is not an option"),
        ('submit.slurm.options=["--a\\nrm"]', "is not an option: it starts with - and is one line"),
        ("submit.env={a-b: c}", "'a-b' is not the name of an environment variable"),
        ("submit.env={HF_TOKEN: abc}", "secrets do not belong in a recipe"),
        ("submit.slurm.partiton=gpu", "no such setting (did you mean `partition`?)"),
        ("submit.slurm={partition:gpu}", "no such setting (write `partition: gpu`, with a space after the colon)"),
        ("submit.nodes=0", "must be over 0, got 0"),
        ("submit.stages.ppo.nods=2", "no such setting (did you mean `nodes`?)"),
        ("submit.grace=5", "must be at least 30, got 5"),
    ],
)
def test_a_wrong_setting_is_told_with_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, overrides=[override], specs=load_specs())
    assert message in str(caught.value)


def test_a_stage_takes_what_is_said_for_it_then_for_all_then_the_default() -> None:
    settings = SubmitSettings.model_validate({"gpus": 4, "cpus": 16, "stages": {"ppo": {"nodes": 2, "gpus": 0}}})
    assert settings.of("sft") == Resources(nodes=1, gpus=4, processes=4, cpus=16, memory=None, hours=None)
    assert settings.of("ppo") == Resources(nodes=2, gpus=0, processes=1, cpus=16, memory=None, hours=None)
    assert SubmitSettings().of("ppo") == Resources(nodes=1, gpus=1, processes=1, cpus=None, memory=None, hours=None)


def test_a_resolved_recipe_keeps_it() -> None:
    recipe = load_recipe(None, overrides=["submit.stages.sft.hours=2", "sft.policy=."], specs=load_specs())
    assert recipe.resolved()["submit"]["stages"]["sft"]["hours"] == 2
