"""What a plan says about data before anything starts: errors stop it, oddities are told once and kept in the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_run import Toy

from align.errors import DataError
from align.pipeline import data as planned
from align.pipeline.data import Reports, check_data, described
from align.pipeline.external import HashCache
from align.pipeline.fingerprint import Contents
from align.pipeline.graph import build_graph
from align.recipe.load import load_recipe
from stages import load_specs


def row(number: int, **more: object) -> dict[str, object]:
    return {"prompt": f"ask {number}", "chosen": f"good {number}", "rejected": f"bad {number}", **more}


def write(name: str, *rows: object) -> None:
    Path(name).write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()


def reports(text: str = "reward:\n  data: rows.jsonl\n") -> dict[str, dict]:
    """Of the data of a recipe's reward stage, by setting."""
    Path("align.yaml").write_text(f"model: {{path: org/model, revision: {'a' * 40}}}\n{text}")
    recipe = load_recipe(Path("align.yaml"), specs=load_specs())
    nodes = build_graph(recipe, ["reward"])
    evaluation = recipe.settings.evaluation.data
    found = check_data(nodes, Reports(Path("runs").resolve(), Contents(nodes, evaluation), evaluation))
    return described(found, recipe, nodes, HashCache(Path("runs")))["reward"]


def kinds(report: dict) -> list[str]:
    return [finding["kind"] for finding in report["data"]["findings"]]


def test_oddities_are_found_and_counted() -> None:
    write("rows.jsonl", row(1), row(1), row(2), {"prompt": "ask"})
    found = reports("reward:\n  data: {path: rows.jsonl, on_bad: skip}\n")["data"]
    assert (found["train"] + found["held_out"], found["looked_at"]) == (3, 3)
    assert found["skipped"] == {"missing": 1}
    assert [(one["kind"], one["count"]) for one in found["findings"]] == [("duplicate", 1)]


def test_data_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time what was found is read; other bytes are looked at anew."""
    write("rows.jsonl", row(1), row(1))
    first = reports()
    with monkeypatch.context() as patch:
        patch.setattr(planned, "load", None)  # calling it would raise
        assert reports() == first
    write("rows.jsonl", row(1), row(2))
    assert kinds(reports()) == []


def test_of_much_data_some_prompts_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """With at most 50 of 400 rows, an eighth of the prompts: each is there twice, so half of what is seen repeats."""
    monkeypatch.setattr("align.data.checking.look.AT_MOST", 50)
    write("rows.jsonl", *(row(number) for number in range(200)), *(row(number) for number in range(200)))
    found = reports()["data"]
    assert 20 <= found["looked_at"] <= 80
    (repeated,) = [finding for finding in found["findings"] if finding["kind"] == "duplicate"]
    assert repeated["count"] == found["looked_at"] / 2


EVALUATED = "evaluation:\n  data: eval.jsonl\nreward:\n  data: rows.jsonl\n"


def test_prompts_that_are_measured_on_stop_the_plan() -> None:
    """Nothing was started, and the row and its twin are named."""
    write("rows.jsonl", row(1), row(2))
    write("eval.jsonl", {"prompt": "ask 1"}, {"prompt": "ask 2"})
    with pytest.raises(DataError, match=r"rows\.jsonl:\d: its prompt is in an evaluation set, at \S*eval\.jsonl:\d"):
        reports(EVALUATED)
    write("eval.jsonl", {"prompt": "ask 3"})
    assert kinds(reports(EVALUATED)) == []


def card(**changes: object) -> None:
    """A card of rows.jsonl, beside the recipe."""
    from align.data.cards import measured
    from align.recipe.data_settings import Role

    facts = measured(Path("rows.jsonl"), Role.PREFERENCES) | changes
    facts |= {"file": "rows.jsonl", "role": "preferences", "intended_use": ["reward"], "personal_data": "possible"}
    Path("data_cards").mkdir(exist_ok=True)
    front = f"language: [en]\nlicense: mit\nalign: {json.dumps(facts)}\n"
    Path("data_cards/pairs.md").write_text(f"---\n{front}---\n")


def test_facts_of_the_data_card_are_kept() -> None:
    write("rows.jsonl", row(1), row(2))
    card()
    (facts,) = reports()["data"]["cards"]
    assert (facts["card"], facts["licence"], facts["languages"]) == ("pairs", "mit", ["en"])
    assert (facts["personal_data"], facts["splits"]) == ("possible", {"train": 1, "held_out": 1})


def test_a_copy_has_the_card_of_its_original_and_other_files_have_none() -> None:
    write("rows.jsonl", row(1), row(2))
    card()
    Path("copy.jsonl").write_bytes(Path("rows.jsonl").read_bytes())
    assert len(reports("reward:\n  data: copy.jsonl\n")["data"]["cards"]) == 1
    write("other.jsonl", row(3))
    assert reports("reward:\n  data: other.jsonl\n")["data"]["cards"] == []


@pytest.mark.parametrize(
    ("changes", "what"), [({"sha256": "0" * 64}, "its sha256 is"), ({"rows": 3}, "its number of rows is 2")]
)
def test_a_file_that_is_not_what_its_card_says_stops_the_plan(changes: dict, what: str) -> None:
    write("rows.jsonl", row(1), row(2))
    card(**changes)
    with pytest.raises(DataError, match=rf"rows\.jsonl: {what},? .*data card .*pairs\.md says"):
        reports()


def test_the_plan_tells_and_the_record_keeps(toy: Toy) -> None:
    """Through the command line: the same lines in the plan, record.json and summary.json."""
    text = (toy.folder / "rows.jsonl").read_text()
    (toy.folder / "rows.jsonl").write_text(text + text.splitlines()[0] + "\n")
    assert "warning: duplicate, 1; rows.jsonl:9: the same as rows.jsonl:1" in toy.align("plan", "sft")
    toy.align("run", "sft")
    record = json.loads((toy.directory("sft") / "record.json").read_text())
    assert [one["kind"] for one in record["data_reports"]["data"]["findings"]] == ["duplicate"]
    summary = json.loads((toy.run_dir / "summary.json").read_text())
    assert summary["data"]["sft"] == record["data_reports"]
