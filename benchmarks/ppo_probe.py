"""What align says of a fixed batch, and the prompts of its rollouts: `python benchmarks/ppo_probe.py STAGE OUT`.

STAGE is the folder of a complete ppo stage. OUT gets JSON that ppo_trl.py reads: prompts as token ids in the order in
which the stage visits them, and responses of the stage's first policy with the log-probabilities, values and scores
that the stage's own code gives them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from align.context import Context
from align.generation.engine import Sampling
from align.generation.transformers_engine import TransformersEngine
from align.models.load import OFFSET_FIELD
from align.pipeline.folders import read_order
from align.recipe.data_settings import Role
from align.training.rows import load_rows
from stages.ppo.config import Config
from stages.ppo.models import Models, open_models
from stages.ppo.packing import visited
from stages.ppo.rollout import join
from stages.ppo.run import new_rewarder, training_questions
from stages.ppo.trainer import PPOTrainer

PROBES = 64


def visited_prompts(config: Config, context: Context, models: Models) -> list[list[int]]:
    """Token ids of every prompt the stage answers, in order."""
    dataset = load_rows(config.data, Role.PROMPTS, context)
    questions, _ = training_questions(models.policy, dataset.train, config)
    rollouts = (
        visited(len(questions), config.rollout.prompts, index, lambda number: context.seed(f"prompts {number}"))
        for index in range(config.rollouts)
    )
    return [questions[one].ids for rollout in rollouts for one in rollout]


def fixed_batch(config: Config, models: Models, prompts: list[list[int]]) -> dict[str, Any]:
    """Responses to some prompts and what the stage's models say of their tokens; only responses that ended."""
    renderer, rollout = models.policy.renderer, config.rollout
    sampling = Sampling(rollout.max_response_tokens, rollout.temperature, renderer.stop_ids, renderer.pad_id, seed=0)
    samples = TransformersEngine(models.policy.model).generate(prompts, sampling)
    rewarder = new_rewarder(config, models, {})
    scores = rewarder([[]] * len(prompts), prompts, samples)
    trainer = PPOTrainer(config, models.actor, models.critic, models.reference, seed=0)
    responses = join(prompts, samples, renderer.pad_id, "cpu")
    seen = trainer.observe(responses, scores.tokens)
    kept = [row for row, finished in enumerate(samples.finished.tolist()) if finished]
    lengths, assigned = samples.lengths.tolist(), (seen.logp_old, seen.logp_ref, seen.values)
    logp, reference, values = (tensor.tolist() for tensor in assigned)
    return {
        "prompts": [prompts[row] for row in kept],
        "responses": [samples.rows()[row] for row in kept],
        "logp": [logp[row][: lengths[row]] for row in kept],
        "reference": [reference[row][: lengths[row]] for row in kept],
        "values": [values[row][: lengths[row]] for row in kept],
        "scores": [scores.total[row].item() for row in kept],
    }


def main(stage: Path, out: Path) -> None:
    """Writes OUT."""
    order = read_order(stage)
    context, config = Context(order.job), Config.model_validate(order.job.config)
    models = open_models(config, context, torch.device("cpu"))
    prompts = visited_prompts(config, context, models)
    renderer, reward = models.policy.renderer, context.input("reward")
    reward_config = json.loads((Path(reward.path) / "config.json").read_text(encoding="utf-8"))
    found = {
        "policy": context.input("policy").path,
        "reward": reward.path,
        "reward_offset": reward_config.get(OFFSET_FIELD, 0.0),
        "stop_id": renderer.end_of_turn,
        "settings": config.model_dump(mode="json"),
        "prompts": prompts,
        "probe": fixed_batch(config, models, prompts[:PROBES]),
    }
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
