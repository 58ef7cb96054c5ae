"""Rewards by HTTP: an endpoint that is given responses and answers with their scores. Torch-free.

It is sent, by POST, the fields of a RewardBatch as JSON:

    {"prompts": [...], "messages": [...], "responses": [...], "response_ids": [...], "finished": [...]}

and answers {"scores": [...]}: one number per response, or one list per response with a number for each of its tokens.

An endpoint that is down, slow or busy (connection errors, timeouts, 429, 5xx) is asked again, and then given up
(RolloutError: run again later). One that answers something else is wrong (ConfigError), and is not asked again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from align.data.faults import escaped
from align.errors import ConfigError, Interrupted, Problem, RolloutError
from align.rewards.batch import RewardBatch, Values, checked
from align.rewards.settings import RewardTerm

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
"""Seconds between two tries: the first wait, doubled from try to try, and the most, whatever the endpoint asks for."""

BYTES_PER_NUMBER, MORE_BYTES = 64, 65_536
"""An answer may have this many bytes for each number that it can hold, and these in addition."""

WANTED = 'wanted {"scores": [...]}'


def pause(seconds: float, should_stop: Callable[[], bool]) -> None:
    """Sleeps, but not longer than a tenth of a second after a stop was asked for."""
    end = time.monotonic() + seconds
    while not should_stop() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


class RemoteReward:
    """The endpoint of a reward term; `where` is the term's place in the recipe.

    A stop ends a wait between two tries; a request that is under way ends by its answer or its timeout. `notice` is
    given a line about each failed try. Proxies and credentials of the environment are not used; redirects are not
    followed. Raises ConfigError when the token's environment variable is not set.
    """

    def __init__(
        self,
        settings: RewardTerm,
        where: str,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        notice: Callable[[str], None] = lambda text: None,
        pause: Callable[[float, Callable[[], bool]], None] = pause,
    ):
        self.settings, self.where = settings, where
        self.should_stop, self.notice, self.pause = should_stop, notice, pause
        try:
            self.url = httpx.URL(settings.url or "")
        except httpx.InvalidURL as error:
            raise ConfigError(Problem(where, f"url is not one: {error}")) from error
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if settings.token_variable is not None:
            headers["Authorization"] = f"Bearer {_token(settings.token_variable, where)}"
        self.client = httpx.Client(
            headers=headers, timeout=settings.timeout, trust_env=False, verify=True, follow_redirects=False
        )

    @property
    def shown(self) -> str:
        """The URL for messages, without the query: it may hold a secret. (The recipe refuses a user name in it.)"""
        return str(self.url.copy_with(query=None, fragment=None))

    def __call__(self, batch: RewardBatch) -> Values:
        """Scores of the batch, `batch_size` responses per request.

        Raises RolloutError when the endpoint cannot be reached, Interrupted when a stop is asked for while waiting,
        ConfigError for an answer that is none, NumericError for a score that is not finite.
        """
        size = self.settings.batch_size
        scores: list[object] = []
        for start in range(0, len(batch), size):
            scores += self._scores(batch.part(start, start + size))
        return checked(scores, batch, f"{self.where}: {self.shown}")

    def close(self) -> None:
        """Gives back the connections."""
        self.client.close()

    def _scores(self, part: RewardBatch) -> list[object]:
        numbers = sum(max(len(ids), 1) for ids in part.response_ids)
        body = self._post(json.dumps(vars(part)).encode(), MORE_BYTES + BYTES_PER_NUMBER * numbers)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise self._wrong("answered something that is not JSON", WANTED) from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._wrong('answered without a list of "scores"', WANTED)
        if len(scores) != len(part):
            raise self._wrong(f"gave {len(scores)} scores for {len(part)} responses", WANTED)
        return scores

    def _post(self, content: bytes, limit: int) -> bytes:
        """The answer, of at most `limit` bytes, after as many tries as it takes and the settings allow."""
        tries, backoff = 0, FIRST_WAIT
        while True:
            try:
                return self._try(content, limit)
            except _Unavailable as failure:
                tries += 1
                if tries > self.settings.retries:
                    again = "when it answers again, run the same command to continue"
                    raise RolloutError(
                        f"{self.where}: {self.shown} {failure}; gave up after {tries} tries ({again})"
                    ) from None
                seconds = min(max(backoff, failure.wait), LONGEST_WAIT)
                self.notice(f"{self.where}: {self.shown} {failure}; trying again in {seconds:g} s")
            self.pause(seconds, self.should_stop)
            if self.should_stop():
                raise Interrupted(
                    f"{self.where}: stopped while waiting for {self.shown}; run the same command to continue"
                )
            backoff *= 2

    def _try(self, content: bytes, limit: int) -> bytes:
        timeout = self.settings.timeout
        deadline = time.monotonic() + timeout
        body = bytearray()
        try:
            with self.client.stream("POST", self.url, content=content) as response:
                self._check_status(response)
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > limit:
                        raise self._wrong(f"answered more than {limit} bytes", WANTED)
                    if time.monotonic() > deadline:  # httpx counts from byte to byte
                        raise _Unavailable(f"did not answer within {timeout:g} s")
        except httpx.TimeoutException:
            raise _Unavailable(f"did not answer within {timeout:g} s") from None
        except httpx.ConnectError as error:
            raise _Unavailable(f"cannot be reached: {escaped(str(error))}") from None
        except httpx.TransportError:  # its text may quote what the endpoint sent
            raise _Unavailable("broke off the connection, or does not speak HTTP") from None
        return bytes(body)

    def _check_status(self, response: httpx.Response) -> None:
        """Raises for every answer that is not a success."""
        status = response.status_code
        if status == httpx.codes.TOO_MANY_REQUESTS or status >= 500:
            raise _Unavailable(f"answered {_status(status)}", _seconds(response.headers.get("Retry-After", "")))
        if 300 <= status < 400:
            raise self._wrong(f"answered {_status(status)}", "redirects are not followed: set url to where it leads")
        if not response.is_success:
            credentials = status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}
            hint = "the bearer token is read from the variable named by token_variable" if credentials else ""
            raise self._wrong(f"answered {_status(status)}", hint)

    def _wrong(self, what: str, hint: str = "") -> ConfigError:
        return ConfigError(Problem(f"{self.where}: {self.shown}", what, hint))


class _Unavailable(Exception):
    """A try failed and another may not. `wait` is how many seconds the endpoint asks to be left alone."""

    def __init__(self, what: str, wait: float = 0.0):
        super().__init__(what)
        self.wait = wait


def _token(variable: str, where: str) -> str:
    token = os.environ.get(variable, "")
    if not token:
        raise ConfigError(
            Problem(where, f"the environment variable {variable} is not set", "it holds the bearer token")
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # else httpx would refuse it, and quote it
        raise ConfigError(
            Problem(where, f"the environment variable {variable} holds spaces, line ends or other non-ASCII")
        )
    return token


def _status(status: int) -> str:
    return f"{status} {httpx.codes.get_reason_phrase(status)}".strip()


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header, which is a number of them or a date; 0 when it is neither."""
    if re.fullmatch(r"\d{1,9}", retry_after):
        return float(retry_after)
    try:
        return (parsedate_to_datetime(retry_after).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
