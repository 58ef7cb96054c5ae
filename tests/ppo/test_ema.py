"""The moving average of weights (U, row 79)."""

import math

import pytest
import torch
from torch import nn

from stages.ppo.ema import Ema


def named(*values, dtype=torch.float32):
    return {f"weight{number}": nn.Parameter(torch.tensor(value, dtype=dtype)) for number, value in enumerate(values)}


def set_to(parameter, value):
    with torch.no_grad():
        parameter.fill_(value)


def test_weights_of_the_past():
    """U: weights that jump from 0 to 1 are taken in to 1 - .992^100 = .552114 after 100 rollouts, and to a half after
    log .5 / log .992 = 86.3, that is, with the 87th."""
    parameters = named([0.0, 0.0])
    ema = Ema(parameters, 0.992)
    set_to(parameters["weight0"], 1.0)
    seen = []
    for _ in range(100):
        ema.update()
        seen.append(float(ema.averages["weight0"][0]))
    assert seen[-1] == pytest.approx(0.552114, abs=1e-5)
    assert next(n for n, value in enumerate(seen, 1) if value > 0.5) == math.ceil(86.296)


def test_worked_example():
    """Decay .5 from 8, through 0 and 4: 4, then 4."""
    parameters = named(8.0)
    ema = Ema(parameters, 0.5)
    for value, average in ((0.0, 4.0), (4.0, 4.0), (0.0, 2.0)):
        set_to(parameters["weight0"], value)
        ema.update()
        assert float(ema.averages["weight0"]) == average


def test_small_steps_are_not_rounded_away():
    """bfloat16 has 8 bits: a step of .008 from 1 to 2 rounds to nothing in it; the average is float32."""
    parameters = named(1.0, dtype=torch.bfloat16)
    ema = Ema(parameters, 0.992)
    set_to(parameters["weight0"], 1.25)
    ema.update()
    assert ema.averages["weight0"].dtype is torch.float32
    assert float(ema.averages["weight0"]) == pytest.approx(1 + 0.008 * 0.25)
    assert torch.tensor(1.002).bfloat16() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_applied(dtype):
    """The very same parameters hold the average: of 1/3, 2/3 and .1, and of 1.1, in which all of them end."""
    parameters = named([1 / 3, 2 / 3], [[0.1]], dtype=dtype)
    before = {name: parameter.detach().double().clone() for name, parameter in parameters.items()}
    ema = Ema(parameters, 0.5)
    for parameter in parameters.values():
        set_to(parameter, 1.1)
    ema.update()
    ema.apply()
    for name, parameter in parameters.items():
        assert parameter.requires_grad and parameter.dtype is dtype
        torch.testing.assert_close(parameter.detach().double(), (before[name] + 1.1) / 2, rtol=4e-3, atol=0)


def test_the_average_does_not_follow_what_is_not_taken_in():
    """It is a copy, of the start too, and applying it does not change it."""
    parameters = named(1.0)
    ema = Ema(parameters, 0.9)
    set_to(parameters["weight0"], 5.0)
    assert float(ema.averages["weight0"]) == 1.0
    ema.apply()
    set_to(parameters["weight0"], 7.0)
    assert float(ema.averages["weight0"]) == 1.0
