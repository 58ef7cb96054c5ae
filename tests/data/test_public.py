"""The shapes of public data sets, worked by hand: rows with the published columns, and what becomes of them.

All texts are made up here; only the names of the columns and the types of their values are those of the data sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

from align.data.load import Dataset, load
from align.data.public import SHAPES
from align.data.rows import Demonstration, Judgement, Message, Preference, Prompt, Row
from align.errors import DataError
from align.recipe.data_settings import DataSettings, Role

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
PREFERENCES, DEMONSTRATIONS, JUDGEMENTS, PROMPTS = Role.PREFERENCES, Role.DEMONSTRATIONS, Role.JUDGEMENTS, Role.PROMPTS


class Case(NamedTuple):
    """Rows of a file, what they are read as, and what comes out."""

    rows: Sequence[dict]
    role: Role
    expected: Sequence[Row]
    settings: Mapping[str, object] = MappingProxyType({})
    left_out: Sequence[str] = ()
    """Kinds of what is left out, in order."""


def talk(*texts: str, system: str | None = None) -> list[Message]:
    """A conversation of the user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": said} for place, said in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def said(*texts: str) -> list[dict]:
    """The same as ShareGPT has it."""
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(texts)]


def better(prompt: str | list[Message], chosen: str, rejected: str, row: int = 1) -> Preference:
    asked = talk(prompt) if isinstance(prompt, str) else prompt
    return Preference(asked, chosen, rejected, f"rows.jsonl:{row}")


def shown(*texts: str, row: int = 1, system: str | None = None) -> Demonstration:
    return Demonstration(talk(*texts, system=system), f"rows.jsonl:{row}")


# The six types of TRL, in their standard and their conversational form.
ASKED, BLUE, RED = (
    talk("A colour?"),
    [{"role": "assistant", "content": "Blue."}],
    [{"role": "assistant", "content": "Red."}],
)
TRL = {
    "prompt-only, standard": Case([{"prompt": "A colour?"}], PROMPTS, [Prompt(ASKED, "rows.jsonl:1")]),
    "prompt-only, conversational": Case([{"prompt": ASKED}], PROMPTS, [Prompt(ASKED, "rows.jsonl:1")]),
    "language modeling, conversational": Case(
        [{"messages": talk("A colour?", "Blue.", "More?", "Red.")}],
        DEMONSTRATIONS,
        [shown("A colour?", "Blue.", "More?", "Red.")],
    ),
    "prompt-completion, standard": Case(
        [{"prompt": "The sky is", "completion": " blue."}], DEMONSTRATIONS, [shown("The sky is", " blue.")]
    ),
    "prompt-completion, conversational": Case(
        [{"prompt": talk("A colour?", "Blue.", "More?"), "completion": RED}],
        DEMONSTRATIONS,
        [shown("A colour?", "Blue.", "More?", "Red.")],
    ),
    "preference, explicit, standard": Case(
        [{"prompt": "The sky is", "chosen": " blue.", "rejected": " red."}],
        PREFERENCES,
        [better("The sky is", " blue.", " red.")],
    ),
    "preference, explicit, conversational": Case(
        [{"prompt": ASKED, "chosen": BLUE, "rejected": RED}], PREFERENCES, [better("A colour?", "Blue.", "Red.")]
    ),
    "preference, implicit, standard": Case(
        [
            {"chosen": "The sky is blue.", "rejected": "The sky is red."},
            {"chosen": "The sky is\nblue today.", "rejected": "The sky is\nblue tomorrow."},
        ],
        PREFERENCES,
        [
            better("The sky is", " blue.", " red."),
            replace(better("The sky is\nblue", " today.", " tomorrow."), source="rows.jsonl:2"),
        ],
        {"implicit_prompt": True},
    ),
    "preference, implicit, conversational": Case(
        [
            {
                "chosen": talk("A colour?", "Blue.", "More?", "Red."),
                "rejected": talk("A colour?", "Blue.", "More?", "No."),
            }
        ],
        PREFERENCES,
        [better(talk("A colour?", "Blue.", "More?"), "Red.", "No.")],
    ),
    "unpaired, standard": Case(
        [{"prompt": "The sky is", "completion": " blue.", "label": True}],
        JUDGEMENTS,
        [Judgement(talk("The sky is"), " blue.", True, "rows.jsonl:1")],
    ),
    "unpaired, conversational": Case(
        [{"prompt": ASKED, "completion": RED, "label": False}],
        JUDGEMENTS,
        [Judgement(ASKED, "Red.", False, "rows.jsonl:1")],
    ),
    "unpaired, of a preference": Case(
        [{"prompt": ASKED, "chosen": BLUE, "rejected": RED}],
        JUDGEMENTS,
        [Judgement(ASKED, "Blue.", True, "rows.jsonl:1"), Judgement(ASKED, "Red.", False, "rows.jsonl:1")],
    ),
    "unpaired, put together by prompt": Case(
        [
            {"prompt": "A colour?", "completion": "Seven.", "label": False},
            {"prompt": "A number?", "completion": "Seven.", "label": True},
            {"prompt": "A colour?", "completion": "Blue.", "label": True},
        ],
        PREFERENCES,
        [better("A colour?", "Blue.", "Seven.", row=3)],
        left_out=["one answer"],
    ),
    "stepwise, as prompts": Case(
        [{"prompt": "A colour?", "completions": ["Blue", "or seven."], "labels": [True, False]}],
        PROMPTS,
        [Prompt(ASKED, "rows.jsonl:1")],
    ),
}

HH = "\n\nHuman: A colour?\n\nAssistant: Blue.\n\nHuman: One more, \nplease?\n\nAssistant: "
ULTRA = {
    "source": "made_up",
    "instruction": "A colour?",
    "models": ["a", "b", "c"],
    "completions": [
        {
            "model": model,
            "response": response,
            "overall_score": overall,
            "fine-grained_score": 1.0,
            "annotations": {
                "instruction_following": {"Rating": first},
                "honesty": {"Rating": "N/A"},
                "truthfulness": {"Rating": "3"},
                "helpfulness": {"Rating": "2"},
            },
        }
        for model, response, overall, first in (("a", "Seven.", 9, "1"), ("b", "Blue.", 2, "5"), ("c", "Red.", 5, "4"))
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
HELPSTEER = [
    {
        "prompt": "A colour?",
        "response": response,
        "helpfulness": helpfulness,
        "correctness": correctness,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 0,
    }
    for response, helpfulness, correctness in (("Seven.", 1, 4), ("Blue.", 3, 0))
]
MARKED = "A colour?\n<extra_id_1>Assistant\nBlue.\n<extra_id_1>User\nOne more?"
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": talk("A?", "B.", "C?"),
    "response1": "D.",
    "response2": "E.",
}
SHP = {
    "post_id": "p1",
    "domain": "askmadeup_test",
    "history": "How do I paint a fence?",
    "human_ref_A": "With a brush.",
    "human_ref_B": "With care.",
    "score_A": 3,
    "score_B": 9,
    "score_ratio": 3.0,
}
PKU = {
    "prompt": "How do I open this?",
    "response_0": "With a key.",
    "response_1": "With a hammer.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
POST = {"id": "t1", "subreddit": "gardens", "title": "My roses", "post": "They wilt."}
TLDR_PROMPT = "SUBREDDIT: r/gardens\n\nTITLE: My roses\n\nPOST: They wilt.\n\nTL;DR:"
SUMMARIES = [
    {"text": " Roses wilt.", "policy": "ref", "note": None},
    {"text": " Roses.", "policy": "sup", "note": None},
]


def message(identity: str, parent: str | None, text: str, rank: int | None = None, **more: object) -> dict:
    """A message of OpenAssistant: `p` ids are the prompter's, `a` ids the assistant's."""
    role = {"p": "prompter", "a": "assistant"}[identity[0]]
    tree = {"message_tree_id": "p1", "tree_state": "ready_for_export", "deleted": False, "lang": "en"}
    return {"message_id": identity, "parent_id": parent, "text": text, "role": role, "rank": rank, **tree, **more}


TREE = [
    message("p1", None, "A colour?"),
    message("a2", "p1", "Seven.", rank=1),
    message("a1", "p1", "Blue.", rank=0),
    message("p2", "a1", "One more?"),
    message("a3", "p2", "Red.", rank=0),
    message("a4", "p2", "No.", rank=2),
    message("a5", "p2", "Eight.", rank=1),
    message("a6", "p2", "Spam.", deleted=True),
    message("p3", "a6", "Why?"),
]
LOST = ["deleted", "lost message"]

PUBLIC = {
    "Anthropic HH": Case(
        [{"chosen": HH + "Red.", "rejected": HH + "No."}],
        PREFERENCES,
        [better(talk("A colour?", "Blue.", "One more, \nplease?"), "Red.", "No.")],
    ),
    "UltraFeedback binarized": Case(
        [
            {
                "prompt": "A colour?",
                "prompt_id": "f00",
                "chosen": talk("A colour?", "Blue."),
                "rejected": talk("A colour?", "Seven."),
                "messages": talk("A colour?", "Blue."),
                "score_chosen": score,
                "score_rejected": 4.0,
            }
            for score in (8.5, 4.0)
        ],
        PREFERENCES,
        [better("A colour?", "Blue.", "Seven.")],
        left_out=["equal scores"],
    ),
    "UltraFeedback binarized, several turns": Case(
        [
            {
                "prompt": "One more?",
                "chosen": talk("A?", "B.", "One more?", "C."),
                "rejected": talk("A?", "B.", "One more?", "D."),
            }
        ],
        PREFERENCES,
        [better(talk("A?", "B.", "One more?"), "C.", "D.")],
    ),
    "UltraFeedback binarized, for SFT": Case(
        [{"prompt": "A?", "messages": talk("A?", "B."), "chosen": talk("A?", "B."), "rejected": talk("A?", "C.")}],
        DEMONSTRATIONS,
        [shown("A?", "B.")],
    ),
    # Means of the ratings that are numbers: (1+3+2)/3 = 2, (5+3+2)/3 = 3.33, (4+3+2)/3 = 3.
    "UltraFeedback": Case([ULTRA], PREFERENCES, [better("A colour?", "Blue.", "Seven.")]),
    "UltraFeedback, best": Case(
        [ULTRA],
        PREFERENCES,
        [better("A colour?", "Blue.", "Seven."), better("A colour?", "Blue.", "Red.")],
        {"pairs": "best"},
    ),
    "UltraFeedback, overall score": Case(
        [ULTRA], PREFERENCES, [better("A colour?", "Seven.", "Blue.")], {"score": "overall_score"}
    ),
    "UltraFeedback, not rated": Case(
        [ULTRA, ULTRA], PROMPTS, [Prompt(ASKED, "rows.jsonl:1"), Prompt(ASKED, "rows.jsonl:2")], {"score": "honesty"}
    ),
    "HelpSteer2": Case(HELPSTEER, PREFERENCES, [better("A colour?", "Blue.", "Seven.", row=2)]),
    "HelpSteer2, correctness": Case(
        HELPSTEER, PREFERENCES, [better("A colour?", "Seven.", "Blue.")], {"score": "correctness"}
    ),
    "HelpSteer2, several turns, for SFT": Case(
        [{**HELPSTEER[1], "prompt": MARKED}], DEMONSTRATIONS, [shown("A colour?", "Blue.", "One more?", "Blue.")]
    ),
    "HelpSteer2, preferences": Case(
        [
            {
                "split": "train",
                "prompt": "A colour?",
                "response_1": "Blue.",
                "response_2": "Red.",
                "preference_strength": n,
            }
            for n in (-2, 0, 1)
        ],
        PREFERENCES,
        [better("A colour?", "Blue.", "Red."), better("A colour?", "Red.", "Blue.", row=3)],
        left_out=["equal scores"],
    ),
    "HelpSteer3": Case(
        [{**HELPSTEER3, "overall_preference": strength} for strength in (-3, 0, 2)],
        PREFERENCES,
        [better(talk("A?", "B.", "C?"), "D.", "E."), better(talk("A?", "B.", "C?"), "E.", "D.", row=3)],
        left_out=["equal scores"],
    ),
    "SHP": Case(
        [{**SHP, "labels": label} for label in (0, 1)],
        PREFERENCES,
        [
            better("How do I paint a fence?", "With care.", "With a brush."),
            better("How do I paint a fence?", "With a brush.", "With care.", row=2),
        ],
    ),
    "PKU-SafeRLHF, better": Case([PKU], PREFERENCES, [better("How do I open this?", "With a hammer.", "With a key.")]),
    "PKU-SafeRLHF, safer": Case(
        [PKU], PREFERENCES, [better("How do I open this?", "With a key.", "With a hammer.")], {"score": "safer"}
    ),
    "OpenAssistant": Case(
        TREE,
        PREFERENCES,
        [
            better("A colour?", "Blue.", "Seven.", row=3),
            better(talk("A colour?", "Blue.", "One more?"), "Red.", "No.", row=5),
        ],
        left_out=LOST,
    ),
    "OpenAssistant, for SFT": Case(
        TREE, DEMONSTRATIONS, [shown("A colour?", "Blue.", "One more?", "Red.", row=5)], left_out=LOST
    ),
    "Alpaca": Case(
        [{"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is ..."}],
        DEMONSTRATIONS,
        [shown("Add.\n\n1 and 2", "3")],
    ),
    "Alpaca with a history": Case(
        [
            {
                "instruction": "And 4?",
                "input": "",
                "output": "7",
                "system": "Be brief.",
                "history": [["Add 1 and 2.", "3"]],
            }
        ],
        DEMONSTRATIONS,
        [shown("Add 1 and 2.", "3", "And 4?", "7", system="Be brief.")],
    ),
    "ShareGPT": Case(
        [{"conversations": said("A colour?", "Blue.", "One more?", "Red."), "system": "Be brief.", "tools": "[]"}],
        DEMONSTRATIONS,
        [shown("A colour?", "Blue.", "One more?", "Red.", system="Be brief.")],
    ),
    "ShareGPT preferences": Case(
        [
            {
                "conversations": said("A colour?", "Blue.", "One more?"),
                "chosen": {"from": "gpt", "value": "Red."},
                "rejected": {"from": "gpt", "value": "No."},
            }
        ],
        PREFERENCES,
        [better(talk("A colour?", "Blue.", "One more?"), "Red.", "No.")],
    ),
    "Dolly": Case(
        [{"instruction": "Who?", "context": "Ann ran.", "response": "Ann.", "category": "closed_qa"}],
        DEMONSTRATIONS,
        [shown("Who?\n\nAnn ran.", "Ann.")],
    ),
    "TL;DR summaries": Case([{**POST, "summary": "Roses wilt."}], DEMONSTRATIONS, [shown(TLDR_PROMPT, "Roses wilt.")]),
    "TL;DR comparisons": Case(
        [{"info": {**POST, "site": None, "article": None}, "summaries": SUMMARIES, "choice": 1, "batch": "batch3"}],
        PREFERENCES,
        [better(TLDR_PROMPT, " Roses.", " Roses wilt.")],
    ),
    "TL;DR comparisons of articles": Case(
        [{"info": {"id": "c1", "title": "Storm", "article": "It rained."}, "summaries": SUMMARIES, "choice": 0}],
        PREFERENCES,
        [better("TITLE: Storm\n\nIt rained.\n\nTL;DR:", " Roses wilt.", " Roses.")],
    ),
    "WebGPT comparisons": Case(
        [
            {
                "question": {"dataset": "made_up", "id": "q1", "full_text": "Why is it blue?"},
                "answer_0": "Light [1].",
                "answer_1": "It is.",
                "score_0": score,
                "score_1": -score,
            }
            for score in (-0.5, 0.0)
        ],
        PREFERENCES,
        [better("Why is it blue?", "It is.", "Light [1].")],
        left_out=["equal scores"],
    ),
    "Nectar": Case(
        [
            {
                "prompt": "\n\nHuman: A colour?\n\nAssistant: ",
                "answers": [
                    {"answer": said, "model": "m", "rank": rank}
                    for said, rank in (("Red.", 2.0), ("Seven.", 3.0), ("Blue.", 1.0))
                ],
                "turns": 1,
                "num_responses": 3,
            }
        ],
        PREFERENCES,
        [
            better("A colour?", "Red.", "Seven."),
            better("A colour?", "Blue.", "Red."),
            better("A colour?", "Blue.", "Seven."),
        ],
        {"pairs": "all"},
    ),
    "Orca pairs": Case(
        [
            {"system": system, "question": "A colour?", "chosen": "Blue.", "rejected": "Seven."}
            for system in ("Be brief.", "")
        ],
        PREFERENCES,
        [
            better(talk("A colour?", system="Be brief."), "Blue.", "Seven."),
            better("A colour?", "Blue.", "Seven.", row=2),
        ],
    ),
    "distilabel Orca pairs": Case(
        [
            {
                "system": "",
                "input": "A colour?",
                "chosen": "Blue.",
                "rejected": "Seven.",
                "rating": None,
                "status": "unchanged",
            }
        ],
        PREFERENCES,
        [better("A colour?", "Blue.", "Seven.")],
    ),
    "Skywork": Case(
        [{"chosen": talk("A?", "B."), "rejected": talk("A?", "C."), "source": "made_up"}],
        PREFERENCES,
        [better("A?", "B.", "C.")],
    ),
    "Tulu mixture": Case(
        [
            {
                "id": "1",
                "source": "made_up",
                "prompt": "A?",
                "chosen": talk("A?", "B.", "C?", "D."),
                "rejected": talk("A?", "B.", "C?", "E."),
            }
        ],
        PREFERENCES,
        [better(talk("A?", "B.", "C?"), "D.", "E.")],
    ),
    "DPO mix": Case(
        [
            {
                "dataset": "made_up",
                "chosen": talk("A?", "B."),
                "rejected": talk("A?", "C."),
                "chosen_rating": 5.0,
                "rejected_rating": rating,
            }
            for rating in (3.0, None, 5.0)
        ],
        PREFERENCES,
        [better("A?", "B.", "C."), better("A?", "B.", "C.", row=2)],
        left_out=["equal scores"],
    ),
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(case: Case) -> Dataset:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
    return load(DataSettings.model_validate({"path": "rows.jsonl", "held_out": 0, **case.settings}), case.role)


@pytest.mark.parametrize("case", {**TRL, **PUBLIC}.values(), ids={**TRL, **PUBLIC})
def test_rows(case: Case) -> None:
    """Every row becomes what the table says, and what is left out is counted."""
    data = read(case)
    assert list(data.train) == case.expected
    assert [problem.kind for problem in data.report.skipped] == list(case.left_out)


def shp(number: int, post: str = "How?", ratio: float = 2.0) -> dict:
    texts = {"history": post, "human_ref_A": f"A {number}", "human_ref_B": f"B {number}"}
    return {**SHP, **texts, "labels": 1, "score_ratio": ratio}


@pytest.mark.parametrize(
    ("settings", "kept", "left_out"),
    [
        ({}, [2, 3, 4, 5, 6, 8], {1: "close scores", 7: "many pairs"}),
        ({"score_ratio": 1}, [1, 2, 3, 4, 5, 8], {6: "many pairs", 7: "many pairs"}),
        ({"pairs_per_prompt": 2, "score_ratio": 3}, [], {}),
        ({"pairs_per_prompt": 9}, [2, 3, 4, 5, 6, 7, 8], {1: "close scores"}),
    ],
)
def test_filters_of_shp(settings: dict, kept: list[int], left_out: dict[int, str]) -> None:
    """Row 1 has a ratio under 2; rows 1 to 7 are of one post, of which five are kept; row 8 is of another."""
    rows = [shp(1, ratio=1.9), *(shp(number) for number in range(2, 8)), shp(8, "Why?")]
    case = Case(rows, Role.PREFERENCES, [], settings)
    if not kept:
        with pytest.raises(DataError, match="`score_ratio` is 2, below 3"):
            read(case)
        return
    data = read(case)
    assert [row.source for row in data.train] == [f"rows.jsonl:{number}" for number in kept]
    assert {int(one.where.split(":")[1]): one.kind for one in data.report.skipped} == left_out
    assert len(read(case._replace(role=Role.JUDGEMENTS)).train) == 2 * len(kept)
    assert len(read(case._replace(role=PROMPTS)).train) == len(rows)


def test_pairs_of_a_prompt_are_limited_in_any_file() -> None:
    """Four ranked answers make six pairs."""
    rows = [{"prompt": "Which?", "responses": ["a", "b", "c", "d"], "scores": [4, 3, 2, 1]}]
    data = read(Case(rows, Role.PREFERENCES, [], {"pairs": "all", "pairs_per_prompt": 4}))
    assert [(row.chosen, row.rejected) for row in data.train] == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c")]
    assert [one.what for one in data.report.skipped] == ["its prompt has 4 pairs already"] * 2


def prompt_of(row: Row) -> list[Message]:
    assert isinstance(row, Preference | Demonstration)
    return row.prompt if isinstance(row, Preference) else row.messages[:-1]


@pytest.mark.parametrize("case", PUBLIC.values(), ids=PUBLIC)
def test_prompts(case: Case) -> None:
    """What is trained on can be sampled from: the prompts of every pair and demonstration are read as prompts too. In
    OpenAssistant's trees these are the prompts with ranked answers."""
    prompts = [row.messages for row in read(case._replace(role=PROMPTS)).train]
    assert all(prompt_of(row) in prompts for row in case.expected if isinstance(row, Preference | Demonstration))


def test_the_docs_have_every_shape() -> None:
    """Each shape's columns are the second cell of a row of a table, with its data set or kind in the first."""
    tables = [line.split("|") for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    documented = {frozenset(re.findall(r"`(\w+)`", cells[2])) for cells in tables if len(cells) > 3}
    missing = [shape.name for shape in SHAPES if frozenset(shape.columns) not in documented]
    assert missing == []
