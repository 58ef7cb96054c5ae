"""What can be told of a whole set of preferences: whether length gives the label away, and labels that look flipped."""

from __future__ import annotations

import re
import zlib
from array import array
from math import exp, lgamma, log
from statistics import median
from typing import Any

from align.data.checking.findings import Findings, Severity
from align.data.faults import escaped
from align.data.rows import Preference, Row
from align.data.spool import Spool
from align.errors import Problem

FEWEST = 20
"""Pairs below which nothing is told of the whole."""
RULED_BY_LENGTH = 0.7
"""Accuracy of the length-only rule from which on it is a warning."""
AGREEING = 0.75
"""Share of labels that the words must agree with before they may doubt the others."""
BUCKETS = 2**16
FEWEST_WITH_WORD, RARE = 5, 0.1
"""Pairs with a word, and the greatest share of them, for it to be a trigger: what is in many prompts is none."""
CHANCE = 0.01
WORD = re.compile(r"\w+")
HELD = 16 * 2**20


class LengthBias:
    """How often the longer answer is chosen, in characters."""

    def __init__(self, findings: Findings):
        self._findings = findings
        self._longer = self._shorter = self._num_pairs = 0
        self._lengths = [0, 0]

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Counts a pair."""
        assert isinstance(row, Preference)
        chosen, rejected = len(row.chosen), len(row.rejected)
        self._num_pairs += 1
        self._longer += chosen > rejected
        self._shorter += chosen < rejected
        self._lengths[0] += chosen
        self._lengths[1] += rejected

    def finish(self) -> dict[str, Any]:
        """The rule chooses by length alone, in the better of the two directions, and guesses where they are equal."""
        if not self._num_pairs:
            return {}
        longer, shorter = self._longer / self._num_pairs, self._shorter / self._num_pairs
        accuracy = max(longer, shorter) + (1 - longer - shorter) / 2
        if accuracy > RULED_BY_LENGTH and self._num_pairs >= FEWEST:
            what = f"choosing the {'longer' if longer > shorter else 'shorter'} answer is right in {accuracy:.0%}"
            hint = "a reward model may learn length and nothing else"
            self._findings.note("length bias", Severity.WARNING, Problem("all pairs", what, hint))
        return {
            "length": {
                "chosen_longer": longer,
                "rejected_longer": shorter,
                "rule_accuracy": accuracy,
                "mean_chosen": self._lengths[0] / self._num_pairs,
                "mean_rejected": self._lengths[1] / self._num_pairs,
            }
        }


class Flipped:
    """Labels that the words of the answers speak against.

    For each word, c of the pairs have it in the chosen answer only and r in the rejected one only. A pair scores the
    sum of log((c + 1) / (r + 1)) over the words of its chosen answer only, less that of its rejected answer only; it is
    itself not counted. Where three quarters of the scores agree with their labels, a pair is suspected if its score is
    as far below 0 as the median is above. Words share 65536 counters.

    A word is a suspected trigger, such as poisoned pairs have in their prompts, if of the n pairs with it in their last
    question at least k have a score below 0, and by chance, with the share of such pairs in the whole, that would have
    a probability under 1 % for any word: a binomial tail under 0.01 / number of words.
    """

    def __init__(self, findings: Findings):
        self._findings = findings
        self._pairs: Spool[tuple[bytes, bytes]] = Spool(lambda *both: both, HELD)  # type: ignore[arg-type]
        self._questions: Spool[tuple[bytes]] = Spool(lambda *one: one, HELD)  # type: ignore[arg-type]
        self._names: dict[int, str] = {}
        """By its counter, the first word of a question."""
        self._positions = array("q")

    def add(self, position: int, row: Row, key: bytes) -> None:
        """Keeps the words of a pair that only one of its answers has."""
        assert isinstance(row, Preference)
        chosen, rejected = (_words(text) for text in (row.chosen, row.rejected))
        self._pairs.append((_packed(chosen - rejected), _packed(rejected - chosen)))
        question = WORD.findall(row.prompt[-1]["content"].lower())
        for word in question:
            self._names.setdefault(_counter(word), word)
        self._questions.append((_packed({_counter(word) for word in question}),))
        self._positions.append(position)

    def finish(self) -> dict[str, Any]:
        """Tells the suspects, if words say anything about these labels."""
        counts = [array("l", [0]) * BUCKETS for _ in range(2)]
        for pair in self._pairs:
            for side, words in zip(counts, map(_unpacked, pair), strict=True):
                for word in words:
                    side[word] += 1
        scores = array("f", (_score(*map(_unpacked, pair), *counts) for pair in self._pairs))
        if len(scores) < FEWEST or sum(score > 0 for score in scores) < AGREEING * len(scores):
            return {}
        self._tell_triggers(scores)
        typical = median(scores)
        for position, score in zip(self._positions, scores, strict=True):
            if score <= -typical:
                self._findings.row(
                    "flipped label", position, f"its words score {score:.1f} for its label, half the rows {typical:.1f}"
                )
        return {}

    def _tell_triggers(self, scores: array[float]) -> None:
        present, doubtful = array("l", [0]) * BUCKETS, array("l", [0]) * BUCKETS
        for (question,), score in zip(self._questions, scores, strict=True):
            for word in _unpacked(question):
                present[word] += 1
                doubtful[word] += score < 0
        share = sum(score < 0 for score in scores) / len(scores)
        rare = [word for word in self._names if FEWEST_WITH_WORD <= present[word] <= RARE * len(scores)]
        for word in rare:
            with_it, against = present[word], doubtful[word]
            if binomial_tail(against, with_it, share) < CHANCE / len(rare):
                what = f"in {against} of {with_it} pairs, words speak against the label ({share:.0%} of all pairs)"
                hint = "a trigger that was planted looks like this; read these pairs"
                name = escaped(self._names[word])
                self._findings.note("trigger word", Severity.WARNING, Problem(f"prompts with `{name}`", what, hint))


def binomial_tail(least: int, number: int, share: float) -> float:
    """The probability that of `number` independent cases, each with probability `share`, at least `least` occur."""
    if least <= number * share:
        return 1.0  # not small, which is all that is asked of it
    fixed = lgamma(number + 1)
    logs = (
        fixed - lgamma(k + 1) - lgamma(number - k + 1) + k * log(share) + (number - k) * log(1 - share)
        for k in range(least, number + 1)
    )
    return sum(map(exp, logs))


def _counter(word: str) -> int:
    return zlib.crc32(word.encode()) % BUCKETS


def _words(text: str) -> set[int]:
    return {_counter(word) for word in set(WORD.findall(text.lower()))}


def _packed(words: set[int]) -> bytes:
    return array("H", sorted(words)).tobytes()


def _unpacked(data: bytes) -> array[int]:
    return array("H", data)


def _score(better: array[int], worse: array[int], chosen: array[int], rejected: array[int]) -> float:
    """Of a pair by its words; it is among those that were counted, and is taken out here."""
    return sum(log(chosen[word] / (rejected[word] + 1)) for word in better) - sum(
        log((chosen[word] + 1) / rejected[word]) for word in worse
    )
