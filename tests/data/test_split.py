"""The split depends on the text of prompts and on nothing else."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.load import load
from align.data.split import Keys, digest, prompt_key, share, split
from align.recipe.data_settings import DataSettings, Role

KEYS = st.lists(st.text(max_size=3), max_size=30)
SHARES = st.floats(0, 1, exclude_max=True)


def sides(keys: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """Keys of the training and of the held-out rows."""
    train, held = split(Keys(map(digest, keys)), held_out)
    return [keys[position] for position in train], [keys[position] for position in held]


def test_share_is_the_hash_modulo_two_to_the_32() -> None:
    assert share(digest("a")) == int(hashlib.sha256(b"a").hexdigest(), 16) % 2**32 / 2**32


@given(KEYS, SHARES, st.randoms())
def test_split_is_a_partition_by_key_that_order_does_not_change(
    keys: list[str], held_out: float, order: random.Random
) -> None:
    train, held = sides(keys, held_out)
    assert not set(train) & set(held)
    assert train == [key for key in keys if key in train]
    assert held == [key for key in keys if key not in train]
    shuffled = order.sample(keys, len(keys))
    assert [set(side) for side in sides(shuffled, held_out)] == [set(train), set(held)]


@given(KEYS, SHARES)
def test_no_side_is_empty_without_need(keys: list[str], held_out: float) -> None:
    train, held = sides(keys, held_out)
    assert bool(train) == bool(keys)
    assert bool(held) == (len(set(keys)) > 1 and held_out > 0)
    by_rule = {key for key in keys if share(digest(key)) < held_out}
    assert len(by_rule ^ set(held)) <= 1


def test_prompt_key_ignores_system_space_and_unicode_form() -> None:
    composed = [{"role": "user", "content": "caf\u00e9"}]
    decomposed = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " cafe\u0301\n"}]
    assert prompt_key(composed) == prompt_key(decomposed)
    assert prompt_key(composed) != prompt_key([{"role": "user", "content": "cafe"}])


def test_prompt_key_tells_turns_apart() -> None:
    joined = [{"role": "user", "content": "a\nb"}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt_key(joined) != prompt_key(turns)


def test_stages_share_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts in files of preferences, of demonstrations and of prompts fall on the same sides."""
    monkeypatch.chdir(tmp_path)
    questions = [f"What is {number} and {number}?" for number in range(200)]
    files = {
        Role.PREFERENCES: [{"prompt": q, "chosen": "a", "rejected": str(n)} for q in questions for n in range(2)],
        Role.DEMONSTRATIONS: [{"instruction": q, "output": "a"} for q in reversed(questions)],
        Role.PROMPTS: [{"prompt": [{"role": "user", "content": q}]} for q in questions],
    }
    held_prompts = []
    for role, rows in files.items():
        Path(f"{role}.json").write_text(json.dumps(rows), encoding="utf-8")
        data = load(DataSettings(path=f"{role}.json", held_out=0.2), role)
        assert len(data.train) + len(data.held_out) == len(rows)
        prompts = [row.prompt if role is Role.PREFERENCES else row.messages for row in data.held_out]
        held_prompts.append({prompt[0]["content"] for prompt in prompts})
    assert held_prompts[0] == held_prompts[1] == held_prompts[2]
    assert 20 <= len(held_prompts[0]) <= 60
