"""The loop with a tiny real model: which prompts it visits, and that stopping and resuming change nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from align.context import Context
from align.errors import ArtifactError, Interrupted, NumericError
from align.generation.engine import Samples, Sampling
from align.generation.transformers_engine import TransformersEngine
from align.recipe.data_settings import DataSettings
from align.recipe.training_settings import CheckpointSettings, LoraSettings, OptimSettings
from align.training.checkpoints import checkpoint_folder
from align.training.precision import training_dtype
from stages.ppo.checkpoint import load_checkpoint
from stages.ppo.config import Config
from stages.ppo.loop import Loop, Question
from stages.ppo.models import open_models
from stages.ppo.ptx import Demonstrations
from stages.ppo.run import new_rewarder, text_scorers, warmup_rollouts
from stages.ppo.settings import CriticSettings, KLSettings, PtxSettings, RolloutSettings
from stages.ppo.trainer import PPOTrainer
from tests.ppo.conftest import Tiny
from tests.stages.harness import new_context

QUESTIONS = 7
PHASES = {"time/rollout", "time/score", "time/observe", "time/learn", "time/sync", "time/wait"}
CLOCK = {"time", "eps", *PHASES}
"""Metrics of when and how fast."""
Wrap = Callable[[TransformersEngine, Context], Any]


def make_config(**changes) -> Config:
    optim = OptimSettings(lr=3e-3, eps=1e-5)
    known = {
        "data": DataSettings(path="prompts.jsonl", template="chat"),
        "rollouts": 4,
        "rollout": RolloutSettings(prompts=6, max_response_tokens=5),
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_size": 4,
        "optim": optim,
        **({} if "estimator" in changes else {"critic": CriticSettings(optim=optim)}),
        "checkpoint": CheckpointSettings(every_steps=1, keep=2),
        "samples_every": 1,
    }
    return Config(**{**known, **changes})


def make_context(tiny: Tiny, directory: Path, seed: int = 0) -> Context:
    inputs = {"policy": tiny.llama, "reference": tiny.llama, "reward": tiny.reward}
    return new_context("ppo", directory, inputs, {}, seed)


def make_loop(
    tiny: Tiny, directory: Path, config: Config | None = None, seed: int = 0, wrap: Wrap | None = None
) -> Loop:
    """A fresh loop with everything loaded from disk, as a stage that starts or starts again. `wrap` replaces its
    engine."""
    config = config or make_config()
    context = make_context(tiny, directory, seed)
    torch.manual_seed(context.seed("weights"))
    models = open_models(config, context, torch.device("cpu"))
    policy = models.policy
    trainer = PPOTrainer(
        config,
        models.actor,
        models.critic,
        models.reference,
        seed=context.seed("minibatches"),
        warmup=warmup_rollouts(config, models),
        precision=training_dtype(config.precision),
        demonstrations=Demonstrations([([5, 6], [7, 8, 9]), ([6], [5])], 2, 0, 0) if config.ptx else None,
    )
    engine = TransformersEngine(policy.model, batch_size=4)
    messages = [[{"role": "user", "content": f"{'a ' * number}dog"}] for number in range(QUESTIONS)]
    questions = [Question(one, policy.renderer.prompt(one)) for one in messages]
    return Loop(
        config,
        context,
        Accelerator(cpu=True),
        trainer,
        wrap(engine, context) if wrap else engine,
        new_rewarder(config, models, text_scorers(config, context)),
        policy.renderer,
        questions,
    )


class StopAfter:
    """An engine during whose n-th call the stop signal comes."""

    name, summary, independent = "stop", "", False

    def __init__(self, engine: TransformersEngine, context: Context, calls: int):
        self.engine, self.context, self.calls = engine, context, calls

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        self.calls -= 1
        self.context.stop.is_set = self.calls <= 0
        return self.engine.generate(prompts, sampling)

    def sync(self) -> None:
        self.engine.sync()

    def rest(self) -> None:
        self.engine.rest()


class OwnWeights:
    """An engine with weights of its own, like one in another process: it samples from what it was last given."""

    name, summary, independent = "own weights", "", False

    def __init__(self, engine: TransformersEngine, context: Context):
        self.source = engine.model
        self.engine = TransformersEngine(type(engine.model)(engine.model.config), engine.batch_size)
        self.calls: list[str] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Samples:
        self.calls.append("generate")
        return self.engine.generate(prompts, sampling)

    def sync(self) -> None:
        self.calls.append("sync")
        self.engine.model.load_state_dict(self.source.state_dict())

    def rest(self) -> None:
        self.calls.append("rest")


def stop_after(calls: int) -> Wrap:
    return lambda engine, context: StopAfter(engine, context, calls)


def state(loop: Loop) -> dict[str, torch.Tensor]:
    """Every number that training changes: all that is trained, its average, and the moments and step counts of the
    optimisers."""
    tensors = (
        {} if loop.trainer.ema is None else {f"ema.{key}": value for key, value in loop.trainer.ema.averages.items()}
    )
    for name, role in loop.trainer.models.items():
        tensors |= {f"{name}.{key}": value for key, value in role.named_parameters()}
        state = loop.trainer.optimisers[name].tensors()
        tensors |= {f"{name}.optimiser.{key}": value for key, value in state.items()}
    return tensors


def sha256(loop: Loop) -> str:
    """Of all the state's bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state(loop).items()):
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def lines(loop: Loop) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says, and samples.jsonl."""
    metrics = [{key: row[key] for key in row.keys() - CLOCK} for row in loop.context.metrics.read()]
    return metrics + loop.context.samples.read()


def assert_same_run(loop: Loop, other: Loop) -> None:
    mine, theirs = state(loop), state(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert different == []
    assert lines(loop) == lines(other)
    assert loop.trainer.num_steps == other.trainer.num_steps
    assert loop.trainer.kl_coef == other.trainer.kl_coef
    assert loop.reporter.history == other.reporter.history


def damage(checkpoints: Path, rollouts: int) -> None:
    """Flips one bit in the middle of the actor's weights."""
    path = checkpoint_folder(checkpoints, rollouts) / "actor.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def straight(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """Four rollouts without interruption."""
    loop = make_loop(tiny, tmp_path_factory.mktemp("straight"))
    loop.run()
    return loop


def bare_loop(tiny: Tiny, directory: Path, prompts: int, seed: int = 0, process: int = 0, processes: int = 1) -> Loop:
    """A loop that can only choose prompts."""
    accelerator: Any = SimpleNamespace(process_index=process, num_processes=processes, is_main_process=True)
    nothing: Any = None
    config = make_config(rollout=RolloutSettings(prompts=prompts), minibatches=1)
    questions = [Question([], [number]) for number in range(QUESTIONS)]
    context = make_context(tiny, directory, seed)
    return Loop(config, context, accelerator, nothing, nothing, nothing, nothing, questions)


@pytest.mark.parametrize("prompts", [1, 3, 7, 10, 16])
def test_every_pass_visits_every_prompt_once(prompts, tiny, tmp_path):
    """Rollouts divide the stream of passes, whether they are smaller or larger than the set of prompts: any seven
    prompts in a row from a multiple of seven are all different, and each pass has an order of its own."""
    loop = bare_loop(tiny, tmp_path, prompts)
    stream = [one.ids[0] for index in range(3 * QUESTIONS) for one in loop.batch(index)]
    assert len(stream) == 3 * QUESTIONS * prompts
    passes = [tuple(stream[start : start + QUESTIONS]) for start in range(0, len(stream), QUESTIONS)]
    assert all(sorted(one) == list(range(QUESTIONS)) for one in passes)
    assert len(set(passes)) == len(passes)


def test_prompts_depend_on_seed_and_rollout_only(tiny, tmp_path):
    """A resumed run needs no memory of the prompts: any rollout's prompts can be asked for, in any order."""
    forward = [bare_loop(tiny, tmp_path, 3).batch(index) for index in range(8)]
    loop = bare_loop(tiny, tmp_path, 3)
    assert [loop.batch(index) for index in reversed(range(8))] == forward[::-1]
    assert [bare_loop(tiny, tmp_path, 3, seed=1).batch(index) for index in range(8)] != forward


def test_processes_share_the_prompts(tiny, tmp_path):
    """The processes' prompts are those of a single process, each once."""
    for index in range(5):
        whole = bare_loop(tiny, tmp_path, 6).batch(index)
        parts = [bare_loop(tiny, tmp_path, 6, process=rank, processes=3).batch(index) for rank in range(3)]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert Counter(one.ids[0] for part in parts for one in part) == Counter(one.ids[0] for one in whole)


def test_a_run_counts_and_learns(straight, tiny, tmp_path):
    """Cnt, R2: 4 rollouts x 2 epochs x 2 minibatches; the KL is exactly 0 on the first rollout and not after it."""
    assert straight.trainer.num_steps == 16
    metrics = straight.context.metrics.read()
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert [row["episode"] for row in metrics] == [6, 12, 18, 24]
    assert metrics[0]["objective/kl"] == 0
    assert all(row["objective/kl"] != 0 for row in metrics[1:])
    assert {row["step"] for row in straight.context.samples.read()} == {1, 2, 3, 4}
    start = make_loop(tiny, tmp_path)
    before = dict(start.trainer.actor.named_parameters())
    assert all(not torch.equal(before[name], now) for name, now in straight.trainer.actor.named_parameters())


def test_the_engine_rests_after_it_has_sampled(tiny, tmp_path):
    """In every rollout: weights, responses, rest. What scores and learns comes after."""
    loop = make_loop(tiny, tmp_path, wrap=OwnWeights)
    loop.run()
    assert isinstance(loop.engine, OwnWeights) and loop.engine.calls == ["sync", "generate", "rest"] * 4


@pytest.mark.parametrize("rollouts", [1, 2, 3])
def test_stopping_and_resuming_changes_nothing(rollouts, straight, tiny, tmp_path):
    """A stop signal in the middle of a rollout ends it with a checkpoint; a fresh process goes on, and ends with the
    same weights, moments, metrics and samples as an uninterrupted run, bit for bit."""
    config = make_config(checkpoint=CheckpointSettings(every_steps=100))
    stopped = make_loop(tiny, tmp_path, config, wrap=stop_after(rollouts))
    with pytest.raises(Interrupted):
        stopped.run()
    assert stopped.trainer.num_steps == 4 * rollouts
    resumed = make_loop(tiny, tmp_path, config)
    resumed.run()
    assert_same_run(resumed, straight)


VARIANTS = {
    "adapters": {"lora": LoraSettings(rank=4, alpha=8)},
    "shared head, averaged": {"critic": CriticSettings(kind="shared-head", optim=OptimSettings(lr=3e-3)), "ema": 0.9},
    "adaptive KL": {"kl": KLSettings(target=0.01, horizon=20)},
    "rloo": {"estimator": "rloo", "rollout": RolloutSettings(prompts=3, responses_per_prompt=2, max_response_tokens=5)},
    "ptx": {"ptx": PtxSettings(data=DataSettings(path="demonstrations.jsonl"), batch_size=2)},
    "float16, moments in 8 bits": {"precision": "float16", "optim": OptimSettings(kind="adamw-8bit", lr=3e-3)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resumes_bit_for_bit(variant, tiny, tmp_path):
    """What a variant adds to the state (adapters, a head, an average, a moving coefficient, a place in the
    demonstrations, a loss scale) is in the checkpoint."""
    config = make_config(**VARIANTS[variant])
    whole = make_loop(tiny, tmp_path / "whole", config)
    whole.run()
    with pytest.raises(Interrupted):
        make_loop(tiny, tmp_path / "parts", config, wrap=stop_after(2)).run()
    resumed = make_loop(tiny, tmp_path / "parts", config)
    resumed.run()
    assert_same_run(resumed, whole)


def test_an_overflow_in_float16_is_no_step_and_halves_the_scale(tiny, tmp_path):
    """The first gradient of the actor overflows, and only that. The critic's is as it should be: a step for each, with
    a scale for both."""
    loop = make_loop(tiny, tmp_path, make_config(precision="float16", rollouts=1, epochs=1))
    trainer = loop.trainer
    trainer.scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=2.0**10).state_dict())
    actor, critic = (list(role.parameters())[-1] for role in trainer.models.values())
    before, overflows = (actor.detach().clone(), critic.detach().clone()), iter([float("inf")])
    actor.register_hook(lambda gradient: gradient * next(overflows, 1.0))
    seen = []
    trainer.optimisers["critic"].adamw.register_step_post_hook(
        lambda *_: seen.append((torch.equal(actor, before[0]), torch.equal(critic, before[1])))
    )
    loop.run()
    assert seen == [(True, False), (False, False)]
    assert trainer.scaler.get_scale() == 2**9
    assert all(torch.isfinite(value).all() for value in state(loop).values())


def test_the_kl_budget_ends_the_stage(straight, tiny, tmp_path):
    """The first rollout over the budget is reported and not learned from, and is the last; those before it are those
    of a run without a budget."""
    measured = [row["objective/kl"] for row in straight.context.metrics.read()]
    budget = measured[1] * 0.99
    over = next(index for index, kl in enumerate(measured) if kl > budget)
    loop = make_loop(tiny, tmp_path, make_config(kl=KLSettings(budget=budget)))
    assert loop.run() == over + 1 == 2
    rows = loop.context.metrics.read()
    assert [row["objective/kl"] for row in rows] == measured[: over + 1]
    assert "policy/approxkl_avg" not in rows[-1]
    assert loop.trainer.num_steps == 4 * over


def test_a_signal_during_the_last_rollout_loses_nothing(straight, tiny, tmp_path):
    """The last rollout ends as usual, with a checkpoint, so that starting again, before the policy was committed, has
    nothing left to train."""
    config = make_config(checkpoint=CheckpointSettings(every_steps=100))
    loop = make_loop(tiny, tmp_path, config, wrap=stop_after(4))
    loop.run()
    assert_same_run(loop, straight)
    again = make_loop(tiny, tmp_path, config)
    again.run()
    assert_same_run(again, straight)


def test_resuming_during_the_warm_up(tiny, tmp_path):
    """A checkpoint from before the actor's first step, when its optimiser has no state, is no exception."""
    config = make_config(critic=CriticSettings(optim=OptimSettings(lr=3e-3), warmup_rollouts=2))
    whole = make_loop(tiny, tmp_path / "whole", config)
    whole.run()
    with pytest.raises(Interrupted):
        make_loop(tiny, tmp_path / "parts", config, wrap=stop_after(1)).run()
    resumed = make_loop(tiny, tmp_path / "parts", config)
    resumed.run()
    assert_same_run(resumed, whole)


def test_resuming_gives_the_engine_the_weights(straight, tiny, tmp_path):
    """An engine with weights of its own samples, after a resume, from the policy of the checkpoint and not from the
    one the stage started with."""
    with pytest.raises(Interrupted):
        make_loop(tiny, tmp_path, wrap=stop_after(2)).run()
    resumed = make_loop(tiny, tmp_path, wrap=OwnWeights)
    resumed.run()
    assert_same_run(resumed, straight)


def test_a_crash_between_checkpoints_repeats_the_rollouts(straight, tiny, tmp_path):
    """Lines that were written after the last checkpoint are dropped and written again, not twice."""
    config = make_config(checkpoint=CheckpointSettings(every_steps=2))
    loop = make_loop(tiny, tmp_path, config)
    rollout = loop.rollout

    def crash(index: int) -> tuple[dict[str, float], bool]:
        if index == 3:
            raise MemoryError
        return rollout(index)

    loop.rollout = crash  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        loop.run()
    assert [row["step"] for row in loop.context.metrics.read()] == [1, 2, 3]
    resumed = make_loop(tiny, tmp_path, config)
    resumed.run()
    assert_same_run(resumed, straight)


def test_a_damaged_checkpoint_is_passed_over(straight, tiny, tmp_path):
    """One flipped bit in the newest checkpoint: the one before it is resumed from, and the end is the same."""
    loop = make_loop(tiny, tmp_path, wrap=stop_after(3))
    with pytest.raises(Interrupted):
        loop.run()
    damage(loop.context.checkpoints, 3)
    resumed = make_loop(tiny, tmp_path)
    assert load_checkpoint(resumed.context, resumed.trainer)[0] == 2
    resumed.run()
    assert_same_run(resumed, straight)


def test_nothing_but_damaged_checkpoints_is_an_error(tiny, tmp_path):
    """Starting again from rollout 0 would silently throw the work away."""
    loop = make_loop(tiny, tmp_path, wrap=stop_after(2))
    with pytest.raises(Interrupted):
        loop.run()
    for rollouts in (1, 2):
        damage(loop.context.checkpoints, rollouts)
    with pytest.raises(ArtifactError, match="no checkpoint verifies"):
        make_loop(tiny, tmp_path).run()


def test_checkpoints_are_bounded_and_hold_no_pickle(straight):
    """Two are kept, the newest; weights and moments are safetensors that say what they are, the rest is JSON."""
    folders = sorted(folder.name for folder in straight.context.checkpoints.iterdir())
    assert folders == ["step-3", "step-4"]
    newest = checkpoint_folder(straight.context.checkpoints, 4)
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
    saved = load_file(newest / "actor.safetensors")
    for name, parameter in straight.trainer.actor.named_parameters():
        assert torch.equal(saved[name], parameter)


def test_the_seed_decides_everything(straight, tiny, tmp_path):
    """The same seed gives the same weights to the last bit, whatever the global random state; another seed others."""
    torch.manual_seed(12345)
    again = make_loop(tiny, tmp_path / "again")
    again.run()
    assert sha256(again) == sha256(straight)
    assert lines(again) == lines(straight)
    other = make_loop(tiny, tmp_path / "other", seed=1)
    other.run()
    assert sha256(other) != sha256(straight)


def test_a_policy_that_is_not_its_reference_is_refused(tiny, tmp_path):
    """R2: the inputs say that policy and reference are the same model; if a weight was lost on the way, the first
    rollout stops before anything is updated."""
    loop = make_loop(tiny, tmp_path)
    with torch.no_grad():
        next(loop.trainer.actor.parameters()).mul_(1.05)
    before = sha256(loop)
    with pytest.raises(NumericError, match="differs from its reference"):
        loop.run()
    assert sha256(loop) == before
