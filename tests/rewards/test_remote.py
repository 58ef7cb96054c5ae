"""Rewards by HTTP, against a real server on the loopback interface."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align.errors import AlignError, ConfigError, Interrupted, NumericError, RolloutError
from align.rewards.batch import RewardBatch
from align.rewards.remote import RemoteReward, pause
from align.rewards.settings import RewardTerm

WHERE = "ppo.reward.judge"
BATCH = RewardBatch(
    prompts=[f"prompt {number}" for number in range(5)],
    messages=[[{"role": "user", "content": f"prompt {number}"}] for number in range(5)],
    responses=[f"réponse {number}" for number in range(5)],
    response_ids=[[number] * (number + 1) for number in range(5)],
    finished=[True, True, True, True, False],
)
TOKEN = "tok-3f9c"


class Server(ThreadingHTTPServer):
    """Gives the answers of `script` in turn, and the last one from then on; an answer writes to the handler."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.requests: list[tuple[str, dict[str, str], dict]] = []
        self.done = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), self.asked))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, format: str, *args: object) -> None:
        pass


def answer(status: int = 200, body: bytes | str = b"", **headers: str) -> Callable[[Handler], None]:
    """An answer with this status, body and headers."""
    content = body.encode() if isinstance(body, str) else body

    def send(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return send


def lengths(handler: Handler) -> None:
    """A score for each response: its number of tokens."""
    answer(200, json.dumps({"scores": [len(ids) for ids in handler.asked["response_ids"]]}))(handler)


def per_token(handler: Handler) -> None:
    """A score for each token: its id."""
    answer(200, json.dumps({"scores": handler.asked["response_ids"]}))(handler)


def hang(handler: Handler) -> None:
    """No answer until the test is over."""
    handler.server.done.wait()


def drip(handler: Handler) -> None:
    """A byte now and then, for ever: no single read times out."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.done.wait(0.02):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


def hang_up(handler: Handler) -> None:
    """The connection is closed without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def tear_off(handler: Handler) -> None:
    """The body is shorter than announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1, 2')
    handler.close_connection = True


def no_http(handler: Handler) -> None:
    """Something that is not HTTP, quoting the token."""
    handler.wfile.write(f"hello {handler.headers.get('Authorization')}\r\n\r\n".encode())
    handler.close_connection = True


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def remote(server):
    """Makes the reward of the server; waits are written down in `pauses` instead of being waited for."""
    made: list[RemoteReward] = []

    def make(*script: Callable[[Handler], None], url: str | None = None, **settings):
        server.script[:] = script
        term = RewardTerm.model_validate({"url": url or server.url, "timeout": 5.0} | settings)
        pauses: list[float] = []
        notices: list[str] = []
        reward = RemoteReward(term, WHERE, notice=notices.append, pause=lambda seconds, _: pauses.append(seconds))
        made.append(reward)
        return reward, pauses, notices

    yield make
    for reward in made:
        reward.close()


def problem(error: pytest.ExceptionInfo[AlignError], server: Server) -> str:
    """The error's text behind the term's place and the endpoint: one line, without the query of the URL."""
    text = str(error.value)
    start = f"{WHERE}: {server.url}"
    assert text.startswith(start) and "\n" not in text
    return text[len(start) :].lstrip(": ")


def test_what_is_sent_and_what_comes_back(server, remote):
    """All fields of the batch as JSON, one score per response."""
    reward, pauses, _ = remote(lengths)
    assert reward(BATCH) == [1.0, 2.0, 3.0, 4.0, 5.0]
    ((path, headers, asked),) = server.requests
    assert path == "/score" and headers["Content-Type"] == "application/json"
    assert asked == vars(BATCH)
    assert "Authorization" not in headers and not pauses


def test_scores_of_tokens(remote):
    """A process reward: one list per response."""
    assert remote(per_token)[0](BATCH) == [[float(one) for one in ids] for ids in BATCH.response_ids]


def test_batches(server, remote):
    """batch_size responses per request, in order."""
    reward, _, _ = remote(lengths, batch_size=2)
    assert reward(BATCH) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [asked["responses"] for _, _, asked in server.requests] == [
        BATCH.responses[:2],
        BATCH.responses[2:4],
        BATCH.responses[4:],
    ]


def test_answers_of_two_kinds(remote):
    """A batch that is scored by response and one that is scored by token do not make a reward."""
    with pytest.raises(ConfigError, match=r"response 3 of 5 .* got a number where others got a list"):
        remote(per_token, lengths, batch_size=2)[0](BATCH)


@pytest.mark.parametrize("failure", [answer(500), answer(503), answer(599), answer(429), hang_up, tear_off, no_http])
def test_a_failure_that_passes(server, remote, failure):
    """Busy, broken or cut off: asked again after half a second, with a line about it, and the scores are right."""
    reward, pauses, notices = remote(failure, lengths)
    assert reward(BATCH) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert pauses == [0.5]
    assert len(notices) == 1 and notices[0].startswith(f"{WHERE}: {server.url} ") and "again in 0.5 s" in notices[0]


@pytest.mark.parametrize("failure", [hang, drip])
def test_no_answer_in_time(server, remote, failure):
    """The timeout counts for the whole answer, so that a trickle does not hold the run for ever."""
    reward, pauses, _ = remote(failure, timeout=0.15, retries=1)
    with pytest.raises(RolloutError) as error:
        reward(BATCH)
    assert problem(error, server).startswith("did not answer within 0.15 s; gave up after 2 tries")
    assert pauses == [0.5] and len(server.requests) == 2


def test_waits_double_up_to_a_minute(server, remote):
    """0.5 s doubled from try to try, at most 60; after the last try exit code 71."""
    reward, pauses, _ = remote(answer(503), retries=9)
    with pytest.raises(RolloutError) as error:
        reward(BATCH)
    assert problem(error, server).startswith("answered 503 Service Unavailable; gave up after 10 tries")
    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert error.value.exit_code == 71


def test_waits_start_anew(remote):
    """Each request has its own tries and starts with the shortest wait."""
    reward, pauses, _ = remote(answer(503), lengths, answer(503), answer(503), lengths, batch_size=4, retries=2)
    assert reward(BATCH) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert pauses == [0.5, 0.5, 1]


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        ("7", 7),
        ("0", 0.5),
        ("100000", 60),
        ("-3", 0.5),
        ("soon", 0.5),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.5),
        ("Fri, 21 Oct 2155 07:28:00 GMT", 60),
    ],
)
def test_retry_after(remote, asked, waited):
    """Respected as seconds and as a date, between our own wait and a minute; nonsense is passed over."""
    reward, pauses, _ = remote(answer(429, Retry_After=asked), lengths)
    reward(BATCH)
    assert pauses == [waited]


def test_no_retries(server, remote):
    """retries: 0 asks once."""
    reward, pauses, _ = remote(answer(500), retries=0)
    with pytest.raises(RolloutError, match="gave up after 1 tries"):
        reward(BATCH)
    assert not pauses and len(server.requests) == 1


def test_nobody_listens(remote):
    """Connection refused: tried again, then exit code 71 with what the system said."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    reward, pauses, _ = remote(url=f"http://127.0.0.1:{port}/score?key=hidden", retries=2)
    with pytest.raises(RolloutError, match=rf"http://127\.0\.0\.1:{port}/score cannot be reached: .*refused"):
        reward(BATCH)
    assert pauses == [0.5, 1]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (answer(404), "answered 404 Not Found"),
        (answer(422, "no"), "answered 422 Unprocessable Entity"),
        (answer(401), "answered 401 Unauthorized (the bearer token is read from the variable named by token_variable"),
        (answer(307, Location="/other"), "answered 307 Temporary Redirect (redirects are not followed: set url"),
        (answer(200, "scores"), "answered something that is not JSON"),
        (answer(200, ""), "answered something that is not JSON"),
        (answer(204), "answered something that is not JSON"),
        (answer(200, b"\xff\xfe\xfa"), "answered something that is not JSON"),
        (answer(200, "[" * 60_000), "answered something that is not JSON"),
        (
            answer(200, gzip.compress(b'{"scores": [1, 2, 3, 4, 5]}'), Content_Encoding="gzip"),
            "answered something that",
        ),
        (answer(200, "[1, 2, 3, 4, 5]"), 'answered without a list of "scores"'),
        (answer(200, '{"rewards": [1, 2, 3, 4, 5]}'), 'answered without a list of "scores"'),
        (answer(200, '{"scores": 5}'), 'answered without a list of "scores"'),
        (answer(200, '{"scores": [1, 2, 3, 4]}'), "gave 4 scores for 5 responses"),
        (answer(200, '{"scores": [1, 2, 3, 4, null]}'), 'response 5 of 5 ("r\\u00e9ponse 4") got None'),
        (
            answer(200, '{"scores": [[1], [2], [3], [4], [5]]}'),
            'response 2 of 5 ("r\\u00e9ponse 1") got 1 scores for 2',
        ),
        (answer(200, " " * 70_000 + '{"scores": [1, 2, 3, 4, 5]}'), "answered more than 66496 bytes"),
    ],
)
def test_an_answer_that_is_none(server, remote, reply, says):
    """An endpoint that does something else is an error at once: asking again cannot help. The limit on the size is
    65536 + 64 bytes for each of the 1 + 2 + 3 + 4 + 5 numbers there could be."""
    reward, pauses, _ = remote(reply, lengths)
    with pytest.raises(ConfigError) as error:
        reward(BATCH)
    assert problem(error, server).startswith(says)
    assert not pauses and len(server.requests) == 1


@pytest.mark.parametrize("bad", ["NaN", "-Infinity", "1e400", "1" + "0" * 60])
def test_scores_that_are_not_finite(server, remote, bad):
    """Exit code 70 with the response."""
    with pytest.raises(NumericError) as error:
        remote(answer(200, f'{{"scores": [1, {bad}, 3, 4, 5]}}'))[0](BATCH)
    assert problem(error, server).startswith('response 2 of 5 ("r\\u00e9ponse 1") got ')


@pytest.mark.parametrize(
    "reply",
    [
        answer(401, TOKEN, WWW_Authenticate=TOKEN),
        answer(302, Location=f"http://127.0.0.1/{TOKEN}"),
        answer(503, TOKEN, Retry_After=TOKEN),
        answer(200, TOKEN),
        no_http,
    ],
)
def test_the_token_is_sent_and_not_shown(server, remote, monkeypatch, reply):
    """As a bearer token with every request; in no message, though the server repeats it in every way it can."""
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    reward, _, notices = remote(reply, token_variable="JUDGE_TOKEN", retries=1, url=f"{server.url}?key=hidden")
    with pytest.raises(AlignError) as error:
        reward(BATCH)
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for _, headers, _ in server.requests)
    assert server.requests[0][0] == "/score?key=hidden"
    assert not any(secret in text for secret in (TOKEN, "hidden") for text in (str(error.value), *notices))


@pytest.mark.parametrize("value", [None, "", "two words", f"{TOKEN}\n", "clé"])
def test_a_token_that_is_none(server, remote, monkeypatch, value):
    """Not set, or with what a header cannot hold: said when the reward is made, before anything runs, unquoted."""
    if value is None:
        monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    else:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(ConfigError, match=r"^ppo\.reward\.judge: the environment variable JUDGE_TOKEN ") as error:
        remote(lengths, token_variable="JUDGE_TOKEN")
    assert not value or value.strip() not in str(error.value)


def test_proxies_of_the_environment_are_not_used(remote, monkeypatch):
    """What is scored goes where the recipe says, whatever the shell was set up for."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert remote(lengths, retries=0)[0](BATCH) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_stop_ends_the_wait(server):
    """Asked for while waiting for a busy endpoint: exit code 75, and no further request."""
    server.script[:] = [answer(503)]
    stop = threading.Event()
    term = RewardTerm.model_validate({"url": server.url})
    reward = RemoteReward(term, WHERE, should_stop=stop.is_set, pause=lambda *_: stop.set())
    with pytest.raises(Interrupted, match="stopped while waiting for http"):
        reward(BATCH)
    reward.close()
    assert len(server.requests) == 1


def test_pause():
    """It lasts as long as it should, and ends at the second look when a stop is asked for by then."""
    started = time.monotonic()
    pause(0.03, lambda: False)
    assert time.monotonic() - started >= 0.03
    looks = iter([False, True])
    pause(600, lambda: next(looks))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "url",
    [
        "host/score",
        "ftp://host/",
        "http:///score",
        "http://a b/",
        "http://[::1",
        "http://host:99999/",
        "http://host:x/",
    ],
)
def test_a_url_that_is_none(url):
    """Refused by the recipe."""
    with pytest.raises(ValueError, match="url is not http:// or https:// and the name of a host"):
        RewardTerm.model_validate({"url": url})


def test_a_host_that_cannot_be():
    """What only the HTTP library can tell is said when the reward is made."""
    with pytest.raises(ConfigError, match=r"^ppo\.reward\.judge: url is not one: "):
        RemoteReward(RewardTerm.model_validate({"url": "http://\u2603.\u200d/"}), WHERE)


@pytest.mark.parametrize("url", ["http://me:hidden@127.0.0.1/score", "ftp://me:hidden@127.0.0.1/score"])
def test_a_url_with_a_password(url):
    """Refused by the recipe, which is copied into every run, and not repeated in its own message."""
    with pytest.raises(ValueError, match="url") as error:
        RewardTerm.model_validate({"url": url})
    assert "hidden" not in error.value.errors()[0]["msg"]
