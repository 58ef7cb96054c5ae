"""An engine of this process that fails is opened again, on the policy as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from align.errors import AlignError, RolloutError
from align.generation.engine import RolloutEngine, Samples, Sampling

Result = TypeVar("Result")


class RestartingEngine:
    """The engine that `start` opens, started again at most `max_restarts` times in a row; `notice` is told of each.

    Right only while the policy does not change between a `sync` and what is sampled after it.
    """

    independent = True

    def __init__(self, start: Callable[[], RolloutEngine], max_restarts: int, notice: Callable[[str], None]):
        self._start, self.max_restarts, self._notice = start, max_restarts, notice
        self._engine = start()
        self.name = self._engine.name

    @property
    def summary(self) -> str:
        """How the policy's weights reach it."""
        return self._engine.summary

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        """As the engine. Raises RolloutError when it failed once more than it may."""
        return self._surviving(lambda engine: engine.generate(prompts, sampling))

    def sync(self) -> None:
        """As the engine. Raises RolloutError when it failed once more than it may."""
        self._surviving(lambda engine: engine.sync())

    def rest(self) -> None:
        """As the engine. Raises RolloutError when it failed once more than it may."""
        self._surviving(lambda engine: engine.rest())

    def differing(self) -> list[str]:
        """As the engine."""
        return self._engine.differing()

    def close(self) -> None:
        """As the engine."""
        self._engine.close()

    def _surviving(self, action: Callable[[RolloutEngine], Result]) -> Result:
        for restarts_left in reversed(range(self.max_restarts + 1)):
            try:
                return action(self._engine)
            except RolloutError as failure:
                if not restarts_left:
                    raise
                self._notice(f"{failure}; starting it again")
                self._restart(failure)
        raise AssertionError("unreachable")

    def _restart(self, failure: RolloutError) -> None:
        with suppress(Exception):  # what failed may not close properly either
            self._engine.close()
        try:
            self._engine = self._start()
        except AlignError as error:
            raise RolloutError(f"{failure}; it did not start again: {error}") from error
