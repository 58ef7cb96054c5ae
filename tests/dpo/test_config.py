"""Which settings a loss takes, what they are where nothing is said, and what is refused with which reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stages.dpo.config import Config


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        (
            {"loss": "ipo", "label_smoothing": 0.1},
            "label_smoothing",
            "the loss ipo has no label_smoothing",
        ),
        ({"loss": "sigmoid", "gamma": 1.0}, "gamma", "the loss sigmoid has no gamma; it takes beta, label"),
        ({"loss": "simpo", "precompute_reference": True}, "precompute_reference", "the loss simpo has no reference"),
        ({"loss": "exo", "label_smoothing": 0.0}, "label_smoothing", "needs a share above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing", "less than 0.5"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout", "has to be 0"),
    ],
)
def test_refused_with_the_reason(settings, key, reason):
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(settings)
    (problem,) = caught.value.errors()
    assert ".".join(map(str, problem["loc"])) == key
    assert reason in problem["msg"]


@pytest.mark.parametrize(
    ("settings", "taken", "sft"),
    [
        ({}, {"beta": 0.1, "label_smoothing": 0.0}, 0.0),
        ({"label_smoothing": 0.2, "sft_weight": 1.0}, {"beta": 0.1, "label_smoothing": 0.2}, 1.0),
        ({"loss": "simpo", "gamma": 0.5}, {"beta": 2.0, "gamma": 0.5}, 0.0),
        ({"loss": "orpo"}, {"beta": 0.1}, 1.0),
        ({"loss": "cpo", "beta": 0.3, "sft_weight": 0.0}, {"beta": 0.3}, 0.0),
        ({"loss": "sppo"}, {"beta": 0.001}, 0.0),
    ],
)
def test_what_a_loss_is_given(settings, taken, sft):
    """And a resolved recipe asks for the same again."""
    config = Config.model_validate(settings)
    assert config.loss_settings == taken
    assert config.sft_share == sft
    assert Config.model_validate(config.model_dump(mode="json")) == config
