"""Settings of data: which files, and how their rows are read."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from align.recipe.settings import REQUIRED, Settings, refuse, shorthand


class Role(StrEnum):
    """What a stage reads its data file as."""

    CORPUS = "corpus"
    DEMONSTRATIONS = "demonstrations"
    PREFERENCES = "preferences"
    JUDGEMENTS = "judgements"
    PROMPTS = "prompts"


PairRule = Literal["extremes", "best", "all"]
"""Which pairs are made of scored answers: align.data.pairs."""

DATA_PLACES = frozenset({"path", "held_out_path", "decontaminate"})
"""Settings of data that say where files lie."""


class ReadSettings(Settings):
    """Files, and how their rows are read."""

    path: str | list[str] | None = None
    """A .jsonl, .json, .csv, .parquet or .arrow file (the first three also .gz or .zst), a folder, a pattern such as
    `parts/*.jsonl`, a data set of the hub such as `org/name@<commit>`, or a list of them. Relative to the recipe's
    folder. Required, unless there is a `mixture`."""

    files: str | None = None
    """Which files of a folder or of a data set of the hub: a name, a folder inside it or a pattern with `*`. None: all
    its data files, if they are not of several splits."""

    columns: dict[str, str] = {}
    """Mapping for private files, `{our name: their column}`. Our names are the columns of the shapes in docs/data.md,
    and `messages.role` and `messages.content` for the keys of a message. A dot goes into an object: `question.text`.
    Empty: the shape is detected from the columns."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """Mapping for the roles of a private file's messages, `{their role: our role}`."""

    implicit_prompt: bool = False
    """Pairs of texts, `chosen` and `rejected`, that both begin with their prompt: it is what they have in common, up to
    the last white space. false: such a file is refused, because where its prompts end is a guess. Messages and
    transcripts say it themselves."""

    score: str | None = None
    """Which score decides, in files with several: UltraFeedback, HelpSteer2, PKU-SafeRLHF. None: the first in
    docs/data.md."""

    pairs: PairRule = "extremes"
    """Which pairs are made of answers with scores or ranks. extremes: the best against the worst. best: the best
    against each other one. all: every two. Pairs with equal scores are left out and counted."""

    pairs_per_prompt: PositiveInt | None = None
    """At most so many pairs of a prompt, the first ones; the others are left out and counted. None: 5 for SHP, as its
    authors advise, and all for other data."""

    score_ratio: Annotated[float, Field(ge=1)] = 2.0
    """Of SHP, pairs whose `score_ratio` is below this are left out and counted, as its authors advise; 1 keeps all."""

    system: str | None = None
    """System message put before every prompt that has none."""


class SourceSettings(ReadSettings):
    """One part of a mixture."""

    weight: PositiveFloat | None = None
    """Its share of the mixture, in relation to the weights of the others. All parts have a weight, or none has."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of its rows that are used, chosen by their prompts. Not together with weights."""

    @model_validator(mode="after")
    def _has_path(self) -> SourceSettings:
        refuse({} if self.path is not None else {"path": REQUIRED})
        return self


class DataSettings(ReadSettings):
    """Where rows come from and how they are read."""

    mixture: dict[str, Annotated[SourceSettings, shorthand("path")]] = {}
    """Several sources instead of `path`, `{name: {path: ..., weight: 2}}`, each with its own columns. With weights: as
    many rows as there are in these proportions without repeating one. Without: all, or the `fraction` of each."""

    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of prompts kept out of training for the final metrics. The split is by prompt, so no prompt is on
    both sides, and depends only on the prompt's text: stages that share prompts share the split."""

    held_out_path: str | list[str] | None = None
    """A separate file of held-out rows, read like `path`; `held_out` is then ignored."""

    decontaminate: str | list[str] | None = None
    """Evaluation sets, named like `path`. Rows whose prompt is in one, or shares 13 words in a row with one there, are
    left out and counted."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: prompts are rendered with the model's chat template. plain: prompt text followed directly by the
    response. auto: chat if the model has a chat template, else plain."""

    max_rows: PositiveInt | None = None
    """Use only the first rows of the files (after checking them). Those of a mixture have its proportions too."""

    on_bad: Literal["error", "skip"] = "error"
    """What to do with a malformed row: stop and name it, or leave it out, count it and write it to
    rejected.jsonl."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if not self.mixture:
            refuse({} if self.path is not None else {"path": REQUIRED})
            return self
        problems = {} if self.path is None else {"path": "with `mixture`, the files are named inside it"}
        problems |= {
            name: "with `mixture`, this is set in each of its parts"
            for name, field in ReadSettings.model_fields.items()
            if name != "path" and getattr(self, name) != field.default and self.held_out_path is None
        }
        weighted = [name for name, part in self.mixture.items() if part.weight is not None]
        for name, part in self.mixture.items():
            if weighted and part.weight is None:
                problems[f"mixture.{name}"] = f"has no `weight`, and {weighted[0]} has one"
            elif weighted and part.fraction != 1:
                problems[f"mixture.{name}.fraction"] = "the weights say how many rows are used; remove one of them"
        refuse(problems)
        return self

    def parts(self) -> dict[str, SourceSettings]:
        """The sources by name; a path alone is one source without a name."""
        if self.mixture:
            return self.mixture
        return {"": SourceSettings(**{name: getattr(self, name) for name in ReadSettings.model_fields})}


Data = Annotated[DataSettings, shorthand("path")]
