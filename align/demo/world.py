"""A tiny world in which success can be measured: instructions, answers of known quality, and the gold reward.

An instruction asks for words ("list three fruits", "say red hat", "repeat moon twice", "greet anna"). A good answer is
polite, has exactly the words asked for in the right order, and no filler:

    sure , apple plum fig . thank you

The gold reward of an answer is between 0 and 1:

    gold = 0.5 * content + 0.3 * manners + 0.2 * brevity

content is the share of the asked words that are right (an F1 over an order-preserving match), manners is half for a
polite opening and half for a thank-you, and is 0 for a rude opening; brevity loses a third for each filler word.
Demonstrations are imperfect on purpose; preferences are drawn from the gold reward with noise (Bradley-Terry).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

CATEGORIES = {
    "animals": ("cat", "dog", "hen", "fox", "owl", "cow", "bee", "pig"),
    "fruits": ("apple", "plum", "fig", "pear", "lime", "kiwi", "grape", "peach"),
    "colors": ("red", "blue", "green", "pink", "gray", "gold", "black", "white"),
    "tools": ("saw", "nail", "drill", "rope", "file", "clamp", "brush", "wrench"),
}
THINGS = ("moon", "hat", "lamp", "tree", "boat", "door", "rock", "cup", "star", "coin", "leaf", "bell")
NAMES = (
    "anna",
    "ben",
    "cora",
    "dan",
    "ella",
    "finn",
    "gwen",
    "hugo",
    "iris",
    "jack",
    "kate",
    "liam",
    "mona",
    "nick",
)
NUMBERS = {"three": 3, "four": 4}
TIMES = {"twice": 2, "thrice": 3}
POLITE = ("sure ,", "gladly ,", "certainly ,")
RUDE = ("ugh ,", "whatever ,", "again ?")
THANKS = ". thank you"
FILLERS = ("um", "like", "well")
WORDS = THINGS + tuple(word for words in CATEGORIES.values() for word in words)

CONTENT, MANNERS, BREVITY = 0.5, 0.3, 0.2
FLUSTER = 0.6
"""Chance that a demonstration has something wrong with each of its parts."""
PREFERENCE_NOISE = 0.05
"""Scale of the Bradley-Terry noise: a gold gap of 0.05 is preferred with probability sigmoid(1) = 0.73."""


@dataclass(frozen=True)
class Task:
    """An instruction and what a right answer contains. `choices` empty: exactly `wanted`, in order; else any
    `count` different words of `choices`."""

    instruction: str
    wanted: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    count: int = 0


def draw_task(rng: random.Random) -> Task:
    """One instruction; every family is equally likely."""
    family = rng.choice(("list", "say", "repeat", "greet"))
    if family == "list":
        category, number = rng.choice(sorted(CATEGORIES)), rng.choice(sorted(NUMBERS))
        given = rng.sample(CATEGORIES[category], rng.choice((1, 2)))
        return parse(f"list {number} {category} from {' '.join(given)}")
    if family == "say":
        return parse("say " + " ".join(rng.sample(WORDS, rng.choice((2, 3)))))
    if family == "repeat":
        return parse(f"repeat {' '.join(rng.sample(WORDS, rng.choice((1, 2))))} {rng.choice(sorted(TIMES))}")
    return parse(f"greet {' and '.join(rng.sample(NAMES, rng.choice((2, 3))))}")


def parse(instruction: str) -> Task:
    """The task an instruction states. Raises ValueError when it is not of this world."""
    match instruction.split():
        case ["list", number, category, "from", *given] if number in NUMBERS and given and category in CATEGORIES:
            others = tuple(word for word in CATEGORIES[category] if word not in given)
            return Task(instruction, wanted=tuple(given), choices=others, count=NUMBERS[number] - len(given))
        case ["say", *words] if words:
            return Task(instruction, wanted=tuple(words))
        case ["repeat", *words, times] if words and times in TIMES:
            return Task(instruction, wanted=tuple(words) * TIMES[times])
        case ["greet", *names] if names:
            return Task(instruction, wanted=("hello", *names))
    raise ValueError(f"not an instruction of the demo world: {instruction!r}")


def right_words(task: Task, rng: random.Random) -> list[str]:
    """The words of one right answer."""
    return [*task.wanted, *rng.sample(task.choices, task.count)]


def draw_answer(task: Task, rng: random.Random) -> str:
    """An answer as the demonstrators give them: each part may be wrong."""
    words = right_words(task, rng)
    if rng.random() < FLUSTER:
        spot = rng.randrange(len(words))
        slip = rng.choice(("drop", "swap", "double"))
        if slip == "drop" and len(words) > 1:
            del words[spot]
        elif slip == "swap":
            words[spot] = rng.choice(WORDS)
        else:
            words.insert(spot, words[spot])
    if rng.random() < FLUSTER:
        for _ in range(rng.choice((1, 2))):
            words.insert(rng.randrange(len(words) + 1), rng.choice(FILLERS))
    opening = rng.choice(POLITE) if rng.random() >= FLUSTER else rng.choice(("", *RUDE))
    closing = THANKS if rng.random() >= FLUSTER else "."
    return " ".join(part for part in (opening, " ".join(words), closing) if part)


def gold(instruction: str, answer: str) -> float:
    """The gold reward of an answer, in 0..1. See the module's docstring."""
    task = parse(instruction)
    polite = any(answer.startswith(opening) for opening in POLITE)
    rude = any(answer.startswith(opening) for opening in RUDE)
    thankful = answer.endswith(THANKS)
    manners = 0.0 if rude else 0.5 * polite + 0.5 * thankful
    body = answer
    for opening in POLITE + RUDE:
        body = body.removeprefix(opening)
    words = body.removesuffix(THANKS).removesuffix(".").split()
    fillers = sum(word in FILLERS for word in words)
    words = [word for word in words if word not in FILLERS]
    return CONTENT * content_score(task, words) + MANNERS * manners + BREVITY * max(0.0, 1 - fillers / 3) * bool(words)


def content_score(task: Task, words: Sequence[str]) -> float:
    """F1 of the words given against the words asked for. 1 only for exactly the right words."""
    wanted = list(task.wanted)
    total = len(wanted) + task.count
    matched = sum(
        block.size for block in SequenceMatcher(None, wanted, list(words), autojunk=False).get_matching_blocks()
    )
    if task.count:
        matched += min(task.count, len(set(words) & set(task.choices)))
    return 2 * matched / (total + len(words)) if words else 0.0


def gold_scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Gold rewards of a batch: the scorer that configs/demo.yaml names."""
    return [gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def preferred(first: float, second: float, rng: random.Random) -> bool:
    """Whether the noisy judge prefers the first of two answers, given their gold rewards."""
    return rng.random() < 1 / (1 + math.exp(-(first - second) / PREFERENCE_NOISE))
