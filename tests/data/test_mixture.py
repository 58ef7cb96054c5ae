"""Mixtures: how many rows of each source, which, and in which order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from align.data.load import content_hash, load
from align.data.mixture import counts, mixed
from align.data.split import Keys, digest
from align.recipe.data_settings import DataSettings, Role, SourceSettings


def sources(*weights: float | None, fraction: float = 1.0) -> list[SourceSettings]:
    return [SourceSettings(path="a", weight=weight, fraction=fraction) for weight in weights]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in {"a": 60, "b": 60, "c": 10}.items():
        rows = [json.dumps({"prompt": f"{name}{number}?"}) for number in range(count)]
        Path(f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")


def prompts(**settings: object) -> list[str]:
    data = load(DataSettings.model_validate({"held_out": 0, **settings}), Role.PROMPTS)
    return [row.messages[0]["content"] for row in data.train]


@pytest.mark.parametrize(
    ("available", "weights", "expected"),
    [
        ([100, 100], (1, 1), [100, 100]),
        ([100, 100], (3, 1), [100, 33]),  # a is used whole: 100 / 3 = 33.3 rows to a unit of weight
        ([1000, 50, 7], (0.5, 0.25, 0.25), [14, 7, 7]),  # c is the scarcest: 7 / 0.25 = 28
        ([10, 0], (1, 1), [0, 0]),
    ],
)
def test_counts_of_weights(available: list[int], weights: tuple[float, ...], expected: list[int]) -> None:
    """As many rows as there are in these proportions, and none twice."""
    assert counts(available, sources(*weights)) == expected


def test_counts_of_fractions() -> None:
    """Each part gives its own share, at least one row."""
    assert counts([100, 3, 0], sources(None, None, None, fraction=0.1)) == [10, 1, 0]


def test_the_first_rows_of_a_mixture_are_a_mixture() -> None:
    """3 to 1 from the first rows on: of 40 rows 30 and 10, and of the first 8 of them 6 and 2."""
    mixture = {"a": {"path": "a.jsonl", "weight": 3}, "c": {"path": "c.jsonl", "weight": 1}}
    found = prompts(mixture=mixture)
    assert Counter(name[0] for name in found) == {"a": 30, "c": 10}
    assert Counter(name[0] for name in prompts(mixture=mixture, max_rows=8)) == {"a": 6, "c": 2}


def test_a_mixture_is_the_same_every_time_and_whatever_the_order_of_a_file() -> None:
    """Rows are chosen by their prompts: turning a file around chooses the same ones."""
    mixture = {"a": {"path": "a.jsonl", "fraction": 0.5}, "b": "b.jsonl"}
    before = prompts(mixture=mixture)
    assert before == prompts(mixture=mixture)
    lines = Path("a.jsonl").read_text(encoding="utf-8").split("\n")
    Path("a.jsonl").write_text("\n".join(lines[::-1]), encoding="utf-8")
    assert set(prompts(mixture=mixture)) == set(before)


def test_a_smaller_fraction_is_part_of_a_larger_one() -> None:
    """So that a larger mixture goes on from a smaller one."""
    few, many = (set(prompts(mixture={"a": {"path": "a.jsonl", "fraction": share}})) for share in (0.2, 0.5))
    assert few < many
    assert (len(few), len(many)) == (12, 30)


def test_the_choice_is_independent_of_the_split() -> None:
    """Half of a source has held-out prompts like the whole: its lowest keys are not what is chosen."""
    keys = Keys(digest(str(number)) for number in range(2000))
    chosen = mixed(keys, [range(2000)], sources(None, fraction=0.5))
    assert len(chosen) == 1000
    assert 400 < sum(keys[position][-4] < 128 for position in chosen) < 600


def test_unused_rows_are_counted() -> None:
    """What the weights and `max_rows` leave is no fault of a row, and is in the report."""
    mixture = {"a": {"path": "a.jsonl", "weight": 3}, "c": {"path": "c.jsonl", "weight": 1}}
    assert load(DataSettings.model_validate({"mixture": mixture}), Role.PROMPTS).report.unused == {"a": 30, "c": 0}
    assert load(DataSettings(path="a.jsonl", max_rows=9), Role.PROMPTS).report.unused == {"": 51}


def test_parts_have_columns_of_their_own() -> None:
    """Private names are mapped part by part; the content hash sees every file."""
    Path("d.jsonl").write_text(json.dumps({"q": "d0?"}), encoding="utf-8")
    mixture = {"a": "c.jsonl", "d": {"path": "d.jsonl", "columns": {"prompt": "q"}}}
    assert "d0?" in prompts(mixture=mixture)
    hashes = [content_hash(DataSettings.model_validate({"mixture": one})) for one in (mixture, {"a": "c.jsonl"})]
    assert hashes[0] != hashes[1]
    assert hashes[1] == content_hash(DataSettings(path="c.jsonl"))


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({}, "path", "required, and not given"),
        ({"path": "a", "mixture": {"a": "a"}}, "path", "the files are named inside it"),
        ({"mixture": {"a": "a"}, "pairs": "all"}, "pairs", "is set in each of its parts"),
        ({"mixture": {"a": {"path": "a", "weight": 1}, "b": "b"}}, "mixture.b", "has no `weight`, and a has one"),
        ({"mixture": {"a": {"path": "a", "weight": 1, "fraction": 0.5}}}, "mixture.a.fraction", "remove one of them"),
        ({"mixture": {"a": {"weight": 1}}}, "mixture.a.path", "required, and not given"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, key: str, message: str) -> None:
    """Each problem has the key that it is about."""
    with pytest.raises(ValidationError) as error:
        DataSettings.model_validate(settings)
    [found] = error.value.errors()
    assert ".".join(map(str, found["loc"])) == key
    assert message in found["msg"]
