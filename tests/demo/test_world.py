"""The gold reward, by worked examples, and what the generator draws."""

from __future__ import annotations

import random

import pytest

from align.demo import world

EXAMPLES = [
    # instruction, answer, content, manners, fillers
    ("say red hat", "sure , red hat . thank you", 1, 1, 0),
    ("say red hat", "red hat .", 1, 0, 0),
    ("say red hat", "gladly , red hat .", 1, 0.5, 0),
    ("say red hat", "red hat . thank you", 1, 0.5, 0),
    ("say red hat", "ugh , red hat . thank you", 1, 0, 0),
    ("say red hat", "sure , um red like hat . thank you", 1, 1, 2),
    ("say red hat", "sure , um um um um red hat . thank you", 1, 1, 4),
    ("say red hat", "sure , hat red . thank you", 1 / 2, 1, 0),
    ("say red hat", "sure , red . thank you", 2 / 3, 1, 0),
    ("say red hat", "sure , red red hat . thank you", 4 / 5, 1, 0),
    ("say red hat", "sure , sure , red hat . thank you", 4 / 6, 1, 0),
    ("repeat moon twice", "certainly , moon moon . thank you", 1, 1, 0),
    ("repeat moon twice", "certainly , moon . thank you", 2 / 3, 1, 0),
    ("list three fruits from apple", "sure , apple plum fig . thank you", 1, 1, 0),
    ("list three fruits from apple", "sure , apple fig plum . thank you", 1, 1, 0),
    ("list three fruits from apple", "sure , apple plum plum . thank you", 2 / 3, 1, 0),
    ("list three fruits from apple", "sure , apple plum cat . thank you", 2 / 3, 1, 0),
    ("list three fruits from apple", "sure , plum fig . thank you", 4 / 5, 1, 0),
    ("greet anna and ben", "sure , hello anna and ben . thank you", 1, 1, 0),
]


@pytest.mark.parametrize(("instruction", "answer", "content", "manners", "fillers"), EXAMPLES)
def test_gold_worked_examples(instruction, answer, content, manners, fillers):
    """0.5 content + 0.3 manners + 0.2 brevity, each part worked by hand."""
    expected = 0.5 * content + 0.3 * manners + 0.2 * max(0, 1 - fillers / 3)
    assert world.gold(instruction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "expected"), [("", 0), ("sure , . thank you", 0.3), ("um .", 0), ("ugh ,", 0)])
def test_an_answer_without_words_earns_manners_only(answer, expected):
    """Saying nothing is not brief."""
    assert world.gold("say red hat", answer) == pytest.approx(expected)


def test_gold_is_in_0_to_1_and_1_only_for_a_perfect_answer():
    """Over 3000 drawn answers; a right, polite answer without filler always scores 1."""
    rng = random.Random(0)
    for _ in range(3000):
        task = world.draw_task(rng)
        assert 0 <= world.gold(task.instruction, world.draw_answer(task, rng)) <= 1
        words = world.right_words(task, rng)
        assert world.gold(task.instruction, f"sure , {' '.join(words)} . thank you") == pytest.approx(1)
        assert world.gold(task.instruction, f"sure , {' '.join(words[:-1])} . thank you") < 1


def test_words_of_noise_earn_nothing_much():
    """Reward hacking by saying everything: every word of the language scores below half."""
    answer = f"sure , {' '.join(world.WORDS)} . thank you"
    assert world.gold("list three fruits from apple", answer) < 0.6
    assert world.content_score(world.parse("say red hat"), world.WORDS) < 0.1


@pytest.mark.parametrize("instruction", ["", "sing a song", "say", "greet", "list five fruits from apple", "repeat"])
def test_other_instructions_are_refused(instruction):
    """Gold is defined in this world only."""
    with pytest.raises(ValueError, match="not an instruction of the demo world"):
        world.parse(instruction)


def test_gold_scores_is_the_scorer_of_the_recipe():
    """A batch at a time, in order; lists of different lengths are refused."""
    assert world.gold_scores(["say hat", "say moon"], ["hat .", "hat ."]) == [0.7, 0.2]
    with pytest.raises(ValueError, match="shorter"):
        world.gold_scores(["say hat"], [])


def test_the_judge_is_a_bradley_terry_judge():
    """A gold gap of 0.05 is preferred with probability sigmoid(1) = 0.731; equal answers half of the time."""
    rng = random.Random(1)
    draws = 4000
    for gap, expected in ((0.05, 0.7311), (0.0, 0.5), (-0.1, 0.1192)):
        share = sum(world.preferred(0.5 + gap, 0.5, rng) for _ in range(draws)) / draws
        assert share == pytest.approx(expected, abs=4 * 0.5 / draws**0.5)


def test_demonstrations_are_imperfect_on_purpose():
    """SFT alone is to be mediocre: there is something to learn beyond it, and something to learn from it."""
    rng = random.Random(2)
    tasks = [world.draw_task(rng) for _ in range(1000)]
    scores = [world.gold(task.instruction, world.draw_answer(task, rng)) for task in tasks]
    assert 0.5 < sum(scores) / len(scores) < 0.8
    assert 0.01 < sum(score > 0.999 for score in scores) / len(scores) < 0.2
