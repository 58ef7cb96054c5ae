"""Reward functions: the user's own code, loaded, called, and every way in which it can be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from align.errors import ConfigError, NumericError
from align.rewards.batch import RewardBatch, checked, probe
from align.rewards.functions import call_function, load_function

WHERE = "ppo.reward.style.function"
BATCH = RewardBatch(
    prompts=["say hat", "say moon"],
    messages=[[{"role": "user", "content": "say hat"}], [{"role": "user", "content": "say moon"}]],
    responses=["hat", "moon : moon"],
    response_ids=[[5, 2], [6, 7, 2]],
    finished=[True, False],
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a module of this source into the current folder and loads a function from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write_and_load(source: str, function: str = "score"):
        (tmp_path / "own_rewards.py").write_text(source, encoding="utf-8")
        return load_function(f"own_rewards:{function}", WHERE)

    yield write_and_load
    sys.modules.pop("own_rewards", None)


def problem(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_function_of_the_current_folder(load):
    """It is found beside the recipe, is given the batch, and its numbers come back as floats."""
    function = load(
        "from align.rewards.batch import RewardBatch\n"
        "def score(batch: RewardBatch) -> list[float]:\n"
        "    return [len(text) + done for text, done in zip(batch.responses, batch.finished)]\n"
    )
    values = call_function(function, BATCH, WHERE)
    assert values == [4.0, 11.0]
    assert all(type(value) is float for value in values)


def test_a_process_reward(load):
    """One list per response, with one number per token id."""
    function = load("def score(batch):\n    return [[float(one) for one in ids] for ids in batch.response_ids]\n")
    assert call_function(function, BATCH, WHERE) == [[5.0, 2.0], [6.0, 7.0, 2.0]]


def test_callables_that_are_no_plain_functions(load):
    """An object that can be called, and one written in C."""
    source = "class Length:\n    def __call__(self, batch):\n        return [len(one) for one in batch.responses]\n"
    assert call_function(load(source + "score = Length()\n"), BATCH, WHERE) == [3.0, 11.0]
    with pytest.raises(ConfigError, match=r"builtins:len: gave a number"):
        call_function(load_function("builtins:len", WHERE), BATCH, WHERE)


@pytest.mark.parametrize(
    "hints",
    [
        ("RewardBatch", "list[float]"),
        ("RewardBatch", "Sequence[Sequence[float]]"),
        ("RewardBatch | None", "list[float] | None"),
        ("object", "Any"),
        ("Unknown", "list[float]"),
    ],
)
def test_annotations_that_fit(load, hints):
    """Wider types, unions, and names that exist for type checkers only are no reason to refuse."""
    load(
        "from __future__ import annotations\nfrom collections.abc import Sequence\nfrom typing import Any\n"
        f"from align.rewards.batch import RewardBatch\ndef score(batch: {hints[0]}) -> {hints[1]}:\n    return []\n"
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def score():\n    return []\n", "cannot be called with one argument: it is score()"),
        ("def score(prompts, responses):\n    return []\n", "it is score(prompts, responses)"),
        ("def score(batch, *, scale):\n    return []\n", "it is score(batch, *, scale)"),
        ("async def score(batch):\n    return []\n", "is async"),
        ("score = 3\n", "is not callable"),
        ("def score(responses: list[str]):\n    return []\n", "takes list[str]"),
        ("def score(batch: str):\n    return []\n", "takes str"),
        ("def score(batch) -> float:\n    return 0.0\n", "returns float"),
        ("def score(batch) -> None:\n    pass\n", "returns NoneType"),
        ("def score(batch) -> dict[str, float]:\n    return {}\n", "returns dict[str, float]"),
    ],
)
def test_a_function_of_another_shape(load, source, says):
    """Refused when it is loaded, not in the middle of a run, with the signature that is wanted."""
    with pytest.raises(ConfigError) as error:
        load(source)
    text = problem(error)
    assert text.startswith(f"{WHERE}: own_rewards:score ") and says in text
    assert "wanted def function(batch: RewardBatch) -> list[float]" in text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def scores(batch):\n    return []\n", "own_rewards has no function 'score' (did you mean `scores`?)"),
        ("import no_such_module_at_all\n", "cannot import 'own_rewards:score': ModuleNotFoundError: No module named"),
        ("def score(batch:\n", "cannot import 'own_rewards:score': SyntaxError"),
        ("raise ValueError('one\\ntwo')\n", "cannot import 'own_rewards:score': ValueError: one"),
        ("import sys\nsys.exit()\n", "cannot import 'own_rewards:score': SystemExit"),
    ],
)
def test_a_module_that_cannot_be_imported(load, source, says):
    """Whatever its import raises, sys.exit() included, is one line with the place in the recipe."""
    with pytest.raises(ConfigError) as error:
        load(source)
    assert problem(error).startswith(f"{WHERE}: {says}")


@pytest.mark.parametrize("name", ["own_rewards", "own_rewards:", ":score"])
def test_a_name_that_is_none(name):
    """Module or function missing."""
    with pytest.raises(ConfigError, match=r"ppo\.reward\.style\.function: .* is not the name.*wanted module:function"):
        load_function(name, WHERE)


def test_what_the_function_raises_names_its_line(load):
    """The error's type and text, and the innermost line of the user's file, also when a library raised it."""
    source = "import json\ndef parse(text):\n    return json.loads(text)\ndef score(batch):\n    return parse('{')\n"
    with pytest.raises(ConfigError) as error:
        call_function(load(source), BATCH, WHERE)
    text = problem(error)
    assert text.startswith(f"{WHERE}: own_rewards:score raised JSONDecodeError: Expecting")
    assert text.endswith(" at own_rewards.py:3")


def test_a_function_that_ends_the_process(load):
    """sys.exit() in a reward function is an error, not the end of a run with exit code 0."""
    with pytest.raises(ConfigError, match=r"raised SystemExit: 0 at own_rewards\.py:3"):
        call_function(load("import sys\ndef score(batch):\n    sys.exit(0)\n"), BATCH, WHERE)


@pytest.mark.parametrize(
    "given",
    [
        [1, 2.5],
        (1, 2.5),
        np.array([1, 2.5], dtype=np.float32),
        torch.tensor([1, 2.5]),
        [np.float64(1), torch.tensor(2.5)],
        [True, 2.5],
    ],
)
def test_numbers_of_many_kinds(given):
    """Lists, tuples, arrays, tensors, and true for 1."""
    assert checked(given, BATCH, WHERE) == [1.0, 2.5]


def test_token_numbers_of_many_kinds():
    """A list of arrays and tensors of different lengths."""
    assert checked([np.array([1.0, 2.0]), torch.tensor([3, 4, 5])], BATCH, WHERE) == [[1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "gave None"),
        (1.0, "gave a number"),
        ("ab", 'gave text, "ab"'),
        ({"a": 1, "b": 2}, "gave a dict"),
        ((value for value in (1, 2)), "gave a generator"),
        ({1.0, 2.0}, "gave a set"),
        ([1.0], "gave 1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "gave 3 scores for 2 responses"),
        ([1.0, None], 'response 2 of 2 ("moon : moon") got None (wanted a number)'),
        (["1", 2.0], 'response 1 of 2 ("hat") got text, "1" (wanted a number)'),
        ([[1.0, 2.0], 3.0], 'response 2 of 2 ("moon : moon") got a number where others got a list'),
        ([1.0, [1.0, 2.0, 3.0]], 'response 1 of 2 ("hat") got a number where others got a list'),
        ([[1.0, 2.0], [1.0, 2.0]], 'response 2 of 2 ("moon : moon") got 2 scores for 3 tokens'),
        ([[1.0, 2.0], [1.0, 2.0, "x"]], 'token 3 of response 2 of 2 ("moon : moon") got text, "x"'),
        ([[1.0, 2.0], [1.0, 2.0, [3.0]]], 'token 3 of response 2 of 2 ("moon : moon") got a list'),
    ],
)
def test_values_of_another_shape(given, says):
    """Wrong count, type or length: which response, what it got, what is wanted."""
    with pytest.raises(ConfigError) as error:
        checked(given, BATCH, WHERE)
    assert problem(error).startswith(f"{WHERE}: {says}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39, 10**400, torch.tensor(float("nan"))])
def test_scores_that_are_not_finite(bad):
    """Also not in float32, in which they are used: 1e39 is infinite there. Exit code 70: do not retry."""
    with pytest.raises(NumericError, match=r'function: response 2 of 2 \("moon : moon"\) got .*finite float32'):
        checked([0.0, bad], BATCH, WHERE)
    with pytest.raises(NumericError, match=r"function: token 1 of response 2 of 2"):
        checked([[0.0, 0.0], [bad, 0.0, 0.0]], BATCH, WHERE)


def test_the_largest_number_of_float32():
    """The bound is float32's own."""
    largest = float(np.finfo(np.float32).max)
    assert checked([largest, -largest], BATCH, WHERE) == [largest, -largest]


def test_the_probe():
    """The empty response to a real prompt: a row that any policy may give."""
    row = probe(BATCH.messages[0], stop_id=2)
    assert (row.prompts, row.responses, row.response_ids, row.finished) == (["say hat"], [""], [[2]], [True])


def test_no_torch():
    """Neither functions nor endpoints need it: an endpoint's author can import the batch without torch."""
    code = "import sys, align.rewards.functions, align.rewards.remote; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
