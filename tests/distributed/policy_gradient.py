"""What tests/distributed/test_policy_gradient.py runs: the trainer on a given batch, and whole stages. It starts two
processes, `torchrun policy_gradient.py FOLDER`, each of which leaves what it has to say in FOLDER."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from align import ranks
from align.errors import AlignError, RolloutError
from align.generation.engine import Samples
from align.job import Input
from align.models.adapters import AdaptedBase
from align.models.opened import open_policy
from align.models.roles import causal_role
from align.models.value import critic_from_policy, shared_head
from align.pipeline.processes import end
from align.recipe.training_settings import LoraSettings, OptimSettings
from align.training.masked import Processes
from align.training.optimisers import check_replicas
from stages import load_specs
from stages.ppo.config import Config
from stages.ppo.metrics import rollout_metrics
from stages.ppo.rollout import Responses, join
from stages.ppo.scorer import Scores
from stages.ppo.settings import CriticSettings, MissingEosSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.distributed.process import signal_at
from tests.models.tiny import new_opened, save_policy
from tests.stages.harness import Watched, new_context

torch.set_num_threads(1)

ROWS, WIDTH, ROLLOUTS = 8, 6, 2
OPTIM = OptimSettings(lr=1e-2, eps=1e-5)
LORA = LoraSettings(rank=4, alpha=8)
TRAINERS: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({}, 5),
    "lora": ({"lora": LORA}, 5),
    "shared head": ({"critic": CriticSettings(kind="shared-head", optim=OPTIM)}, 5),
    "a process learns nothing": ({"missing_eos": MissingEosSettings(rule="mask")}, 5),
    "a process has no rows": ({}, ROWS),
}
"""Settings, and how many of the rows are the first process's. The rows of the second are all cut."""

STAGE: dict[str, Any] = {
    "rollouts": 4,
    "rollout": {"prompts": 4, "responses_per_prompt": 2, "max_response_tokens": 6, "engine": "transformers"},
    "epochs": 2,
    "minibatches": 2,
    "micro_batch_size": 4,
    "optim": {"lr": 1e-2, "eps": 1e-5},
    "missing_eos": {"rule": "off"},
    "checkpoint": {"every_steps": 1},
    "reward": {"brevity": {"function": "tests.stages.reward_functions:brevity"}},
    "samples_every": 1,
}
LONG_TAILS = STAGE | {"rollout": {**STAGE["rollout"], "round_tokens": 2}, "kl": {"estimator": "k2"}}
STAGES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "ppo": ("ppo", STAGE | {"kl": {"target": 1.0}, "ema": 0.9}, None),
    "ppo stopped": ("ppo", STAGE | {"kl": {"target": 1.0}, "ema": 0.9}, 2),
    "grpo": ("grpo", LONG_TAILS, None),
    "grpo stopped": ("grpo", LONG_TAILS, 2),
    "rloo left": ("rloo", STAGE, 1),
    "rloo spent": ("rloo", STAGE | {"kl": {"budget": 1e-9}}, None),
}
"""Kind, settings, and the rollout at which the last process gets a signal. What was stopped is then gone on with, but
for what is left."""


def new_trainer(settings: dict[str, Any], policy: Input, processes: Processes) -> PPOTrainer:
    """A trainer as the stage makes it, with a critic that starts from the policy."""
    rollout = RolloutSettings(prompts=ROWS, max_response_tokens=WIDTH)
    known = {"rollouts": ROLLOUTS, "rollout": rollout, "epochs": 2, "micro_batch_size": 2, "optim": OPTIM}
    config = Config(**{**known, "critic": CriticSettings(optim=OPTIM), **settings})
    torch.manual_seed(0)
    opened = open_policy(policy, "chat")
    if config.lora:
        base = AdaptedBase(opened.model, config.lora)
        actor, critic, reference = base.actor(), base.critic(None), base.base_role()
    else:
        actor = causal_role(opened.model.train())
        critic = shared_head(actor)
        if config.critic.kind != "shared-head":
            critic = critic_from_policy(policy, opened.tokenizer, torch.float32)
        reference = causal_role(open_policy(policy, "chat").model.eval().requires_grad_(False))
    return PPOTrainer(config, actor, critic, reference, seed=0, processes=processes)


def new_responses(rows: slice) -> tuple[Responses, Scores]:
    """Some of a batch of random tokens with 1 to 6 of them, which the last three rows are too short for, and scores."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 250, (ROWS, WIDTH), generator=generator)
    lengths, finished = torch.tensor([1, 6, 2, 5, 3, 6, 6, 6]), torch.arange(ROWS) < 5
    given = torch.randn(ROWS, generator=generator)
    prompts = [[7, 8, 9][: 1 + row % 3] for row in range(ROWS)][rows]
    samples = Samples(ids[rows], lengths[rows], finished[rows])
    tokens = torch.zeros(ROWS, WIDTH)
    tokens[torch.arange(ROWS), lengths - 1] = given
    return join(prompts, samples, 0, "cpu"), Scores(tokens[rows], {}, None)


def train(name: str, policy: Input, target: Path, processes: Processes, process: int, of: int) -> None:
    """Trains on this process's share; leaves metrics and weights."""
    settings, first = TRAINERS[name]
    rows = slice(None) if of == 1 else (slice(first), slice(first, None))[process]
    trainer = new_trainer(settings, policy, processes)
    responses, scores = new_responses(rows)
    metrics = []
    for index in range(ROLLOUTS):
        rollout = trainer.observe(responses, scores.tokens)
        metrics.append(rollout_metrics(rollout, 0.05, scores, processes) | trainer.improve(rollout, index))
    weights = {
        f"{role}.{key}": weight.detach().clone()
        for role, model in trainer.models.items()
        for key, weight in model.named_parameters()
    }
    save_file(weights, target.with_suffix(".safetensors"))
    target.with_suffix(".json").write_text(json.dumps(metrics))


def run_stage(name: str, folder: Path, policy: Input, data: str, stops: bool = False) -> dict[str, Any]:
    """What this process has to say of a stage."""
    kind, settings, at = STAGES[name]
    config = load_specs()[kind].config.model_validate(settings | {"data": {"path": data, "held_out": 0.2}})
    context = new_context(kind, folder / name, {"policy": policy, "reference": policy}, settings)
    if stops and ranks.rank() == ranks.size() - 1:
        assert at is not None
        context.metrics = Watched(context, signal_at(at))
    try:
        result = importlib.import_module("stages.ppo.run").run(config, context)
    except AlignError as error:
        return {"error": str(error), "processes": ranks.size()}
    return {"metrics": result.metrics, "handover": result.handover, "processes": ranks.size()}


def one_gives_up() -> None:
    """The last process's engine does."""
    with ranks.failing_together(RolloutError):
        if ranks.rank() == 1:
            raise RolloutError("the engine of process 1 gave up")


def one_diverges(policy: Input) -> None:
    """A weight of the last process's critic moves by one bit."""
    trainer = new_trainer({}, policy, Processes(ranks.total, ranks.highest))
    check_replicas(trainer.models)
    if ranks.rank() == 1:
        bias = dict(trainer.models["critic"].named_parameters())["head.bias"]
        bias.data.fill_(torch.finfo(torch.float32).smallest_normal)
    check_replicas(trainer.models)


def said(action: Callable[[], None]) -> str:
    """What an action fails with."""
    try:
        action()
    except AlignError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    """Everything, in turn."""
    ranks.join(120)
    asked = json.loads((folder / "asked.json").read_text())
    policy, process = Input(**asked["policy"]), ranks.rank()
    for name in TRAINERS:
        target = folder / f"{name}-{process}"
        train(name, policy, target, Processes(ranks.total, ranks.highest), process, ranks.size())
    told: dict[str, Any] = {"gives up": said(one_gives_up), "diverges": said(partial(one_diverges, policy))}
    for name, (_, _, at) in STAGES.items():
        if at is not None:
            told[f"{name}, at first"] = run_stage(name, folder, policy, asked["data"], stops=True)
        if not name.endswith("left"):
            told[name] = run_stage(name, folder, policy, asked["data"])
        ranks.wait()
    (folder / f"told-{process}.json").write_text(json.dumps(told))
    ranks.leave()


def prepare(folder: Path, data: str) -> Input:
    """The start policy, and what the processes are asked."""
    policy = save_policy(new_opened(), folder / "base" / "model")
    (folder / "asked.json").write_text(json.dumps({"policy": asdict(policy), "data": data}))
    return policy


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
