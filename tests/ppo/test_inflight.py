"""Responses in flight: who grows in which round, under which policy, and that learning from them is not biased."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.context import Context
from align.errors import Interrupted, RolloutError
from align.generation.engine import Samples, Sampling
from align.generation.transformers_engine import TransformersEngine
from align.recipe.training_settings import CheckpointSettings, OptimSettings
from align.training.masked import length_mask
from align.training.parity import sampled_logprobs
from stages.ppo.config import Config
from stages.ppo.correction import importance_weights
from stages.ppo.inflight import Batch, Flight, Generate, State
from stages.ppo.losses import kl_loss, policy_loss
from stages.ppo.metrics import Phases
from stages.ppo.rollout import Question, Responses, Rollout
from stages.ppo.settings import ClipSettings, CriticSettings, KLSettings, MissingEosSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo.bandit import CLIP, REF, SCORES, objective_gradient
from tests.ppo.table_model import (
    DEPTH,
    STATES,
    A,
    TableModel,
    World,
    child,
    complete_responses,
    score,
    scores_of_all,
    sequence_logprobs,
)
from tests.ppo.table_run import TableEngine, all_responses
from tests.ppo.table_run import settings as table_settings
from tests.ppo.test_loop import OwnWeights, StopAfter, Wrap, assert_same_run, make_config, make_loop
from tests.ppo.test_planted_faults import Run

STOP = 9
LENGTHS = [1, 5, 2, 9, 3, 2, 4, 1]
"""Of the answer to each question, the stop token included."""


class Script:
    """Answers of known lengths, in parts: token t of the answer to question q is 10 q + t, the last one STOP."""

    def __call__(self, prompts: Sequence[Sequence[int]], tokens: int, name: str) -> Samples:
        rows = []
        for question, *before in prompts:
            whole = [10 * question + t for t in range(LENGTHS[question] - 1)] + [STOP]
            rows.append(whole[len(before) : len(before) + tokens])
        number = int(name.removeprefix("rollout ").split(",")[0])
        logprobs = [[-float(number)] * len(row) for row in rows]
        return Samples.of(rows, logprobs, [row[-1] == STOP for row in rows], pad_id=0)


def new_flight(script: Generate | None = None, capacity: int = 3, **changes: Any) -> Flight:
    """Questions 0, 1, 2 ... in this order; at most six tokens, two in a round."""
    estimator = changes.pop("estimator", "reinforce++")
    rollout = RolloutSettings(**{"prompts": capacity, "max_response_tokens": 6, "round_tokens": 2, **changes})
    config = Config(rollouts=5, rollout=rollout, estimator=estimator, epochs=1)
    questions = [Question([], [number]) for number in range(len(LENGTHS))]
    return Flight(config, questions, config.responses, 0, lambda *places: range(*places), script or Script(), nothing)


def nothing() -> None:
    """Gives nothing up."""


def take(flight: Flight, index: int) -> Batch:
    """A round, once the one before it is settled."""
    flight.settle()
    return flight.collect(index, Phases())


def collected(flight: Flight, rounds: int) -> Iterator[Batch]:
    for index in range(rounds):
        yield take(flight, index)


def learned(flight: Flight, rounds: int) -> list[list[tuple[int, list[int]]]]:
    """For each round: the questions whose answers are learned from, with the versions of their tokens."""
    found = []
    for batch in collected(flight, rounds):
        lengths = batch.samples.lengths.tolist()
        assert batch.versions is not None
        versions = [row[:length] for row, length in zip(batch.versions.tolist(), lengths, strict=True)]
        found.append([(one.ids[0], row) for one, row in zip(batch.questions, versions, strict=True)])
    return found


def test_who_grows_in_which_round():
    """Three places, two tokens a round, six in all. Round 0: 0 and 2 end, 1 goes on. Round 1: 1 goes on, 3 and 4 take
    the free places and go on too. Round 2: 1 ends with its fifth token, 4 with its third. Round 3: 3, which has no end
    among its first nine tokens, is cut at six, and 5 ends."""
    flight = new_flight()
    assert learned(flight, 4) == [
        [(0, [0]), (2, [0, 0])],
        [],
        [(1, [0, 0, 1, 1, 2]), (4, [1, 1, 2])],
        [(3, [1, 1, 2, 2, 3, 3]), (5, [3, 3])],
    ]


def test_a_round_goes_on_until_enough_have_ended():
    """Two tokens at a time until six tenths of three have ended, so two. Round 0: 0 and 2 end at once. Round 1: 1, 3
    and 4 go on; 1 and 4 end with the next two tokens, which are of the same policy. Round 2: 3 is cut at six tokens,
    and 5 ends."""
    flight = new_flight(until_ended=0.6)
    assert learned(flight, 3) == [
        [(0, [0]), (2, [0, 0])],
        [(1, [0, 0, 1, 1, 1]), (4, [1, 1, 1])],
        [(3, [1, 1, 1, 1, 2, 2]), (5, [2, 2])],
    ]


def test_the_parts_of_a_round_are_drawn_apart():
    """The first part has the round's own seed, the others each another."""
    names: list[str] = []
    script = Script()
    list(collected(new_flight(lambda *call: names.append(call[2]) or script(*call), until_ended=0.6), 2))
    assert names == ["rollout 0", "rollout 1", "rollout 1, part 1"]


def test_answers_are_put_together():
    """Tokens, log-probabilities and ends of the parts; a cut answer is not finished."""
    *_, before, last = collected(new_flight(), 4)
    assert before.samples.rows() == [[10, 11, 12, 13, STOP], [40, 41, STOP]]
    assert before.samples.logprobs.tolist() == [[0, 0, -1, -1, -2], [-1, -1, -2, 0, 0]]
    assert last.samples.rows()[0] == [30, 31, 32, 33, 34, 35]
    assert last.samples.finished.tolist() == [False, True]


def test_what_is_reported():
    """Of three that grow one, three, one and one go on; 2, 0, 2 and 2 are learned from."""
    batches = list(collected(new_flight(), 4))
    assert [batch.counts["rollout/carried"] / batch.grown for batch in batches] == pytest.approx(
        [1 / 3, 1, 1 / 3, 1 / 3]
    )
    assert [batch.counts["rollout/learned"] for batch in batches] == [2, 0, 2, 2]
    assert [batch.episodes for batch in batches] == [2, 2, 4, 6]


def test_answers_that_are_compared_wait_for_each_other():
    """Two answers to each of two prompts. The script gives equal prompts equal answers, so one of a pair is shortened
    by hand: it ends in round 0, the other in round 2, and both are learned from then, side by side. Meanwhile one place
    is free, which is none for a pair."""
    flight = new_flight(capacity=2, responses_per_prompt=2, estimator="rloo")
    (batch, *_) = collected(flight, 1)
    assert [one.ids[0] for one in batch.questions] == [0, 0]
    ((one, other),) = flight._rest.groups
    flight._rest = replace(flight._rest, groups=((replace(one, finished=True), other),))
    second, third = (take(flight, index) for index in (1, 2))
    assert [one.ids[0] for one in second.questions] == [2, 2]
    assert [one.ids[0] for one in third.questions] == [1, 1]
    assert third.samples.lengths.tolist() == [2, 5]
    assert third.versions.tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 2]]


def test_answers_that_are_not_compared_do_not_wait():
    """Two answers to each prompt, each learned from by itself; a single free place is given to the first of a pair."""
    flight = new_flight(capacity=2, responses_per_prompt=2)
    (batch, *_) = collected(flight, 1)
    assert [one.ids[0] for one in batch.questions] == [0, 0]
    (one,), other = flight._rest.groups
    flight._rest = replace(flight._rest, groups=((replace(one, finished=True),), other))
    take(flight, 1)
    assert [group[0].question for group in flight._rest.groups] == [1, 3]


def test_what_is_too_old_is_started_anew():
    """With max_staleness 1 a token of round 0 may be there in round 1, and not in round 2: answer 1, which wants three
    rounds, begins again, and is never learned from. Answer 4 of rounds 1 and 2 is."""
    flight = new_flight(max_staleness=1)
    batches = list(collected(flight, 5))
    assert [batch.counts["rollout/restarted"] for batch in batches] == [0, 0, 1, 1, 1]
    assert {one.ids[0] for batch in batches for one in batch.questions}.isdisjoint({1, 3})
    ((one, *_), *_) = flight._rest.groups
    assert (one.question, one.ids, one.versions) == (1, [10, 11], [4, 4])


def test_a_state_survives_json():
    """With everything that is in flight after two rounds; log-probabilities to the last bit."""
    flight = new_flight()
    list(collected(flight, 2))
    flight.settle()
    ((one, *_), *_) = flight.state.groups
    state = replace(flight.state, groups=((replace(one, logprobs=torch.rand(4).tolist()),),), restarted=3)
    assert State.restored(json.loads(json.dumps(asdict(state)))) == state


def test_worked_weights_of_two_policies():
    """Behaviour [-1.5, -.5, -1, -1] against -1: weights e^.5, e^-.5, and 1 where the policy at hand sampled."""
    behaviour, old = torch.tensor([[-1.5, -0.5, -1.0, -1.0]]), torch.full((1, 4), -1.0)
    weights = importance_weights(behaviour, rollout_of(old), "token", 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.648721, 0.606531, 1.0, 1.0]]), rtol=0, atol=1e-6)


def rollout_of(logp_old: Tensor) -> Rollout:
    """Whole rows that are nothing but log-probabilities."""
    rows, width = logp_old.shape
    ids = torch.zeros(rows, width + 1, dtype=torch.long)
    every = torch.ones(rows, dtype=torch.bool)
    responses = Responses(ids, torch.ones_like(ids), torch.full((rows,), width), every, width)
    return Rollout(responses, logp_old[:, 0], every, *[logp_old] * 5, None, None)


BEHAVIOURS = torch.tensor([[0.2, 0.2, 0.6], [0.6, 0.3, 0.1]], dtype=torch.float64).log()
"""Log-probabilities of two older policies of the bandit (2,3)."""


@pytest.mark.parametrize("penalty", ["in the reward", "as a loss"])
@pytest.mark.parametrize("is_corrected", [True, False])
def test_a_bandits_gradient_from_two_older_policies(is_corrected, penalty):
    """Every action of both, weighted by how likely it was drawn (half of the draws from each): with weights the
    expected gradient is that of J under the policy at hand, with the KL as a loss too; without them another one."""
    beta = 0.7
    logits = (REF + torch.tensor([0.3, -0.2, 0.5])).requires_grad_()
    arms = torch.arange(3).repeat(2)
    behaviour, policy = BEHAVIOURS.reshape(-1, 1), logits.log_softmax(-1)[arms][:, None]
    old, ref, drawn = policy.detach(), REF[arms][:, None], behaviour.exp() / 2
    weights = importance_weights(behaviour, rollout_of(old), "token" if is_corrected else "off", 100.0)
    mask = torch.ones_like(old, dtype=torch.bool)
    in_reward = beta if penalty == "in the reward" else 0.0
    rewards = SCORES[arms][:, None] - in_reward * (old - ref)
    loss, _ = policy_loss(policy, old, rewards * weights * drawn, mask, CLIP)
    if penalty == "as a loss":
        loss = loss + beta * kl_loss(policy, old, ref, mask, weights * drawn)
    gap = -torch.autograd.grad(loss, logits)[0] - objective_gradient(logits.detach(), beta)
    assert (float(gap.abs().max()) < 1e-12) is is_corrected


def exact_gradient(world: World, table: Tensor) -> Tensor:
    """Of J by the logits of a table (STATES,3), from the sum over all responses."""
    logits = table.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    logp, logp_ref = sequence_logprobs(policy), sequence_logprobs(world.ref)
    return torch.autograd.grad((logp.exp() * (scores_of_all() - world.beta * (logp - logp_ref))).sum(), logits)[0]


def first_token(state: int) -> int:
    """The first token, numbered from 0, of what leads to a state that is not the root."""
    while state > 3:
        state = (state - 1) // 3
    return state - 1


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_the_gradient_of_responses_that_two_policies_sampled(lam):
    """The first token from an older policy, the rest from the one at hand, all fifteen responses by enumeration,
    through the trainer, with the critic right. In each state the gradient is J's there, times how much more often the
    older policy leads to it; at the root, where all begin, it is J's own. Without weights it is not."""
    world = World.random(0)
    older, policy = (World.random(seed).ref for seed in (1, 2))
    config = table_settings(world, lam=lam, missing_eos=MissingEosSettings(rule="off"))
    actor = TableModel(policy)
    trainer = PPOTrainer(config, actor, TableModel(world.evaluate(policy)), TableModel(world.ref), seed=0)
    rollout = trainer.observe(*all_responses(DEPTH))
    first = torch.tensor([response[0] - A for response in complete_responses()])
    changed = older[0, first] - policy[0, first]
    behaviour = rollout.logp_old.clone()
    behaviour[:, 0] += changed
    drawn = torch.where(rollout.responses.mask, behaviour, 0).sum(1).exp()[:, None]
    visits = torch.ones(STATES, dtype=torch.float64)
    for state in range(1, STATES):
        visits[state] = (older - policy)[0, first_token(state)].exp()
    expected = exact_gradient(world, policy)
    for kind, is_right in (("token", True), ("off", False)):
        weights = importance_weights(behaviour, rollout, kind, 100.0)
        advantages = rollout.advantages * weights * drawn
        logp = actor.table.log_softmax(-1)
        found = taken(logp, rollout)
        loss, _ = policy_loss(found, rollout.logp_old, advantages, rollout.responses.mask, ClipSettings())
        (gradient,) = torch.autograd.grad(-loss, actor.table)
        gap = float((gradient[0] - expected[0]).abs().max())
        assert (gap < 1e-10) is is_right
        if is_right:
            torch.testing.assert_close(gradient, expected * visits[:, None], rtol=0, atol=1e-10)
        else:
            assert gap > 0.01


def taken(logp: Tensor, rollout: Rollout) -> Tensor:
    """(15,DEPTH) of the tokens of all responses, from the log-probabilities of a table."""
    rows = []
    for response in complete_responses():
        state, row = 0, []
        for token in response:
            row.append(logp[state, token - A])
            state = child(state, token)
        rows.append(torch.stack([*row, *[logp.new_zeros(())] * (rollout.responses.width - len(row))]))
    return torch.stack(rows)


@pytest.mark.parametrize("until_ended", [0.0, 0.35])
def test_a_run_on_responses_in_parts_ends_at_the_optimum(until_ended, tmp_path):
    """E2 with carry-over, through the whole loop: a token per round, so that whatever is longer than one token was
    sampled by two or three policies, and every round begins only as many as have ended; or as many tokens as it takes
    until 35% have. It ends within a total variation of 5e-3 of pi*."""
    world = World.random(0)
    rate = OptimSettings(lr=0.05, eps=1e-5)
    ref = world.ref.float()
    run = Run(
        scores=(score, score),
        start=ref,
        reference=ref,
        engine=TableEngine,  # type: ignore[arg-type]
        max_training_score=10.0,
        settings={
            "rollouts": 200,
            "rollout": RolloutSettings(
                prompts=256,
                max_response_tokens=DEPTH,
                round_tokens=1,
                until_ended=until_ended,
                correction_cap=100.0,
            ),
            "epochs": 4,
            "minibatches": 1,
            "whiten_advantages": False,
            "kl": KLSettings(coef=world.beta),
            "missing_eos": MissingEosSettings(rule="off"),
            "clip": ClipSettings(value=None),
            "optim": rate,
            "critic": CriticSettings(optim=rate),
            "checkpoint": CheckpointSettings(every_steps=1000),
            "samples_every": 1000,
        },
    )
    loop = run.loop(tmp_path)
    loop.run()
    ages = [row["rollout/staleness_max"] for row in loop.context.metrics.read()]
    assert max(ages) == 2 and min(ages[2:]) >= 1
    assert world.distance(loop.trainer.actor.log_policy()) < 5e-3  # type: ignore[attr-defined]


def stopping(engine: Wrap, calls: int) -> Wrap:
    """That engine, and during its n-th call the stop signal comes."""
    return lambda inner, context: StopAfter(engine(inner, context), context, calls)


def shared(engine: TransformersEngine, context: Context) -> TransformersEngine:
    """The engine as it is, on the policy's own weights."""
    return engine


CARRIED = {"prompts": 6, "max_response_tokens": 6, "round_tokens": 2}
GROUPS = {**CARRIED, "prompts": 3, "responses_per_prompt": 2}
AHEAD = {"engine": "vllm-server", "overlap": True}
VARIANTS: dict[str, tuple[Wrap, dict[str, Any], dict[str, Any]]] = {
    "carried": (shared, {}, CARRIED),
    "carried, restarted": (shared, {}, {**CARRIED, "max_staleness": 1}),
    "carried in groups": (shared, {"estimator": "rloo"}, GROUPS),
    "carried, an engine apart": (OwnWeights, {}, CARRIED),
    "overlap": (OwnWeights, {}, {"prompts": 6, "max_response_tokens": 6, **AHEAD}),
    "overlap, carried in groups": (OwnWeights, {"estimator": "rloo"}, {**GROUPS, **AHEAD}),
}


def variant_config(variant: str, **changes: Any) -> Config:
    """A correction that is never capped, and as many rollouts as let all that is carried end."""
    _, settings, rollout = VARIANTS[variant]
    known = {"rollouts": 6, "rollout": RolloutSettings(**{"correction_cap": 1e6, **rollout}), **settings}
    return make_config(**{**known, **changes})


@pytest.mark.parametrize("variant", [one for one in VARIANTS if one != "carried, restarted"])
def test_every_token_has_the_log_probability_of_the_policy_that_sampled_it(variant, tiny, tmp_path):
    """A real policy in a real loop. The weights of every round are kept; each token that is learned from has the
    log-probability, one forward of its row alone, of the policy that its version names. Where responses are started
    anew nothing is learned from: this policy hardly ever ends one."""
    wrap, *_ = VARIANTS[variant]
    loop = make_loop(tiny, tmp_path, variant_config(variant), wrap=wrap)
    policies: list[dict[str, Tensor]] = []
    sync, learn = loop.sync, loop.learn
    seen: list[tuple[int, Batch, Tensor]] = []

    def synced() -> None:
        policies.append({name: value.clone() for name, value in loop.trainer.actor.module.state_dict().items()})
        sync()

    def learning(index: int, batch: Batch, *rest: Any) -> Any:
        seen.append((index, batch, batch.samples.logprobs))
        return learn(index, batch, *rest)

    loop.sync, loop.learn = synced, learning  # type: ignore[method-assign]
    loop.run()
    role, ages = loop.trainer.actor, set()
    for number, weights in enumerate(policies):
        role.module.load_state_dict(weights)
        for index, batch, behaviour in seen:
            mask = length_mask(batch.samples.lengths, behaviour.shape[1])
            for row, one in enumerate(batch.questions):
                single = Samples(
                    *(part[[row]] for part in (batch.samples.token_ids, batch.samples.lengths, mask[:, 0]))
                )
                with role.evaluating():
                    own = sampled_logprobs(role, [one.ids], single, loop.sampling("any"))
                of_this = mask[row] & (batch.versions[row] == number)
                ages |= {index - number} if of_this.any() else set()
                torch.testing.assert_close(own[0, of_this], behaviour[row, of_this], rtol=0, atol=2e-5)
    assert max(ages) >= 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("calls", [1, 3])
def test_stopping_and_resuming_changes_nothing(calls, variant, tiny, tmp_path):
    """What is in flight, or sampled ahead, is in the checkpoint: a run that is stopped and goes on in a fresh process
    ends as an uninterrupted one, bit for bit."""
    wrap, *_ = VARIANTS[variant]
    config = variant_config(variant, checkpoint=CheckpointSettings(every_steps=100))
    whole = make_loop(tiny, tmp_path / "whole", config, wrap=wrap)
    whole.run()
    with pytest.raises(Interrupted):
        make_loop(tiny, tmp_path / "parts", config, wrap=stopping(wrap, calls)).run()
    resumed = make_loop(tiny, tmp_path / "parts", config, wrap=wrap)
    resumed.run()
    assert_same_run(resumed, whole)


def test_a_server_that_samples_ahead_is_one_step_behind(tiny, tmp_path):
    """Every rollout but the first learns from the policy before it; the first two are sampled by the same. What was
    waited for is reported, and there is no mismatch to report."""
    loop = make_loop(tiny, tmp_path, variant_config("overlap"), wrap=OwnWeights)
    loop.run()
    rows = loop.context.metrics.read()
    assert (
        [row["rollout/staleness_mean"] for row in rows]
        == [0, 1, 1, 1, 1, 1]
        == [row["rollout/staleness_max"] for row in rows]
    )
    assert ["time/wait" in row for row in rows] == [False] + [True] * 5
    assert ["samples/mismatch_kl" in row for row in rows] == [True] + [False] * 5
    assert rows[1]["correction/weight_max"] != 1
    assert [row["episode"] for row in rows] == [6, 12, 18, 24, 30, 36]


def test_every_prompt_is_begun_in_its_turn(tiny, tmp_path):
    """With carry-over too the stream of prompts has no gaps: those begun are its first ones."""
    loop = make_loop(tiny, tmp_path, variant_config("carried"), wrap=shared)
    asked: list[list[int]] = []
    generate = loop.engine.generate

    def listening(prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        asked.extend(list(ids) for ids in prompts if list(ids) in [one.ids for one in loop.questions])
        return generate(prompts, sampling)

    loop.engine.generate = listening  # type: ignore[method-assign]
    loop.run()
    assert asked == [loop.questions[number].ids for number in loop.visited(0, len(asked))]


class FailsAfter(OwnWeights):
    """Gives up at its n-th call."""

    def __init__(self, engine: TransformersEngine, context: Context, calls: int):
        super().__init__(engine, context)
        self.left = calls

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        self.left -= 1
        if self.left < 0:
            raise RolloutError("gone")
        return super().generate(prompts, sampling)


@pytest.mark.parametrize("every_steps", [1, 100])
def test_an_engine_that_gives_up_ahead_loses_nothing(every_steps, tiny, tmp_path):
    """It fails at the third round's responses, while the second is learned from: the error comes as it would have
    without a thread, all that was learned is in the checkpoint, and the next run samples that round anew."""
    config = variant_config("overlap", checkpoint=CheckpointSettings(every_steps=every_steps))
    loop = make_loop(tiny, tmp_path, config, wrap=lambda engine, context: FailsAfter(engine, context, 2))
    with pytest.raises(RolloutError, match="gone"):
        loop.run()
    assert loop.trainer.num_steps == 8
    resumed = make_loop(tiny, tmp_path, config, wrap=OwnWeights)
    resumed.run()
    rows = resumed.context.metrics.read()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 0, 1, 1, 1]


def test_a_reward_that_is_down_repeats_its_round(tiny, tmp_path):
    """The endpoint fails after the next round's sampling began: the checkpoint is that of before the round, with its
    responses, and the run that goes on ends as if nothing had happened."""
    config = variant_config("overlap")
    whole = make_loop(tiny, tmp_path / "whole", config, wrap=OwnWeights)
    whole.run()
    loop = make_loop(tiny, tmp_path / "parts", config, wrap=OwnWeights)
    calls = iter([loop.rewarder, loop.rewarder, failing])
    loop.rewarder = lambda *given: next(calls)(*given)  # type: ignore[assignment]
    with pytest.raises(RolloutError, match="endpoint"):
        loop.run()
    resumed = make_loop(tiny, tmp_path / "parts", config, wrap=OwnWeights)
    resumed.run()
    assert_same_run(resumed, whole)


def failing(*given: Any) -> Any:
    raise RolloutError("endpoint is down")


def test_checkpoints_hold_no_pickle(tiny, tmp_path):
    """What is in flight is JSON."""
    loop = make_loop(tiny, tmp_path, variant_config("carried"))
    loop.run()
    newest = max(loop.context.checkpoints.iterdir())
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
    assert json.loads((newest / "inflight.json").read_text())["learned"] > 0
