"""vLLM in this process, for real: it samples from the policy as it is now, and says how likely each token was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import ConfigError, RolloutError
from align.generation.engine import RolloutEngine, Sampling, request_seed
from align.generation.open import Sampled, open_engine
from align.generation.rest import ALL
from align.generation.vllm_engine import VllmEngine
from align.generation.vllm_options import cache_bytes
from align.models.roles import causal_role
from align.recipe.engine_settings import EngineSettings
from align.training.parity import ParityGuard
from tests.generation.test_transformers_engine import CHI_SQUARE_4, chi_square
from tests.generation.vllm_models import CONTEXT, END_OF_TURN, EOS, PAD, VOCABULARY, make_model, optimise

PROMPTS = [[5], [6, 7, 8, 9, 10, 11], [12, EOS, 13], [14, 15]]
FLOAT, BRAIN = torch.float32, torch.bfloat16
MEASURED = {FLOAT: 5e-5, BRAIN: 0.15}
"""Above what was measured of these models: 1e-5 and 0.05 nats. The guard's own bounds are for models of any size."""


def sampling(
    max_tokens: int = 12, temperature: float = 1.0, stop_ids: tuple[int, ...] = (EOS,), seed: int = 0
) -> Sampling:
    return Sampling(max_tokens, temperature, stop_ids, PAD, seed)


def open_vllm(model: Any, folder: Path, dtype: torch.dtype = FLOAT) -> VllmEngine:
    return VllmEngine(model, folder, dtype=dtype, max_length=CONTEXT, max_sequences=16)


def guard(engine: VllmEngine, model: Any, dtype: torch.dtype = FLOAT, temperature: float = 0.7) -> ParityGuard:
    return ParityGuard(engine, causal_role(model), PROMPTS, sampling(8, temperature), dtype)


@pytest.fixture
def llama(tmp_path) -> Iterator[tuple[Any, VllmEngine]]:
    model = make_model(tmp_path, "llama", tied=False, dtype=FLOAT)
    with closing(open_vllm(model, tmp_path)) as engine:
        yield model, engine


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_parity_after_twenty_optimiser_steps(kind, tied, dtype, lora, tmp_path):
    """Log-probabilities of sampled tokens, at temperature 0.7, against the policy's own, before and after training."""
    model = make_model(tmp_path, kind, tied, dtype, lora)
    with closing(open_vllm(model, tmp_path, dtype)) as engine:
        check = guard(engine, model, dtype)
        assert check.gap() < MEASURED[dtype]
        optimise(model, 20)
        engine.sync()
        check.check()
        assert check.gap() < MEASURED[dtype]
        assert ("adapter" in engine.summary) is lora and "shared" in engine.summary


def test_weights_of_another_precision_are_copied(tmp_path):
    """Weights in float32, the engine in bfloat16, as under autocast."""
    model = make_model(tmp_path, "llama", True, FLOAT)
    with closing(open_vllm(model, tmp_path, BRAIN)) as engine:
        optimise(model, 3)
        assert engine.differing()
        engine.sync()
        guard(engine, model, BRAIN).check()
        assert "copied" in engine.summary


def test_an_architecture_with_transposed_weights_goes_through_vllms_loader(tmp_path):
    """GPT-2's layers hold their weights transposed, and some are square: shapes cannot tell."""
    model = make_model(tmp_path, "gpt2", True, FLOAT)
    with closing(open_vllm(model, tmp_path)) as engine:
        optimise(model, 3)
        engine.sync()
        assert guard(engine, model).gap() < MEASURED[FLOAT]
        assert "loader" in engine.summary


def test_a_base_in_four_bits(tmp_path):
    """The engine computes with what the 4 bits stand for, plus the adapter."""
    from transformers import AutoModelForCausalLM

    from align.models.lora import add_lora
    from align.models.quantised import adopt_nf4, nf4_config
    from align.recipe.training_settings import LoraSettings

    make_model(tmp_path, "llama", False, FLOAT)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4_config())
    adopt_nf4(base, FLOAT)
    model = add_lora(base, LoraSettings(rank=4, quantise="nf4")).eval()
    optimise(model, 3)
    with closing(open_vllm(model, tmp_path)) as engine:
        assert guard(engine, model).gap() < MEASURED[FLOAT]


@pytest.mark.parametrize("stale", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_handed_over_is_caught_and_named(stale, tmp_path):
    """Planted: the hand-over forgets one weight. The change is far too small to be seen in a log-probability."""
    model = make_model(tmp_path, "llama", False, FLOAT)
    with closing(open_vllm(model, tmp_path)) as engine:
        check = guard(engine, model)
        parameter = dict(model.named_parameters())[stale]
        parameter.data = parameter.data.clone()  # no longer shared
        engine.handover.sync = lambda: None
        optimise(model, 1, lr=1e-7)
        engine.sync()
        assert check.gap() < MEASURED[FLOAT]
        with pytest.raises(RolloutError, match=f"other weights than the policy: {stale.removesuffix('.weight')}$"):
            check.check()


def test_an_engine_that_computes_otherwise_is_caught(llama):
    """Equal weights, and yet other log-probabilities: planted by another temperature on our side."""
    model, engine = llama
    check = guard(engine, model, temperature=0.5)
    engine_sees = engine.generate
    engine.generate = lambda prompts, given: engine_sees(prompts, sampling(given.max_tokens, temperature=2.0))
    try:
        with pytest.raises(
            RolloutError, match=r"differ from the policy's by up to .* nats \(bound in float32: 0.001\)"
        ):
            check.check()
    finally:
        engine.generate = engine_sees


def test_cached_prompts_of_an_older_policy_are_not_used(tmp_path):
    """A prompt over vLLM's block of 128 tokens is cached whole; after an update its keys and values are stale."""
    model = make_model(tmp_path, "llama", True, FLOAT)
    prompt = [3 + number % 50 for number in range(150)]
    with closing(open_vllm(model, tmp_path)) as engine:
        check = ParityGuard(engine, causal_role(model), [prompt, prompt[:140]], sampling(8), FLOAT)
        assert check.gap() < MEASURED[FLOAT]
        optimise(model, 10)
        assert check.gap() > 1e-2, "the cache should be stale here, or this test shows nothing"
        engine.sync()
        assert check.gap() < MEASURED[FLOAT]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_those_of_the_policy(llama, temperature):
    """First tokens of 4000 draws, in five classes of about equal weight, against softmax(logits / temperature)."""
    model, engine = llama
    samples = engine.generate([PROMPTS[1]] * 4000, sampling(1, temperature))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1]
    probabilities = (logits / temperature).softmax(-1)
    classes = (probabilities.sort(descending=True).values.cumsum(0) * 5).long().clamp(max=4)
    by_token = torch.empty(VOCABULARY, dtype=torch.long).scatter_(0, probabilities.argsort(descending=True), classes)
    expected = torch.zeros(5).scatter_add_(0, by_token, probabilities)
    assert chi_square(by_token[samples.token_ids[:, 0]].tolist(), expected[expected > 0]) < CHI_SQUARE_4


def test_a_response_depends_on_its_request_alone(llama):
    """Same seed, same tokens; another seed, others; several of one prompt differ; what else is in the batch is nothing
    to it, as long as its number is the same."""
    _, engine = llama
    together = engine.generate([PROMPTS[0]] * 3 + PROMPTS[1:], sampling()).rows()
    assert engine.generate([PROMPTS[0]] * 3 + PROMPTS[1:], sampling()).rows() == together
    assert engine.generate([PROMPTS[0]] * 3, sampling()).rows() == together[:3]
    assert len({tuple(row) for row in together[:3]}) == 3
    assert engine.generate([PROMPTS[0]] * 3, sampling(seed=1)).rows() != together[:3]


def test_seeds_of_requests_are_far_apart():
    """vLLM counts on from a request's seed for more samples of its prompt: 4096 requests of 3 seeds do not come within
    1000 of each other."""
    seeds = sorted(request_seed(seed, number) for seed in (0, 1, 2**40) for number in range(4096))
    assert min(after - before for before, after in pairwise(seeds)) > 1000
    assert seeds[0] >= 0 and seeds[-1] < 2**63


def test_stop_tokens_lengths_and_padding(llama):
    """Any of the stop tokens ends a response and is its last; a cut one is as long as allowed and not finished."""
    _, engine = llama
    stops = (EOS, END_OF_TURN, *range(20, 60))
    samples = engine.generate([[7]] * 64, sampling(12, stop_ids=stops))
    assert samples.logprobs is not None and samples.finished.any() and not samples.finished.all()
    for row, length, finished, logprobs in zip(
        samples.token_ids.tolist(), samples.lengths.tolist(), samples.finished.tolist(), samples.logprobs, strict=True
    ):
        assert not set(row[: length - 1]) & set(stops)
        assert (row[length - 1] in stops) is finished and (finished or length == 12)
        assert set(row[length:]) <= {PAD}
        assert bool((logprobs[:length] < 0).all()) and not logprobs[length:].any()


def test_more_prompts_than_are_read_at_a_time(tmp_path):
    """64 prompts of 150 tokens are more than vLLM reads in one step. On a CPU it cannot read half a prompt of a request
    that has a seed (its sampler rewinds generators as only CUDA's can), so prompts are read whole."""
    model = make_model(tmp_path, "llama", True, FLOAT)
    prompts = [[3 + (start + number) % 50 for number in range(150)] for start in range(64)]
    with closing(VllmEngine(model, tmp_path, dtype=FLOAT, max_length=CONTEXT, max_sequences=64)) as engine:
        samples = engine.generate(prompts, sampling(4))
    assert samples.lengths.shape == (64,) and samples.logprobs is not None


def test_closing_leaves_the_policy_whole(tmp_path):
    """The policy keeps its values in memory of its own, and can be saved and trained on."""
    model = make_model(tmp_path, "llama", True, FLOAT)
    ids = torch.tensor([PROMPTS[1]])
    engine = open_vllm(model, tmp_path)
    optimise(model, 2)
    before = model(input_ids=ids).logits
    engine.close()
    assert torch.equal(model(input_ids=ids).logits, before)
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(storages) == len(set(storages))


def discard(engine: VllmEngine) -> None:
    """What a GPU does to weights at sleep level 2. vLLM on a CPU goes through the calls, and keeps them."""
    with torch.no_grad():
        for parameter in engine._model().parameters():
            parameter.fill_(float("nan"))


@pytest.mark.parametrize("syncs", [True, False], ids=["sync", "generate"])
def test_weights_given_up_in_a_rest_are_handed_over_again(syncs, tmp_path):
    """The engine sleeps, all its weights turn to NaN, the policy trains; woken by a hand-over or by being asked to
    sample, it is the policy again, and works."""
    model = make_model(tmp_path, "llama", True, FLOAT)
    with closing(open_vllm(model, tmp_path, BRAIN)) as engine:
        check = guard(engine, model, BRAIN)
        engine.resting = ALL
        for _ in range(2):
            engine.rest()
            engine.rest()
            assert engine.llm.llm_engine.is_sleeping()
            discard(engine)
            assert engine.differing() == []
            optimise(model, 2)
            if syncs:
                engine.sync()
            check.gap()
            check.check()
            assert not engine.llm.llm_engine.is_sleeping()


def test_an_engine_on_a_cpu_keeps_what_it_has(tmp_path):
    """With `auto` a rest is nothing; a setting that asks for more is an error, also where the engine is ours to
    choose."""
    model = make_model(tmp_path, "llama", True, FLOAT)
    with closing(open_vllm(model, tmp_path)) as engine:
        expected = engine.generate(PROMPTS, sampling()).rows()
        engine.rest()
        assert not engine.llm.llm_engine.is_sleeping() and engine.summary == "20 weights shared"
        assert engine.generate(PROMPTS, sampling()).rows() == expected
    what = Sampled(model, tmp_path, FLOAT, max_length=32, batch_size=4)
    with pytest.raises(ConfigError, match=r"rollout\.sleep cache: vLLM gives up memory on a GPU only"):
        open_engine(EngineSettings(engine="auto", sleep="cache"), what, notice=print)


def test_bytes_of_the_cache(tmp_path):
    """2 (keys, values) x 2 layers x 1 head x 32 x 4 bytes = 512 a token in float32, half in bfloat16; 3 sequences of
    129 tokens take two blocks of 128 each."""
    config = make_model(tmp_path, "llama", True, FLOAT).config
    assert [cache_bytes(config, dtype, 129, 3) for dtype in (FLOAT, BRAIN)] == [768 * 512, 768 * 256]


def narrow(folder: Path) -> Any:
    """A model with heads of 16, for which vLLM has no kernel on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **sizes))
    model.save_pretrained(folder)
    return model


def opened(engine: str, model: Any, folder: Path) -> tuple[RolloutEngine, list[str]]:
    """The engine that a recipe gets, and what it is told about it."""
    notices: list[str] = []
    what = Sampled(model, folder, FLOAT, max_length=32, batch_size=4)
    return open_engine(EngineSettings(engine=engine), what, notice=notices.append), notices


def test_a_model_that_vllm_cannot_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"engine vllm cannot run .*head"):
        opened("vllm", narrow(tmp_path), tmp_path)


def test_auto_falls_back_and_says_why(tmp_path):
    engine, notices = opened("auto", narrow(tmp_path), tmp_path)
    assert engine.name == "transformers"
    assert len(notices) == 1 and notices[0].startswith("transformers, because ") and "head" in notices[0]


def test_auto_takes_vllm_where_it_can(tmp_path):
    engine, notices = opened("auto", make_model(tmp_path, "llama", True, FLOAT), tmp_path)
    with closing(engine):
        assert (engine.name, notices) == ("vllm", [])


def test_an_engine_that_fails_is_started_again(monkeypatch, tmp_path):
    """In the middle of sampling, on the policy as it is by then, and samples the same; one restart is allowed, so a
    second failure in a row is the end. (A new engine tries itself with a single request, which does not fail.)"""
    model, notices = make_model(tmp_path, "llama", True, FLOAT), []
    what = Sampled(model, tmp_path, FLOAT, max_length=32, batch_size=4)
    settings = EngineSettings(engine="vllm", max_restarts=1)
    with closing(open_engine(settings, what, notice=notices.append)) as engine:
        kind = type(engine._engine.llm.llm_engine)  # type: ignore[attr-defined]
        failures, step = 0, kind.step

        def planted(inner: Any) -> Any:
            nonlocal failures
            if failures and inner.get_num_unfinished_requests() > 1:
                failures -= 1
                raise ZeroDivisionError("planted")
            return step(inner)

        monkeypatch.setattr(kind, "step", planted)
        optimise(model, 3)
        engine.sync()
        expected = engine.generate(PROMPTS, sampling()).rows()
        failures = 1
        assert engine.generate(PROMPTS, sampling()).rows() == expected
        assert notices == ["sampling with vLLM failed: ZeroDivisionError: planted; starting it again"]
        assert not engine.differing()
        failures = 2
        with pytest.raises(RolloutError, match="sampling with vLLM failed: ZeroDivisionError: planted"):
            engine.generate(PROMPTS, sampling())
        assert len(notices) == 2


def test_a_prompt_that_does_not_fit_is_refused(llama):
    _, engine = llama
    with pytest.raises(ConfigError, match="a prompt of 190 tokens and a response of 12 do not fit the engine's 192"):
        engine.generate([[5] * 190], sampling())
