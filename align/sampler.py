"""The process of `align generate`: `python -m align.sampler ORDER`, the path of a JSON file that says what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from align.data.load import load
from align.data.rows import Prompt
from align.errors import AlignError, ConfigError
from align.evaluation.scorer import RewardModel, RewardScorer
from align.generation.engine import RolloutEngine, Sampling
from align.generation.open import Sampled, open_engine
from align.job import Input
from align.models.load import local_folder
from align.models.opened import Opened, open_policy, open_reward
from align.models.roles import causal_role, reward_role
from align.recipe.data_settings import DataSettings, Role
from align.recipe.engine_settings import EngineSettings
from align.records import write_text
from align.training.parity import NUM_PROBES, ParityGuard
from align.training.precision import training_dtype
from align.training.progress import StageProgress

PROMPTS_AT_A_TIME = 256


@dataclass(frozen=True)
class Order:
    """What `align generate` was asked for."""

    prompts: str
    output: str
    policy: dict[str, Any]
    """An Input."""
    reward: dict[str, Any] | None
    """An Input that scores responses; None: they are not scored."""
    num_responses: int
    best_of: int
    """Responses sampled for each one that is written: the one with the highest score. 1: all are written."""
    max_response_tokens: int
    temperature: float
    seed: int
    engine: str

    def write(self, path: Path) -> None:
        """As JSON."""
        write_text(path, json.dumps(asdict(self)))


@dataclass(frozen=True)
class Sampler:
    """All that answers prompts."""

    order: Order
    policy: Opened
    engine: RolloutEngine
    scorer: RewardScorer | None

    def rows(self, prompts: Sequence[Prompt], number: int) -> Iterator[dict[str, Any]]:
        """What is written about some prompts, the `number`-th batch of them."""
        order, renderer = self.order, self.policy.renderer
        asked = [prompt for prompt in prompts for _ in range(order.num_responses * order.best_of)]
        ids = [renderer.prompt(prompt.messages, prompt.source) for prompt in asked]
        samples = self.engine.generate(ids, sampling(order, self.policy, order.seed + number))
        scores = None
        if self.scorer is not None:
            self.engine.rest()
            scores = self.scorer([prompt.messages for prompt in asked], ids, samples).tolist()
        finished, responses = samples.finished.tolist(), samples.rows()
        for start in range(0, len(asked), order.best_of):
            several = range(start, start + order.best_of)
            row = max(several, key=lambda index: scores[index]) if scores else start
            written = {"messages": list(asked[row].messages), "response": renderer.decode(responses[row])}
            yield {**written, "finished": finished[row], **({"score": scores[row]} if scores else {})}


def sampling(order: Order, policy: Opened, seed: int) -> Sampling:
    """How responses are drawn."""
    renderer = policy.renderer
    return Sampling(order.max_response_tokens, order.temperature, renderer.stop_ids, renderer.pad_id, seed)


def run(order: Order) -> None:
    """Answers all prompts; the output is written when it is whole. Raises what reading, loading and sampling raise."""
    prompts: Sequence[Prompt] = load(DataSettings(path=order.prompts, held_out=0.0), Role.PROMPTS).train
    console = Console(stderr=True, highlight=False)
    source = Input(**order.policy)
    policy = open_policy(source, "auto")
    policy.model.eval()
    ids = [policy.renderer.prompt(prompt.messages, prompt.source) for prompt in prompts]
    dtype = training_dtype("float32")
    engine = open_engine(
        EngineSettings(engine=order.engine),  # type: ignore[arg-type]  # checked by the command line
        Sampled(policy.model, Path(local_folder(source)), dtype, longest(policy, ids, order), PROMPTS_AT_A_TIME),
        notice=lambda text: console.print(f"  engine: {escape(text)}"),
    )
    with closing(engine):
        console.print(f"  engine: {engine.name}, {engine.summary}")
        ParityGuard(engine, causal_role(policy.model), ids[:NUM_PROBES], sampling(order, policy, 0), dtype).check()
        sampler = Sampler(order, policy, engine, scorer(order, policy))
        lines: list[str] = []
        batches = [prompts[start : start + PROMPTS_AT_A_TIME] for start in range(0, len(prompts), PROMPTS_AT_A_TIME)]
        with StageProgress("generate", len(prompts), "prompts") as bar:
            for number, batch in enumerate(batches):
                lines += [json.dumps(row, ensure_ascii=False) for row in sampler.rows(batch, number)]
                bar.show(min(len(prompts), (number + 1) * PROMPTS_AT_A_TIME))
    write_text(Path(order.output), "".join(f"{line}\n" for line in lines))
    console.print(f"wrote {len(lines)} responses to {escape(order.output)}", soft_wrap=True)


def longest(policy: Opened, prompts: Sequence[Sequence[int]], order: Order) -> int:
    """Tokens of the longest prompt and response. Raises ConfigError when they exceed the model's context."""
    tokens = max(map(len, prompts)) + order.max_response_tokens
    context = getattr(policy.model.config, "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise ConfigError(
            f"the longest prompt and --max-tokens come to {tokens} tokens, the model's context is {context}; lower "
            "--max-tokens"
        )
    return tokens


def scorer(order: Order, policy: Opened) -> RewardScorer | None:
    """The reward model that scores, if one does."""
    if order.reward is None:
        return None
    opened = open_reward(Input(**order.reward), "auto")
    model = RewardModel(reward_role(opened.model.eval()), opened.tokenizer, opened.renderer)
    return RewardScorer(model, policy, PROMPTS_AT_A_TIME)


def main(path: Path) -> int:
    """Returns the exit code; errors of the user's are told without a traceback."""
    try:
        run(Order(**json.loads(path.read_text(encoding="utf-8"))))
    except AlignError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {escape(str(error))}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
