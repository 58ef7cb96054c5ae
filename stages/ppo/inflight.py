"""Responses in flight: sampled, in part or whole, in an earlier round of the loop than the one that learns from them.

Long tails (rollout.round_tokens): in a round responses grow by so many tokens at a time, until a share of them has
ended (rollout.until_ended). One that has not by then goes on in the next round under the policy of then, beside new
ones that take the places of those that ended. Responses that are compared with each other are learned from once all of
them have ended.

Overlap (rollout.overlap): while a round is learned from, the responses of the next are sampled in a thread, from the
policy as it was before.

Either way a policy learns from tokens of older ones. So each token has its version, the number of the round whose
policy sampled it, and its log-probability under that policy: stages/ppo/correction.py weighs it by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from align.generation.engine import Samples, right_pad
from stages.ppo.config import Config
from stages.ppo.metrics import Phases
from stages.ppo.rollout import Question


@dataclass(frozen=True)
class Response:
    """A response to a question, given by its number, as far as it was sampled."""

    question: int
    ids: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Under the policies that sampled."""
    finished: bool = False


Group = tuple[Response, ...]


@dataclass(frozen=True)
class State:
    """What is in flight when a round begins; plain data, saved in checkpoints."""

    groups: tuple[Group, ...] = ()
    """Responses that are learned from together, in the order in which they were begun."""
    begun: int = 0
    """Groups that were ever begun: the place in the stream of prompts."""
    learned: int = 0
    """Responses that were learned from."""
    sampled: int = 0
    """Responses that grew when this round was sampled; 0 until it is."""
    restarted: int = 0
    """Responses that were started anew for it."""

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> State:
        """From what `asdict` made of one, by way of JSON."""
        groups = tuple(tuple(Response(**one) for one in group) for group in saved["groups"])
        return cls(**{**saved, "groups": groups})


@dataclass(frozen=True)
class Batch:
    """What a round learns from: B questions, perhaps none, and a response to each."""

    questions: Sequence[Question]
    samples: Samples
    episodes: int
    """Responses of this process that were learned from, these included."""
    versions: Tensor | None = None
    """(B,T) number of the round whose policy sampled each token; None: this one's."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """By metric, of this process's responses: those learned from now and, with settings that have them, those carried
    over, of all that grew in this round, and those restarted for it."""
    grown: int = 0


Generate = Callable[[Sequence[Sequence[int]], int, str], Samples]
"""Samples a response of at most so many tokens to each prompt, under the name of the seed."""


class Flight:
    """The responses in flight, from round to round, of which at most `capacity` grow at a time. `stream` gives the
    questions' numbers at places of the stream of prompts, `generate` samples, and `rest` is called when a round's
    sampling is done."""

    def __init__(
        self,
        config: Config,
        questions: Sequence[Question],
        capacity: int,
        pad_id: int,
        stream: Callable[[int, int], Sequence[int]],
        generate: Generate,
        rest: Callable[[], None],
    ):
        self.settings, self.rounds = config.rollout, config.rollouts
        self.questions, self.capacity, self.pad_id = questions, capacity, pad_id
        self.group = config.rollout.responses_per_prompt if config.compares else 1
        self.tokens = config.rollout.round_tokens or config.rollout.max_response_tokens
        self._stream, self._generate, self._rest_engine = stream, generate, rest
        self.state = State()
        """When the round at work began: what a checkpoint before the end of that round holds."""
        self._rest: State | None = None
        """What is left when the round at work ends; None before it begins."""
        self._ahead: Future[State] | None = None
        """The next round, which is sampled ahead."""
        self._phases = Phases()

    def collect(self, index: int, phases: Phases) -> Batch:
        """The responses that round `index` learns from, once the round before it is settled and the engine samples
        from the policy of this one."""
        state = self.state
        if not state.sampled:
            state = self._grown(self._boarded(state, index), index, index)
        batch, rest = self._taken(state)
        phases.metrics |= self._phases.metrics
        self._phases, self._rest = Phases(), rest
        if self.settings.overlap and index + 1 < self.rounds:
            self._ahead = self._in_a_thread(self._boarded(self._rest, index), index, index + 1)
        return batch

    def settle(self) -> None:
        """Ends the round at work: waits for what is sampled ahead. Raises what went wrong with that; the next round is
        then sampled when it begins."""
        if self._rest is None:
            return
        self.state, self._rest = self._rest, None
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            with self._phases.phase("time/wait"):
                self.state = ahead.result()

    def give_up(self) -> None:
        """Forgets the round at work: `state` is as if it had not begun. What is sampled ahead ends with the engine."""
        self._rest = self._ahead = None

    def _is_open(self, one: Response) -> bool:
        return not one.finished and len(one.ids) < self.settings.max_response_tokens

    def _open(self, state: State) -> Iterator[Response]:
        return filter(self._is_open, chain.from_iterable(state.groups))

    def _boarded(self, state: State, version: int) -> State:
        """With those that are too old started anew, and as many new groups as there is room for."""
        limit = self.settings.max_staleness

        def is_too_old(one: Response) -> bool:
            return limit is not None and bool(one.versions) and version - one.versions[0] > limit

        under_way = list(self._open(state))
        groups = tuple(
            tuple(Response(one.question) if self._is_open(one) and is_too_old(one) else one for one in group)
            for group in state.groups
        )
        begun = state.begun + (self.capacity - len(under_way)) // self.group
        groups += self._new(state.begun, begun)
        return replace(state, groups=groups, begun=begun, restarted=sum(map(is_too_old, under_way)))

    def _new(self, first: int, last: int) -> tuple[Group, ...]:
        """The groups that are begun at these places. Each prompt has `responses_per_prompt` responses, in one group or
        in several."""
        each = self.settings.responses_per_prompt // self.group
        start = first // each
        numbers = self._stream(start, -(-last // each))
        return tuple((Response(numbers[place // each - start]),) * self.group for place in range(first, last))

    def _grown(self, state: State, version: int, number: int) -> State:
        """With open responses grown by what policy `version` says in round `number`, until enough have ended."""
        under_way = sum(1 for _ in self._open(state))
        with self._phases.phase("time/rollout"):
            for part in count():
                name = f"rollout {number}, part {part}" if part else f"rollout {number}"
                state = self._landed(state, version, self._sample(state, name))
                still = sum(1 for _ in self._open(state))
                if under_way - still >= self.settings.until_ended * under_way:
                    break
            self._rest_engine()
        return replace(state, sampled=under_way)

    def _sample(self, state: State, name: str) -> Samples:
        """What open responses grow by at a time."""
        prompts = [self.questions[one.question].ids + one.ids for one in self._open(state)]
        return self._generate(prompts, self.tokens, name)

    def _in_a_thread(self, state: State, version: int, number: int) -> Future[State]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        try:
            return pool.submit(self._grown, state, version, number)
        finally:
            pool.shutdown(wait=False)

    def _landed(self, state: State, version: int, samples: Samples) -> State:
        """With open responses grown by what was sampled from policy `version`."""
        assert samples.logprobs is not None
        sampled = zip(samples.rows(), samples.logprobs.tolist(), samples.finished.tolist(), strict=True)

        def grown(one: Response) -> Response:
            ids, given, finished = next(sampled)
            versions = one.versions + [version] * len(ids)
            return Response(one.question, one.ids + ids, versions, one.logprobs + given[: len(ids)], finished)

        groups = tuple(tuple(grown(one) if self._is_open(one) else one for one in group) for group in state.groups)
        return replace(state, groups=groups)

    def _taken(self, state: State) -> tuple[Batch, State]:
        """The groups that are complete, and what is left."""
        rest = tuple(group for group in state.groups if any(map(self._is_open, group)))
        ended = [one for group in state.groups if not any(map(self._is_open, group)) for one in group]
        learned = state.learned + len(ended)
        counts = {"rollout/learned": len(ended)}
        if self.settings.round_tokens is not None:
            counts["rollout/carried"] = sum(1 for _ in self._open(state))
        if self.settings.max_staleness is not None:
            counts["rollout/restarted"] = state.restarted
        batch = Batch(
            [self.questions[one.question] for one in ended],
            Samples.of(
                [one.ids for one in ended],
                [one.logprobs for one in ended],
                [one.finished for one in ended],
                self.pad_id,
            ),
            learned,
            right_pad([one.versions for one in ended], 0, torch.long),
            counts,
            state.sampled,
        )
        return batch, State(rest, state.begun, learned)
