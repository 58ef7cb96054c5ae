"""TRL's side of ppo.py, run by the Python of TRL's own environment: `python ppo_trl.py check|train TASK OUT`.

TASK is what ppo_probe.py wrote, perhaps with other settings. `check` compares what TRL says of the fixed batch with
what align says; `train` trains and times. Needs nothing of align.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PACKAGES = ("trl", "transformers", "torch", "accelerate")


def policy_of(task: dict[str, Any]) -> Any:
    """The policy that training starts from."""
    return AutoModelForCausalLM.from_pretrained(task["policy"], dtype=torch.float32)


def scorer_of(task: dict[str, Any]) -> Any:
    """The reward model, or a critic that starts as it, its normalisation included: TRL applies `score` by itself, so
    the offset that align keeps in config.json becomes the bias of that layer."""
    model = AutoModelForSequenceClassification.from_pretrained(task["reward"], dtype=torch.float32, num_labels=1)
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight)
        head.bias.fill_(task["reward_offset"])
    model.score = head
    return model


def padded(rows: list[list[Any]], fill: Any, left: bool = False) -> torch.Tensor:
    """Rows of unequal length as a tensor."""
    width = max(map(len, rows))
    fills = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for gap, row in zip(fills, rows, strict=True)])


@torch.no_grad()
def check(task: dict[str, Any]) -> dict[str, float]:
    """Largest differences between TRL and align on the fixed batch."""
    probe, tokenizer = task["probe"], AutoTokenizer.from_pretrained(task["policy"])
    pad, temperature = tokenizer.pad_token_id, task["settings"]["rollout"]["temperature"]
    prompts, responses = padded(probe["prompts"], pad, left=True), padded(probe["responses"], pad)
    ids, width = torch.cat([prompts, responses], 1), prompts.shape[1]
    valid = padded([[True] * len(row) for row in probe["responses"]], False)
    policy, scorer = policy_of(task).eval(), scorer_of(task).eval()
    logits = ppo_trainer.forward(policy, ids, pad).logits[:, width - 1 : -1] / (temperature + 1e-7)
    logp = ppo_trainer.selective_log_softmax(logits, responses)
    states, scores, _ = ppo_trainer.get_reward(scorer, ids, pad, width)
    values = states[:, width - 1 : -1, 0]
    found = {"logp": logp, "reference": logp, "values": values}
    differences = {name: (ours - padded(probe[name], 0.0))[valid].abs().max().item() for name, ours in found.items()}
    return {**differences, "scores": (scores - torch.tensor(probe["scores"])).abs().max().item()}


class Watch:
    """Times what TRL's training loop does, from outside: by the functions it calls, in the order in which it does."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}
        self.sampled = self.observed = time.time()
        """When the last rollout was sampled, and when its advantages were known."""

    def install(self, trainer: PPOTrainer) -> None:
        """Wraps the functions."""
        ppo_trainer.batch_generation = self.sampling(ppo_trainer.batch_generation, trainer)
        ppo_trainer.get_reward = self.scoring(ppo_trainer.get_reward, trainer.reward_model)
        ppo_trainer.masked_whiten = self.whitening(ppo_trainer.masked_whiten)
        trainer.log = self.logging(trainer.log)

    def sampling(self, call: Callable[..., Any], trainer: PPOTrainer) -> Callable[..., Any]:
        """A rollout begins with sampling."""

        def timed(model: Any, queries: torch.Tensor, *arguments: Any) -> Any:
            started = time.time()
            ids, logits = call(model, queries, *arguments)
            self.sampled = time.time()
            answers = ids[:, queries.shape[1] :]
            tokens = (answers != trainer.processing_class.pad_token_id).sum().item()
            self.row = {"rollout": self.sampled - started, "score": 0.0, "response_length": tokens / len(answers)}
            return ids, logits

        return timed

    def scoring(self, call: Callable[..., Any], reward_model: Any) -> Callable[..., Any]:
        """The same function gives values and scores."""

        def timed(model: Any, *arguments: Any) -> Any:
            started = time.time()
            result = call(model, *arguments)
            if model is reward_model:
                self.row["score"] += time.time() - started
            return result

        return timed

    def whitening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Advantages are whitened last, before the epochs."""

        def timed(*arguments: Any, **named: Any) -> Any:
            result = call(*arguments, **named)
            self.observed = time.time()
            self.row["observe"] = self.observed - self.sampled - self.row["score"]
            return result

        return timed

    def logging(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Metrics are logged after the epochs."""

        def timed(metrics: dict[str, float], *arguments: Any, **named: Any) -> Any:
            now = time.time()
            self.rows.append({**self.row, "learn": now - self.observed, "time": now, "metrics": dict(metrics)})
            return call(metrics, *arguments, **named)

        return timed


def arguments_of(task: dict[str, Any]) -> PPOConfig:
    """align's settings under TRL's names."""
    settings = task["settings"]
    rollout, optim, clip = settings["rollout"], settings["optim"], settings["clip"]
    size = rollout["prompts"] * rollout["responses_per_prompt"]
    return PPOConfig(
        output_dir="runs/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        seed=0,
        # One micro-batch per minibatch: with more, gradient accumulation runs over minibatches.
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=size * settings["rollouts"],
        local_rollout_forward_batch_size=rollout["micro_batch_size"],
        response_length=rollout["max_response_tokens"],
        temperature=rollout["temperature"],
        stop_token_id=task["stop_id"],
        missing_eos_penalty=-settings["missing_eos"]["value"],
        kl_coef=settings["kl"]["coef"],
        kl_estimator=settings["kl"]["estimator"],
        cliprange=clip["policy"],
        cliprange_value=clip["value"],
        vf_coef=1.0,  # actor and critic share nothing, and align trains both at full weight
        gamma=settings["gamma"],
        lam=settings["lam"],
        learning_rate=optim["lr"],
        lr_scheduler_type=optim["schedule"],
        adam_beta1=optim["betas"][0],
        adam_beta2=optim["betas"][1],
        adam_epsilon=optim["eps"],
        weight_decay=optim["weight_decay"],
    )


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Trains on the prompts in align's order; returns what was timed."""
    arguments = arguments_of(task)
    tokenizer = AutoTokenizer.from_pretrained(task["policy"], padding_side="left")
    data = Dataset.from_dict({"input_ids": task["prompts"][: arguments.total_episodes]})
    models = {"model": policy_of(task), "ref_model": policy_of(task)}
    scorers = {"reward_model": scorer_of(task), "value_model": scorer_of(task)}
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, train_dataset=data, eval_dataset=data, **models, **scorers
    )
    batches = DataLoader(data, arguments.per_device_train_batch_size, collate_fn=trainer.data_collator)
    trainer.dataloader = trainer.accelerator.prepare(batches)  # in order, where TRL's own would shuffle
    watch = Watch()
    watch.install(trainer)
    trainer.train()
    return {
        "rows": watch.rows,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "optimiser": f"{arguments.optim}".rpartition(".")[2],
    }


def main(what: str, task: Path, out: Path) -> None:
    """Reads TASK, writes OUT."""
    result = {"check": check, "train": train}[what](json.loads(task.read_text(encoding="utf-8")))
    out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
