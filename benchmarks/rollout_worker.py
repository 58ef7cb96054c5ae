"""One engine of rollout.py, in a process of its own: `python rollout_worker.py ENGINE FOLDER MAX_LENGTH`.

Opens the engine on the model in FOLDER as a stage does. Then every line on stdin is a request, a JSON object
`{"do": NAME, ...}`, and is answered by a line of JSON on stdout; nothing is done in between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from align.generation.engine import RolloutEngine, Sampling
from align.generation.open import Sampled, open_engine
from align.models.roles import causal_role
from align.recipe.engine_settings import EngineSettings
from align.training.parity import ParityGuard

CHANGE = 1e-3
"""What is added to all weights, and taken away again."""


class Worker:
    """An engine and its policy, and what can be asked of them."""

    def __init__(self, engine: RolloutEngine, policy: Any):
        self.engine, self.policy = engine, policy

    def generate(self, calls: Sequence[Sequence[list[int]]], sampling: dict[str, Any]) -> dict[str, Any]:
        """Answers the prompts of each call. Seconds in all, and the lengths of the responses to each."""
        drawn = Sampling(**sampling)
        started = time.perf_counter()
        samples = [self.engine.generate(prompts, drawn) for prompts in calls]
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "lengths": [one.lengths.tolist() for one in samples]}

    def sync(self) -> dict[str, Any]:
        """Seconds of handing over weights that have all changed, and changed back."""
        return {"seconds": (self._hand_over(CHANGE) + self._hand_over(-CHANGE)) / 2}

    def check(self, prompts: Sequence[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
        """Changes and hands over all weights; raises RolloutError when the engine is not the policy after that. The
        largest differences of log-probabilities before and after the hand-over, of an engine that is another one."""
        guard = ParityGuard(self.engine, causal_role(self.policy), prompts, Sampling(**sampling), torch.float32)
        self._change(CHANGE)
        before = guard.gap() if self.engine.independent else None
        self.engine.sync()
        guard.check()
        after = guard.gap() if self.engine.independent else None
        self._hand_over(-CHANGE)
        return {"before": before, "after": after}

    def _hand_over(self, amount: float) -> float:
        """Changes all weights in place, as an optimiser does. Seconds of handing them over, alone."""
        self._change(amount)
        started = time.perf_counter()
        self.engine.sync()
        return time.perf_counter() - started

    @torch.no_grad()
    def _change(self, amount: float) -> None:
        for parameter in self.policy.parameters():
            parameter.add_(amount)


def serve(name: str, folder: Path, max_length: int, answer: Callable[[dict[str, Any]], None]) -> None:
    """Opens the engine, says so, and answers until stdin ends."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = EngineSettings(engine=name)  # type: ignore[arg-type]  # rollout.py's own
    what = Sampled(policy, folder, torch.float32, max_length, batch_size=settings.max_sequences)
    with closing(open_engine(settings, what, notice=lambda text: print(text, file=sys.stderr))) as engine:
        answer({"summary": engine.summary})
        worker = Worker(engine, policy)
        actions = {action.__name__: action for action in (worker.generate, worker.sync, worker.check)}
        for line in sys.stdin:
            request = json.loads(line)
            answer(actions[request.pop("do")](**request))


def main() -> None:
    """Serves on stdin and stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    name, folder, max_length = sys.argv[1:]
    serve(name, Path(folder), int(max_length), lambda found: print(json.dumps(found), file=answers, flush=True))


if __name__ == "__main__":
    main()
