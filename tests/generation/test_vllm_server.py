"""Rollouts from a vLLM server: exact before and after every hand-over, and the same when the server died on the way.

A real server on the CPU. It takes seconds to start, so tests share two: one with tied embeddings, one without.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.errors import ConfigError, NumericError, RolloutError
from align.generation.engine import Samples, Sampling
from align.generation.open import Sampled, open_engine
from align.generation.transport import buckets
from align.generation.vllm_client import Response, to_samples
from align.generation.vllm_process import ServerProcess, wait_gone
from align.generation.vllm_server import Timeouts, VllmServerEngine
from align.recipe.engine_settings import EngineSettings
from tests.generation.conftest import END_OF_TURN, EOS, PAD

PATIENT = Timeouts(start=400, answer=200, sync=200)
"""Other processes may keep the machine busy."""

PROMPTS = [[5, 6, 7]] * 4 + [[8, 9]] + [[number, EOS, PAD, 11] for number in range(3, 40)] + [[5, 6, 7]] * 20
"""Runs of equal prompts, one of them longer than what the server computes at a time, and prompts that hold EOS."""

EXACT = 1e-4
"""Bound of differences between log-probabilities. Rounding alone makes 1.4e-5 with these weights (a forward in float32
against one in float64), and 1.1e-5 between two rounds without a fault: batches are formed as requests arrive."""


def sampling(seed: int = 0, max_tokens: int = 12, temperature: float = 0.8) -> Sampling:
    return Sampling(max_tokens, temperature, (EOS, END_OF_TURN), PAD, seed)


def new_model(folder: Path, *, is_tied: bool) -> LlamaForCausalLM:
    """Grouped queries, and a vocabulary that vLLM pads (45 is no multiple of 64). Its attention on a CPU wants heads
    of at least 32."""
    config = LlamaConfig(
        vocab_size=45,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@dataclass
class Served:
    """A policy and the server that samples from it."""

    model: LlamaForCausalLM
    engine: VllmServerEngine
    notices: list[str] = field(default_factory=list)

    def change(self, seed: int) -> None:
        """Gives every parameter new values. Wide, so that the policy is sure of something and each one matters."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                scale = 0.3 if parameter.dim() == 2 else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        self.engine.sync()

    def worst(self, samples: Samples, temperature: float = 0.8) -> float:
        """The largest difference of a log-probability from the policy's own."""
        return max(
            float((self.own(prompt, response, temperature) - samples.logprobs[row, : len(response)]).abs().max())
            for row, (prompt, response) in enumerate(zip(PROMPTS, samples.rows(), strict=True))
        )

    @torch.no_grad()
    def own(self, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
        """Log-probabilities (T) by one forward of the sequence alone."""
        logits = self.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(response)[:, None]
        return (logits / temperature).log_softmax(-1).gather(1, chosen)[:, 0]


def new_engine(folder: Path, weights: Any, **options: Any) -> VllmServerEngine:
    """A server of this size for the model of a folder."""
    return VllmServerEngine(folder, weights, dtype=torch.float32, max_length=64, max_sequences=8, **options)


def serve(folder: Path, *, is_tied: bool, **options: Any) -> Served:
    model = new_model(folder, is_tied=is_tied)
    notices: list[str] = []
    engine = new_engine(
        folder,
        model.named_parameters,
        timeouts=PATIENT,
        max_restarts=2,
        **options,
        log=folder / "server.log",
        notice=notices.append,
    )
    return Served(model, engine, notices)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    """With tied embeddings."""
    one = serve(tmp_path_factory.mktemp("tied"), is_tied=True)
    yield one
    one.engine.close()


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Iterator[Served]:
    """Without, and with a copy of the policy for a server that fails while the policy changes."""
    one = serve(tmp_path_factory.mktemp("untied"), is_tied=False, keeps_policy=True)
    yield one
    one.engine.close()


@pytest.mark.parametrize("which", ["served", "untied"])
def test_log_probabilities_are_the_policys_whatever_its_weights(which, request):
    """Every parameter is replaced twice; fused projections, padded vocabulary and tied embeddings all follow."""
    one: Served = request.getfixturevalue(which)
    rows = []
    for seed in (1, 2):
        one.change(seed)
        samples = one.engine.generate(PROMPTS, sampling())
        assert one.worst(samples) < EXACT
        rows.append(samples.rows())
    assert rows[0] != rows[1]


def test_a_server_may_divide_each_layer_over_two_workers(tmp_path):
    """Each takes its part of every weight, of the fused projections and of the vocabulary too: heads, and rows of
    embeddings, are here and there. Both have them after each hand-over."""
    one = serve(tmp_path, is_tied=False, tensor_parallel=2)
    try:
        assert len(one.engine.client.ask_workers("align_place", timeout=PATIENT.sync)) == 2
        for seed in (1, 2):
            one.change(seed)
            assert one.worst(one.engine.generate(PROMPTS, sampling())) < EXACT
    finally:
        one.engine.close()


def test_the_way_of_the_weights_is_named(served):
    """Chosen from what the workers say of themselves: on a CPU memory is the only one."""
    assert served.engine.summary == "weights sent to a server through memory"


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_a_way_that_a_cpu_has_not_is_refused_at_once(transport, tmp_path):
    what = Sampled(new_model(tmp_path, is_tied=True), tmp_path, torch.float32, max_length=32, batch_size=4)
    settings = EngineSettings(engine="vllm-server", transport=transport)
    with pytest.raises(ConfigError, match=rf"rollout\.transport {transport}: the policy is on the CPU; use auto"):
        open_engine(settings, what, notice=print, log=tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_weights_count_from_their_hand_over(served):
    """Before `sync` the server still has the policy of the last one, and what it cached of it; after it, not."""
    served.change(1)
    before = served.engine.generate(PROMPTS, sampling())
    with torch.no_grad():
        served.model.model.norm.weight.mul_(1.5)
    stale = served.engine.generate(PROMPTS, sampling())
    assert stale.rows() == before.rows()
    assert served.worst(stale) > 0.01
    served.engine.sync()
    assert served.worst(served.engine.generate(PROMPTS, sampling())) < EXACT


def test_the_seed_decides_the_samples(served):
    """The same seed gives the same tokens, another one others, and equal prompts have responses of their own."""
    served.change(3)
    draws = [served.engine.generate(PROMPTS, sampling(seed)).rows() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    same_prompt = [tuple(row) for row, prompt in zip(draws[0], PROMPTS, strict=True) if prompt == [5, 6, 7]]
    assert len(set(same_prompt)) > len(same_prompt) // 2


def test_responses_end_with_a_stop_token_or_at_the_cap(served):
    """Ids after the first stop token are PAD, their log-probabilities 0; `finished` says which responses have one."""
    served.change(4)
    samples = served.engine.generate(PROMPTS, sampling())
    assert 0 < samples.finished.sum() < len(PROMPTS)
    for row, finished in zip(samples.rows(), samples.finished.tolist(), strict=True):
        assert (row[-1] in (EOS, END_OF_TURN)) == finished
        assert not {EOS, END_OF_TURN} & set(row[:-1])
        assert finished or len(row) == 12
    past = torch.arange(samples.token_ids.shape[1]) >= samples.lengths[:, None]
    assert samples.logprobs is not None
    assert (samples.token_ids[past] == PAD).all() and (samples.logprobs[past] == 0).all()


def test_a_prompt_that_does_not_fit_is_refused(served):
    """Else the server would cut the response short of its cap without a word."""
    with pytest.raises(ConfigError, match="60 tokens and a response of 12 do not fit the engine's 64"):
        served.engine.generate([[5] * 60], sampling())


def test_a_weight_that_is_not_handed_over_is_an_error(served, monkeypatch):
    """It would be random. The server goes on, and takes whole policies."""
    partial = [(name, one) for name, one in served.model.named_parameters() if name != "model.norm.weight"]
    with monkeypatch.context() as patched:
        patched.setattr(served.engine._sender, "_weights", lambda: partial)
        with pytest.raises(RolloutError, match=r"was not given model\.norm\.weight"):
            served.engine.sync()
        wrong = [(name, one[:3]) for name, one in served.model.named_parameters()]
        patched.setattr(served.engine._sender, "_weights", lambda: wrong)
        with pytest.raises(RolloutError, match="does not take the weights"):
            served.engine.sync()
    assert not served.notices
    served.change(5)
    assert served.worst(served.engine.generate(PROMPTS, sampling())) < EXACT


def test_weights_may_come_in_parts(served, monkeypatch):
    """A policy larger than what is on its way at a time."""
    monkeypatch.setattr("align.generation.transport.BUCKET_BYTES", 20_000)
    assert len(list(buckets(served.model.named_parameters(), torch.float32))) > 5
    served.change(6)
    assert served.worst(served.engine.generate(PROMPTS, sampling())) < EXACT


def test_nobody_else_can_reach_it(served):
    """It listens on this machine only, every path wants the key, and the key is in no log and no list of processes."""
    server = served.engine.server
    listening = [
        connection.laddr.ip
        for process in server.members()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for path in ("/collective_rpc", "/update_weights", "/inference/v1/generate", "/health", "/server_info"):
            answer = httpx.post(server.address + path, headers=headers, json={}, trust_env=False)
            assert answer.status_code == 401
    assert server.key not in served.engine.log.read_text()
    assert not any(server.key in " ".join(process.cmdline()) for process in server.members())


def kill_worker(server: ServerProcess) -> None:
    """The process at the bottom, that computes."""
    server.members()[-1].kill()


def stop_server(server: ServerProcess) -> None:
    """The process at the top: connections stay open, and nothing answers."""
    os.kill(server.members()[0].pid, signal.SIGSTOP)


@pytest.mark.parametrize("fault", [kill_worker, stop_server])
def test_a_server_that_fails_in_a_round_changes_nothing(fault, served, monkeypatch):
    """With some responses there and some under way the server is killed, or hangs. The round has the same tokens as
    without the fault, from a server that was given the policy again, and nothing of the old one is left."""
    served.change(7)
    expected = served.engine.generate(PROMPTS, sampling())
    old, sample, answered = served.engine.server, served.engine._sample, []

    def failing(*asked):
        if len(answered) == 3:
            fault(old)
            served.engine.timeouts = Timeouts(PATIENT.start, 3.0, PATIENT.sync)
        answered.append(asked)
        return sample(*asked)

    def patient_again(text):
        served.notices.append(text)
        served.engine.timeouts = PATIENT

    processes = old.members()
    monkeypatch.setattr(served.engine, "_sample", failing)
    monkeypatch.setattr(served.engine, "_notice", patient_again)
    samples = served.engine.generate(PROMPTS, sampling())
    assert len(served.notices) == 1 and "starting it again" in served.notices.pop()
    assert served.engine.server is not old
    assert samples.rows() == expected.rows()
    torch.testing.assert_close(samples.logprobs, expected.logprobs, rtol=0, atol=EXACT)
    assert served.worst(samples) < EXACT
    assert not any(process.is_running() for process in processes)


def test_restarts_are_bounded(served, monkeypatch):
    """A server that dies, and does not come up again: one restart that is allowed, exit code 71, the cause, the end of
    the log, and no process. When what was wrong is put right, the next round is as ever."""
    served.change(8)
    expected, processes = served.engine.generate(PROMPTS, sampling()), served.engine.server.members()
    with monkeypatch.context() as patched:
        patched.setattr(served.engine, "_options", ["--no-such-option"])
        patched.setattr(served.engine, "max_restarts", 1)
        kill_worker(served.engine.server)
        with pytest.raises(RolloutError, match=r"ended while it started \(exit code 2\)") as caught:
            served.engine.generate(PROMPTS, sampling())
    assert len(served.notices) == 1 and served.notices.pop()
    assert caught.value.exit_code == 71
    assert f"its log {served.engine.log} ends:" in str(caught.value) and "no-such-option" in str(caught.value)
    assert not any(process.is_running() for process in processes) and served.engine.server is None
    assert served.engine.generate(PROMPTS, sampling()).rows() == expected.rows()


def test_a_server_that_samples_ahead_fails_while_the_policy_changes(untied, monkeypatch):
    """In a thread of its own. The server that is started again has the policy of the last hand-over and not the one
    that is in the making, so the round has the same tokens; and it outlives the thread. At the end the engine is closed
    while it samples: that is an error, and no server is started any more."""
    untied.change(9)
    engine, old = untied.engine, untied.engine.server
    expected = engine.generate(PROMPTS, sampling()).rows()
    with torch.no_grad():
        for parameter in untied.model.parameters():
            parameter.mul_(1.5)
    kill_worker(old)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(engine.generate, PROMPTS, sampling()).result().rows() == expected
    assert len(untied.notices) == 1 and "starting it again" in untied.notices.pop()
    new = engine.server
    assert engine.generate(PROMPTS, sampling()).rows() == expected
    assert engine.server is new is not old and not untied.notices
    sample, is_under_way, is_closed = engine._sample, threading.Event(), threading.Event()

    def late(*asked):
        is_under_way.set()
        is_closed.wait()
        return sample(*asked)

    monkeypatch.setattr(engine, "_sample", late)
    with ThreadPoolExecutor(1) as pool:
        samples = pool.submit(engine.generate, PROMPTS, sampling())
        is_under_way.wait()
        engine.close()
        is_closed.set()
        with pytest.raises(RolloutError, match="was ended while it sampled"):
            samples.result()
    assert engine.server is None and new.members() == [] and not untied.notices


STARTS_AND_WAITS = """
import sys, time
from pathlib import Path
import httpx
from align.generation.vllm_process import ServerProcess
server = ServerProcess(sys.argv[2:], Path(sys.argv[1]))
server.start()
while True:
    try:
        httpx.get(server.address + "/health", trust_env=False)
        break
    except httpx.TransportError:
        time.sleep(0.3)
print(server.members()[0].pid, flush=True)
sys.stdin.read()
"""


def test_a_server_does_not_outlive_a_parent_that_is_killed(served, tmp_path):
    """SIGKILL leaves the parent no time for anything."""
    command = [sys.executable, "-c", STARTS_AND_WAITS, str(tmp_path / "log"), *served.engine._options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        parent.kill()
    assert wait_gone(group, 20.0) == []


def test_nothing_is_left_after_close(tmp_path):
    """Not of a server that is still starting, neither: no process, no file in memory, no socket, no log of ours."""
    server = ServerProcess(["--model", str(tmp_path)], tmp_path / "log")
    server.start()
    (first,) = server.members()
    temporary = server._temporary
    assert temporary.is_dir()
    server.kill()
    assert not first.is_running() and not temporary.exists() and server.members() == []


def test_a_server_that_does_not_start_says_why(tmp_path):
    """Exit code 71, the log's name and its last lines: here a model that vLLM does not know. It is not tried again."""
    new_model(tmp_path, is_tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Unheard"]}))
    notices: list[str] = []
    with pytest.raises(RolloutError, match="ended while it started") as caught:
        new_engine(
            tmp_path,
            dict,
            timeouts=PATIENT,
            log=tmp_path / "log",
            notice=notices.append,
        )
    assert caught.value.exit_code == 71
    assert str(tmp_path / "log") in str(caught.value) and "Unheard" in (tmp_path / "log").read_text()
    assert notices == []


class Broken(BaseHTTPRequestHandler):
    """A server of somebody else's that is ready, takes weights and then answers nothing but 500."""

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/collective_rpc":
            self._answer(200, {"results": [{"missing": []}]})
        elif self.path == "/reset_prefix_cache":
            self._answer(200, {"success": True})
        else:
            self._answer(500, {"error": "dead"})

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def broken() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_a_server_at_an_address_is_given_up(max_restarts, broken, tmp_path, monkeypatch):
    """One that fails again and again, after as many further tries, with exit code 71 and the cause, and without the
    key."""
    monkeypatch.setenv("VLLM_API_KEY", "very-secret")
    model, notices = new_model(tmp_path, is_tied=True), []
    engine = new_engine(
        tmp_path,
        model.named_parameters,
        address=broken,
        max_restarts=max_restarts,
        notice=notices.append,
    )
    with pytest.raises(RolloutError, match=r"answered 500: \{.*dead") as caught:
        engine.generate([[5]], sampling())
    assert len(notices) == max_restarts
    assert caught.value.exit_code == 71 and broken in str(caught.value)
    assert "very-secret" not in str(caught.value) + "".join(notices)
    engine.close()


def test_a_server_that_is_not_there_is_waited_for_and_given_up(tmp_path):
    """At an address where nobody listens."""
    new_model(tmp_path, is_tied=True)
    with pytest.raises(RolloutError, match=r"at http://127.0.0.1:9 was not ready within 0.3 s"):
        new_engine(
            tmp_path,
            dict,
            address="http://127.0.0.1:9",
            timeouts=Timeouts(start=0.3),
        )


def test_what_is_not_finite_is_no_sample():
    """The server sends -9999 for NaN: JSON has no number for it."""
    with pytest.raises(NumericError, match="diverged"):
        to_samples([Response([5, EOS], [-1.0, -9999.0])], sampling())


def test_tied_weights_may_be_given_twice():
    """Under two names of one memory, which is what a state dict of a tied model holds."""
    one = torch.ones(2, 3)
    (bucket,) = buckets([("embedding", one), ("head", one)], torch.bfloat16)
    assert bucket["head"].data_ptr() != bucket["embedding"].data_ptr()
    assert bucket["head"].dtype is torch.bfloat16
