"""Every alarm is raised by its planted fault, alone, and by nothing healthy."""

import json
from dataclasses import asdict

import pytest

from align.errors import NumericError
from stages.ppo.alarms import RULES, History, check, check_same_policy, check_starts_at_reference

HEALTHY = {
    "objective/kl": 2.0,
    "objective/kl_se": 0.1,
    "objective/kl_k3": 2.1,
    "objective/kl_gap_se": 0.1,
    "objective/scores": 1.0,
    "policy/approxkl_avg": 0.01,
    "policy/clipfrac_avg": 0.1,
    "policy/entropy_avg": 1.5,
    "policy/grad_norm": 0.7,
    "loss/policy_avg": -0.02,
    "loss/value_avg": 0.1,
    "val/grad_norm": 2.0,
    "val/explained_variance": 0.6,
    "val/eos_rate": 0.95,
    "val/response_length": 40.0,
    "val/score_length_corr": 0.2,
    "val/return_var": 0.9,
    "val/cut_rank": 0.1,
    "reward/disagreement": 0.2,
    "samples/distinct_2": 0.5,
    "samples/mismatch_kl": 1e-6,
}
FACTS = {"max_response_tokens": 100.0, "max_training_score": 4.0, "clip_value": 0.2}
FIRST = {
    "policy/entropy_avg": 2.0,
    "objective/scores": 0.0,
    "reward/disagreement": 0.15,
    "samples/distinct_2": 0.6,
    "val/score_length_corr": 0.1,
    "val/response_length": 38.0,
}
NAN, INF = float("nan"), float("inf")

FAULTS = [
    ("not_finite", {"loss/value_avg": INF}, "value loss is inf"),
    ("negative_kl", {"objective/kl": -0.31, "objective/kl_k3": -0.31}, "not sampled from the policy"),
    ("kl_estimators_differ", {"objective/kl_k3": 2.31}, "2.31"),
    ("few_responses_end", {"val/eos_rate": 0.49}, "only 49% of responses end"),
    ("length_at_cap", {"val/response_length": 95.0}, "the cap is 100"),
    ("score_follows_length", {"val/score_length_corr": 0.51}, "correlate by 0.51"),
    (
        "score_beyond_training",
        {"objective/scores": 4.1},
        "every score of the reward model's training data (4)",
    ),
    ("critic_explains_nothing", {"val/explained_variance": -0.01}, "worse than a constant"),
    ("clips_too_much", {"policy/clipfrac_avg": 0.31}, "31% of tokens"),
    ("steps_too_large", {"policy/approxkl_avg": 0.11}, "lower optim.lr"),
    ("entropy_collapse", {"policy/entropy_avg": 0.19}, "was 2 at the start"),
    ("diversity_falls", {"samples/distinct_2": 0.29}, "at first it was 60%"),
    ("ensemble_disagrees", {"reward/disagreement": 0.31}, "differ by 0.31 on the responses, at first by 0.15"),
    ("cutting_pays", {"val/cut_rank": 0.51, "val/eos_rate": 0.94}, "better than 51% of those that end"),
    ("value_clip_lags", {"val/return_var": 1.01}, "five times clip.value 0.2"),
    ("engine_differs", {"samples/mismatch_kl": 0.011}, "a KL of 0.011 per token"),
]


def watch(rollouts, history=None):
    """The names of the alarms of each rollout, the last one's alarms, and the history."""
    history, names, alarms = history or History(first=FIRST), [], []
    for metrics in rollouts:
        alarms, history = check(metrics, history, FACTS)
        names.append([alarm.name for alarm in alarms])
    return names, alarms, history


def test_a_healthy_run_is_silent():
    assert watch([HEALTHY] * 30)[0] == [[]] * 30


def test_every_rule_has_a_planted_fault():
    assert [rule.name for rule in RULES] == [name for name, _, _ in FAULTS]


@pytest.mark.parametrize(
    ("rule", "fault", "phrase"), [(rule, *fault[1:]) for rule, fault in zip(RULES, FAULTS, strict=True)]
)
def test_planted_fault(rule, fault, phrase):
    """After `patience` rollouts in a row the alarm is given once, with the numbers and a cause."""
    faulty = HEALTHY | fault
    names, alarms, _ = watch([faulty] * rule.patience)
    assert names == [[]] * (rule.patience - 1) + [[rule.name]]
    assert phrase in alarms[0].message
    assert alarms[0].fatal == (rule.name == "not_finite")
    assert watch([faulty] * (rule.patience + 3))[0][rule.patience :] == [[]] * 3
    if rule.patience > 1:
        interrupted = [faulty] * (rule.patience - 1) + [HEALTHY] + [faulty] * (rule.patience - 1)
        assert not any(watch(interrupted)[0])


def test_an_alarm_returns_when_the_fault_does():
    faulty = HEALTHY | {"val/eos_rate": 0.1}
    assert watch([faulty, faulty, HEALTHY, faulty])[0] == [
        ["few_responses_end"],
        [],
        [],
        ["few_responses_end"],
    ]


def test_absent_and_undefined_metrics_raise_nothing():
    """A rollout that trains only the critic has no policy metrics; a correlation of constants is NaN."""
    metrics = {"val/score_length_corr": NAN, "val/explained_variance": NAN}
    metrics |= {"objective/kl": 0.0, "objective/kl_se": 0.0}
    assert check(metrics, History(), FACTS)[0] == []


def test_what_is_compared_is_remembered_from_the_first_rollout_that_measured_it():
    """A NaN, such as the correlation of constants, is not a first value."""
    alarms, history = check({"policy/entropy_avg": 3.0, "val/score_length_corr": NAN}, History(), FACTS)
    assert (alarms, history.first) == ([], {"policy/entropy_avg": 3.0})
    alarms, history = check({"policy/entropy_avg": 0.29, "val/score_length_corr": 0.7}, history, FACTS)
    assert [alarm.name for alarm in alarms] == ["entropy_collapse"]
    assert history.first == {"policy/entropy_avg": 3.0, "val/score_length_corr": 0.7}


@pytest.mark.parametrize(
    ("correlation", "length", "raised"),
    [(0.65, 45.0, []), (0.75, 38.0, ["score_follows_length"]), (0.65, 48.0, ["score_follows_length"])],
)
def test_a_correlation_that_was_there_from_the_start_matters_once_it_is_followed(correlation, length, raised):
    """At first .6 at a mean of 38 tokens. No alarm while neither has risen: by .1 the one, by a quarter, to 47.5, the
    other. A reward that pays for length from the start cannot correlate more; it shows in the lengths."""
    history = History(first=FIRST | {"val/score_length_corr": 0.6})
    metrics = HEALTHY | {"val/score_length_corr": correlation, "val/response_length": length}
    assert watch([metrics] * 3, history)[0] == [[], [], raised]


def test_disagreement_without_a_rising_score_is_no_alarm():
    metrics = {"reward/disagreement": 1.0, "objective/scores": -0.5}
    assert watch([metrics] * 3)[0] == [[]] * 3


def test_history_survives_a_checkpoint():
    faulty = HEALTHY | {"val/explained_variance": -1.0}
    _, _, history = watch([faulty] * 19)
    restored = History(**json.loads(json.dumps(asdict(history))))
    assert watch([faulty], restored)[0] == [["critic_explains_nothing"]]


@pytest.mark.parametrize("check_exact", [check_same_policy, check_starts_at_reference])
def test_exactness_of_the_first_minibatch(check_exact):
    """R1 and R2: rounding passes, a difference or a NaN stops the run."""
    check_exact(1e-6, tolerance=1e-4)
    for wrong in (1e-3, NAN, INF):
        with pytest.raises(NumericError, match="differ"):
            check_exact(wrong, tolerance=1e-4)
