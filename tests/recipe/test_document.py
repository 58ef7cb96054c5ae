"""Files that are not readable recipes, and secrets, which no message may show."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import ConfigError
from align.recipe.document import is_secret, read_document
from align.recipe.overrides import parse_override


def read(tmp_path: Path, content: bytes):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    return read_document(path, "r.yaml")


def test_lines_are_those_of_the_keys_and_items(tmp_path):
    document = read(tmp_path, b"# top\nsft:\n  optim:\n    betas:\n    - 0.9\n    - 0.95\n")
    assert document.lines[("sft", "optim")] == 3
    assert document.lines[("sft", "optim", "betas", 1)] == 6
    assert document.values == {"sft": {"optim": {"betas": [0.9, 0.95]}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: \xff\n", "r.yaml: not UTF-8 text (byte 6) (is it a recipe?)"),
        (b"name: x\nseed: \x01\n", "r.yaml:2: character '\\x01' is not allowed in YAML"),
        (b"? [a]\n: 1\n", "r.yaml:1: a list or mapping: a key must be text (quote it)"),
        (b"no: 1\n", "r.yaml:1: no: a key must be text (quote it)"),
    ],
)
def test_unreadable(tmp_path, content, message):
    try:
        problems = read(tmp_path, content).problems
    except ConfigError as error:
        problems = error.problems
    assert [str(problem) for problem in problems] == [message]


def test_a_folder_is_not_a_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_document(tmp_path, "r")


def test_scalars_are_read_as_a_reader_would(tmp_path):
    text = b"a: 1e-5\nb: 0x10\nc: 2024-01-01\nd: '1e-5'\ne: nan\nf: |\n  two\n  lines\ng: 1_000\nh: ~\n"
    assert read(tmp_path, text).values == {
        **{"a": 1e-5, "b": 16, "c": "2024-01-01", "d": "1e-5", "e": "nan", "f": "two\nlines\n", "g": 1000},
        "h": None,
    }


@pytest.mark.parametrize("key", ["token", "hf_token", "password", "OPENAI_API_KEY", "wandb_apikey", "client_secret"])
def test_secret_names(key):
    assert is_secret(key)


@pytest.mark.parametrize("key", ["eos_token", "pad_token", "max_prompt_tokens", "keep", "key", "monkey"])
def test_names_that_only_look_like_secrets(key):
    assert not is_secret(key)


@pytest.mark.parametrize("override", ["hf_token=hunter2", "ppo.kl={password: hunter2}", "a={b: {secret: hunter2}}"])
def test_a_secret_is_never_shown(override):
    with pytest.raises(ConfigError) as error:
        parse_override(override)
    assert "secrets do not belong in a recipe" in str(error.value)
    assert "hunter2" not in str(error.value)
