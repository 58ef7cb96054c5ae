"""The shapes of public data sets: their columns, and what becomes of a row. docs/data.md has them as a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from align.data.faults import RowFault
from align.data.messages import (
    TRANSCRIPT,
    checked_prompt,
    choice,
    number,
    objects,
    optional_text,
    part,
    prompt,
    text,
    user,
)
from align.data.readers import RawRow
from align.data.rows import Message
from align.data.shapes import (
    GENERAL,
    PAIR,
    SCORED_PAIR,
    Grouped,
    Parsed,
    Shape,
    alpaca_and,
    prompt_and,
    scored,
)
from align.data.trees import best_thread, checked_message, ranked_answers
from align.recipe.data_settings import Role

HELPSTEER_SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
ULTRAFEEDBACK_SCORES = ("mean", *ULTRAFEEDBACK_ASPECTS, "overall_score", "fine-grained_score")
PKU_SCORES = {"better": "better_response_id", "safer": "safer_response_id"}
MARKED_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
"""How HelpSteer2 writes earlier turns into a prompt, which starts with the user."""


def compared(columns: Sequence[str], prefers_second: Callable[[RawRow], float], asked: str) -> Callable:
    """Two answers in columns of their own: over 0 the second is better, below 0 the first, 0 is a tie."""

    def parse(row: RawRow) -> Parsed:
        strength = prefers_second(row)
        return Parsed(prompt(row, asked), [text(row, column) for column in columns], [-strength, strength])

    return parse


def shp(row: RawRow) -> Parsed:
    """Two comments on a post; label 1: the first is better."""
    answers = [text(row, column) for column in ("human_ref_A", "human_ref_B")]
    ratio = number(row, "score_ratio") if "score_ratio" in row else None
    return Parsed(prompt(row, "history"), answers if choice(row, "labels", (0, 1)) else answers[::-1], ratio=ratio)


def which(column: str, row: RawRow) -> float:
    """The position of the better answer, 0 or 1."""
    return 1 if choice(row, column, (0, 1)) else -1


def webgpt(row: RawRow) -> Parsed:
    asked = [user(text(part(row, "question"), "full_text", "`question`"))]
    answers = [text(row, column) for column in ("answer_0", "answer_1")]
    return Parsed(asked, answers, [number(row, column) for column in ("score_0", "score_1")])


def helpsteer2_prompt(row: RawRow) -> list[Message]:
    """A prompt in which earlier turns are marked; it may end with the mark of the answer."""
    first, *rest = MARKED_TURN.split(text(row, "prompt").removesuffix("<extra_id_1>Assistant\n"))
    turns = [user(first)]
    for who, said in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": who.lower(), "content": text({"content": said}, "content", "a turn of `prompt`")})
    return checked_prompt(turns, "prompt")


def helpsteer2_answer(row: RawRow) -> Parsed:
    return Parsed(helpsteer2_prompt(row), [text(row, "response")])


def helpsteer2_pair(row: RawRow) -> Parsed:
    strength = number(row, "preference_strength")
    answers = [text(row, column) for column in ("response_1", "response_2")]
    return Parsed(helpsteer2_prompt(row), answers, [-strength, strength])


def ultrafeedback(score: str, row: RawRow) -> Parsed:
    """Four answers, each rated in four aspects; one whose rating is not a number (N/A) has no score."""
    asked = [user(text(row, "instruction"))]
    answers, scores = [], []
    for where, completion in objects(row, "completions"):
        rated = ultrafeedback_score(completion, score)
        if rated is not None:
            answers.append(text(completion, "response", where))
            scores.append(rated)
    return Parsed(asked, answers, scores)


def ultrafeedback_score(completion: Mapping[str, Any], score: str) -> float | None:
    if score.endswith("_score"):
        return as_number(completion.get(score))
    ratings = part(completion, "annotations")
    aspects = ULTRAFEEDBACK_ASPECTS if score == "mean" else (score,)
    rated = [as_number(part(ratings, aspect).get("Rating")) for aspect in aspects]
    known = [rating for rating in rated if rating is not None]
    return sum(known) / len(known) if known else None


def as_number(value: object) -> float | None:
    """UltraFeedback writes its ratings as text, `4` or `N/A`."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def nectar(row: RawRow) -> Parsed:
    """Seven answers by rank, 1 the best. An answer that goes on with turns of its own is not an answer."""
    asked, answers, scores = prompt(row, "prompt"), [], []
    for where, item in objects(row, "answers"):
        said = text(item, "answer", where)
        if TRANSCRIPT.search(said):
            raise RowFault("turns in an answer", f"{where} has turns of its own (`Human:` or `Assistant:`)")
        answers.append(said)
        scores.append(-number(item, "rank", where))
    return Parsed(asked, answers, scores)


def tldr_prompt(info: Mapping[str, Any]) -> list[Message]:
    """A post of Reddit, or an article; the summary follows."""
    if optional_text(info, "article"):
        title = optional_text(info, "title")
        lines = [*([f"TITLE: {title}"] if title else []), text(info, "article")]
    else:
        named = {"SUBREDDIT: r/": "subreddit", "TITLE: ": "title", "POST: ": "post"}
        lines = [f"{name}{text(info, column)}" for name, column in named.items()]
    return [user("\n\n".join([*lines, "TL;DR:"]))]


def tldr_comparison(row: RawRow) -> Parsed:
    summaries = [text(item, "text", where) for where, item in objects(row, "summaries")]
    if len(summaries) != 2:
        raise RowFault("wrong type", f"`summaries` has {len(summaries)} items; wanted 2")
    better = choice(row, "choice", (0, 1))
    return Parsed(tldr_prompt(part(row, "info")), [summaries[better], summaries[1 - better]])


def tldr_summary(row: RawRow) -> Parsed:
    return Parsed(tldr_prompt(row), [text(row, "summary")])


def is_objects(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


HELPSTEER2 = ("prompt", "response", *HELPSTEER_SCORES)
OASST = ("message_id", "parent_id", "message_tree_id", "role", "text")
OASST_MORE = ("rank", "deleted", "tree_state")

PUBLIC = (
    Shape(
        Role.DEMONSTRATIONS,
        ("instruction", "response"),
        alpaca_and("response", extra=("input", "context")),
        ("context", "input", "system", "history"),
        data_set="Dolly",
    ),
    Shape(Role.DEMONSTRATIONS, ("subreddit", "title", "post", "summary"), tldr_summary, (), data_set="TL;DR summaries"),
    Shape(Role.DEMONSTRATIONS, OASST, Grouped(checked_message, best_thread), OASST_MORE, data_set="OpenAssistant"),
    Shape(Role.DEMONSTRATIONS, HELPSTEER2, helpsteer2_answer, (), data_set="HelpSteer2"),
    Shape(Role.PREFERENCES, OASST, Grouped(checked_message, ranked_answers), OASST_MORE, data_set="OpenAssistant"),
    *(
        Shape(
            Role.PREFERENCES,
            HELPSTEER2,
            scored(helpsteer2_answer, partial(number, column=score)),
            (),
            score=score,
            data_set="HelpSteer2",
        )
        for score in HELPSTEER_SCORES
    ),
    Shape(
        Role.PREFERENCES,
        ("prompt", "response_1", "response_2", "preference_strength"),
        helpsteer2_pair,
        (),
        data_set="HelpSteer2 preference",
    ),
    Shape(
        Role.PREFERENCES,
        ("context", "response1", "response2", "overall_preference"),
        compared(("response1", "response2"), partial(number, column="overall_preference"), "context"),
        data_set="HelpSteer3",
    ),
    Shape(
        Role.PREFERENCES,
        ("history", "human_ref_A", "human_ref_B", "labels"),
        shp,
        ("score_ratio",),
        data_set="SHP",
        pairs_per_prompt=5,
    ),
    *(
        Shape(
            Role.PREFERENCES,
            ("prompt", "response_0", "response_1", column),
            compared(("response_0", "response_1"), partial(which, column), "prompt"),
            score=score,
            data_set="PKU-SafeRLHF",
        )
        for score, column in PKU_SCORES.items()
    ),
    *(
        Shape(
            Role.PREFERENCES,
            ("instruction", "completions"),
            partial(ultrafeedback, score),
            ("system",),
            {"completions": is_objects},
            score,
            "UltraFeedback",
        )
        for score in ULTRAFEEDBACK_SCORES
    ),
    Shape(
        Role.PREFERENCES, ("question", *PAIR), prompt_and(*PAIR, asked="question"), SCORED_PAIR, data_set="Orca pairs"
    ),
    Shape(
        Role.PREFERENCES,
        ("input", *PAIR),
        prompt_and(*PAIR, asked="input"),
        SCORED_PAIR,
        data_set="distilabel Orca pairs",
    ),
    Shape(Role.PREFERENCES, ("prompt", "answers"), nectar, telling={"answers": is_objects}, data_set="Nectar"),
    Shape(
        Role.PREFERENCES,
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        webgpt,
        (),
        data_set="WebGPT comparisons",
    ),
    Shape(Role.PREFERENCES, ("info", "summaries", "choice"), tldr_comparison, (), data_set="TL;DR comparisons"),
)
SHAPES = (*GENERAL, *PUBLIC)

# Kinds of rows that each role can be had from; the first kind that a file holds is taken.
SERVED_BY: Mapping[Role, tuple[Role, ...]] = {
    Role.CORPUS: (Role.CORPUS, Role.DEMONSTRATIONS, Role.PREFERENCES, Role.JUDGEMENTS, Role.PROMPTS),
    Role.DEMONSTRATIONS: (Role.DEMONSTRATIONS,),
    Role.PREFERENCES: (Role.PREFERENCES,),
    Role.JUDGEMENTS: (Role.JUDGEMENTS, Role.PREFERENCES),
    Role.PROMPTS: (Role.PREFERENCES, Role.JUDGEMENTS, Role.DEMONSTRATIONS, Role.PROMPTS),
}
