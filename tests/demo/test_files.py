"""The demo's data files: made by the generator, byte for byte, and clean of leaks; every data file has its card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.data.cards import HEADINGS, check_card, check_cards, read_card, size_category
from align.data.load import load
from align.demo import world
from align.demo.files import SIZES, make_files, write_files
from align.errors import DataError
from align.recipe.data_settings import DataSettings, Role
from align.records import sha256_file

REPOSITORY = Path(__file__).parents[2]
CONFIGS, CARDS = REPOSITORY / "configs", REPOSITORY / "data_cards"
ROLES = {
    "heldout": Role.PROMPTS,
    "prompts": Role.PROMPTS,
    "demonstrations": Role.DEMONSTRATIONS,
    "preferences": Role.PREFERENCES,
    "corpus": Role.CORPUS,
}


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (CONFIGS / "demo" / f"{name}.jsonl").read_text().splitlines()]


def test_generator_gives_the_shipped_files_byte_for_byte(tmp_path):
    """Anyone can make them again; nobody edited them by hand."""
    write_files(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in (CONFIGS / "demo").glob("*.jsonl")}
    assert made == shipped


def test_generator_is_deterministic_and_listens_to_its_seed():
    """The same seed gives the same files, another seed gives others."""
    first, again, other = make_files(seed=3), make_files(seed=3), make_files(seed=4)
    assert first == again
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("name", sorted(ROLES))
def test_files_are_what_their_stages_read(name):
    """Every row loads in its role, none is bad, and there are as many as promised."""
    dataset = load(DataSettings(path=str(CONFIGS / "demo" / f"{name}.jsonl"), held_out=0.0), ROLES[name])
    assert len(dataset.train) == SIZES[name]
    assert not dataset.report.skipped


def test_held_out_instructions_appear_in_no_other_file():
    """Not as a prompt anywhere, and not inside a sentence of the corpus: what is measured on is never trained on."""
    held_out = {row["prompt"] for row in rows("heldout")}
    assert len(held_out) == SIZES["heldout"]
    for name in ("demonstrations", "preferences", "prompts"):
        assert not held_out & {row["prompt"] for row in rows(name)}
    corpus = "\n".join(row["text"] for row in rows("corpus"))
    assert not [instruction for instruction in held_out if instruction in corpus]


def test_preferences_follow_gold_with_noise():
    """No ties; the judge errs now and then, and not often."""
    gaps = [
        world.gold(row["prompt"], row["chosen"]) - world.gold(row["prompt"], row["rejected"])
        for row in rows("preferences")
    ]
    assert 0 not in gaps
    assert 0.85 < sum(gap > 0 for gap in gaps) / len(gaps) < 0.99


def test_every_data_file_has_a_card_and_every_card_is_true():
    """Hash, number of rows, role and headings agree with the files, and no file of configs/ is left out."""
    assert [str(problem) for problem in check_cards(CARDS, CONFIGS)] == []
    described = {read_card(path).facts.file for path in CARDS.glob("*.md")}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.jsonl")} <= described


def write_card(folder: Path, **changes: object) -> Path:
    data = folder / "configs" / "a.jsonl"
    data.parent.mkdir(exist_ok=True)
    data.write_text('{"prompt": "say hat"}\n{"prompt": "say moon"}\n')
    facts = {
        "file": "a.jsonl",
        "sha256": sha256_file(data),
        "rows": 2,
        "columns": ["prompt"],
        "splits": {"train": 1, "held_out": 1},
        "role": "prompts",
        "intended_use": ["ppo"],
        "personal_data": "none",
        **changes,
    }
    prose = "".join(f"\n## {heading}\nText.\n" for heading in HEADINGS)
    card = folder / "card.md"
    front = "pretty_name: A\nlanguage: [en]\nlicense: mit\nannotations_creators: [found]\nsize_categories: [n<1K]\n"
    card.write_text(f"---\n{front}align: {json.dumps(facts)}\n---\n{prose}")
    return card


def test_a_true_card_passes(tmp_path):
    """The card that the next tests spoil."""
    assert check_card(write_card(tmp_path), tmp_path / "configs") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "a.jsonl: 2, the card says 3"),
        ({"columns": ["prompt", "answer"]}, '["prompt"], the card says ["prompt", "answer"]'),
        ({"splits": {"train": 2, "held_out": 0}}, '"held_out": 1}, the card says {"train": 2, "held_out": 0}'),
        ({"sha256": "0" * 64}, "the card says 0000"),
        ({"file": "b.jsonl"}, "b.jsonl does not exist"),
    ],
)
def test_a_card_that_disagrees_with_its_file(tmp_path, changes, message):
    """Each fact is checked against the bytes."""
    (problem,) = check_card(write_card(tmp_path, **changes), tmp_path / "configs")
    assert message in str(problem)


@pytest.mark.parametrize(
    ("rows", "name"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**9, "1B<n<10B")],
)
def test_names_of_sizes(rows, name):
    """Powers of ten, the lower one included."""
    assert size_category(rows) == name


def test_a_card_without_a_heading(tmp_path):
    """An empty section is a missing one."""
    card = write_card(tmp_path)
    card.write_text(card.read_text().replace("## Licence\nText.\n", "## Licence\n"))
    (problem,) = check_card(card, tmp_path / "configs")
    assert "'## Licence' is missing or empty" in str(problem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# No front matter\n", "no front matter"),
        ("---\nlanguage: [en]\n---\n", "no `align:` block"),
        ("---\nalign: {file: a.jsonl}\n---\n", "align.sha256: Field required"),
    ],
)
def test_a_card_that_cannot_be_read(tmp_path, text, message):
    """The card and the field are named."""
    (tmp_path / "card.md").write_text(text)
    with pytest.raises(DataError, match=r"card\.md: ") as caught:
        read_card(tmp_path / "card.md")
    assert message in str(caught.value)


def test_a_data_file_without_a_card(tmp_path):
    """It is named, with the folder where its card belongs."""
    write_card(tmp_path)
    (tmp_path / "cards").mkdir()
    (problem,) = check_cards(tmp_path / "cards", tmp_path / "configs")
    assert "a.jsonl: no card in" in str(problem)
