"""What is said to a vLLM server over HTTP, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from align.data.faults import escaped
from align.errors import NumericError, RolloutError
from align.generation.engine import Samples, Sampling
from align.generation.vllm_launch import KEY_VARIABLE
from align.generation.vllm_options import sampling_options

UNKNOWN = -9999.0
"""What the server sends for a log-probability that is not finite: JSON has no number for it."""

LONGEST_MESSAGE = 500
"""Characters of what a server says that go into an error."""


class Unavailable(Exception):
    """The server failed, and another may not."""


@dataclass(frozen=True)
class Response:
    """A sampled response, its stop token included, and the log-probability of each token."""

    ids: list[int]
    logprobs: list[float]


class VllmClient:
    """Asks the server at an address, with its key. Several threads may ask at a time."""

    def __init__(self, address: str, key: str):
        self._client = httpx.Client(
            base_url=address,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )

    def close(self) -> None:
        """Breaks off what is under way."""
        self._client.close()

    def call(self, method: str, path: str, body: Any, timeout: float) -> dict[str, Any]:
        """The server's answer. Raises Unavailable where another try may help, else RolloutError."""
        try:
            response = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.TimeoutException:
            raise Unavailable(f"did not answer within {timeout:g} s") from None
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: closed while under way
            raise Unavailable(f"broke off the connection ({type(error).__name__})") from None
        if response.status_code >= 500:
            raise Unavailable(f"answered {response.status_code}: {_short(response.text)}")
        if not response.is_success:
            hint = f" (the key is read from {KEY_VARIABLE})" if response.status_code == 401 else ""
            raise RolloutError(f"the vLLM server answered {response.status_code}{hint}: {_short(response.text)}")
        if not response.content:
            return {}
        try:
            return response.json()
        except ValueError:
            raise RolloutError("the vLLM server answered something that is not JSON") from None

    def is_ready(self) -> bool:
        """Whether it answers at all."""
        try:
            self.call("GET", "/health", None, timeout=5.0)
        except Unavailable:
            return False
        return True

    def sample(self, ids: Sequence[int], count: int, sampling: Sampling, number: int, timeout: float) -> list[Response]:
        """`count` responses to the prompt of request `number`. Raises Unavailable or RolloutError."""
        body = {"token_ids": list(ids), "sampling_params": sampling_options(sampling, count, number)}
        answer = self.call("POST", "/inference/v1/generate", body, timeout)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            responses = [_response(choice) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise RolloutError(f"the vLLM server answered something else than responses ({error!r})") from None
        if len(responses) != count:
            raise RolloutError(f"the vLLM server gave {len(responses)} responses to {count}")
        return responses

    def ask_workers(self, method: str, *arguments: Any, timeout: float) -> list[dict[str, Any]]:
        """What each worker answers. Raises RolloutError when one answers an error, or there is none of ours."""
        answer = self.call("POST", "/collective_rpc", {"method": method, "args": arguments}, timeout)
        replies = answer.get("results") or [{"error": "no answer: was it started with our worker extension?"}]
        if errors := [reply["error"] for reply in replies if "error" in reply]:
            raise RolloutError(f"the vLLM server does not take the weights: {_short(errors[0])}")
        return replies


def to_samples(responses: Sequence[Response], sampling: Sampling) -> Samples:
    """Responses as padded tensors. Raises NumericError for a log-probability that is not finite."""
    if any(value <= UNKNOWN for one in responses for value in one.logprobs):
        raise NumericError("rollout: log-probabilities of sampled tokens are not finite: the policy has diverged")
    finished = [one.ids[-1] in sampling.stop_ids for one in responses]
    return Samples.of([one.ids for one in responses], [one.logprobs for one in responses], finished, sampling.pad_id)


def _response(choice: dict[str, Any]) -> Response:
    """Raises KeyError, TypeError or ValueError for what is none, Unavailable for one that the server gave up."""
    if choice["finish_reason"] not in {"stop", "length"}:
        raise Unavailable(f"gave up a response ({_short(str(choice['finish_reason']))})")
    tokens = choice["logprobs"]["content"]
    if not tokens or [token["token_id"] for token in tokens] != choice["token_ids"]:
        raise ValueError("token ids and their log-probabilities differ")
    return Response(choice["token_ids"], [float(token["logprob"]) for token in tokens])


def _short(text: str) -> str:
    return escaped(text[:LONGEST_MESSAGE])
