"""The client against a real server on loopback that misbehaves."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmlite.distillation.api.client import Client, Fatal, Rejected, Unanswered, endpoint_problems, is_loopback, key_of
from llmlite.errors import ApiError
from tests.distillation.fake_api import FakeApi, serving, serving_bytes

KEY = "sk-planted-7d1f0a9c55e24b"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def served(teacher_folder: Path) -> Iterator[FakeApi]:
    with serving(FakeApi(teacher_folder, key=KEY)) as api:
        yield api


@pytest.fixture
def api(served: FakeApi) -> FakeApi:
    served.requests.clear()
    served.times.clear()
    served.faults, served.answer_with = [], lambda body: ("Hello.", "stop")
    return served


def client(api: FakeApi, **options: Any) -> Client:
    return Client(api.url, **{"key": KEY, "timeout": 10.0, "max_retries": 4, **options})


def said(raw: Any) -> str:
    return str(raw.body["choices"][0]["message"]["content"])


def test_retry_after_is_honoured(api: FakeApi) -> None:
    api.faults = [(429, {"Retry-After": "1.5"})]
    raw = client(api).ask("chat", BODY)
    assert (said(raw), raw.retries) == ("Hello.", 1)
    assert 1.5 <= api.times[1] - api.times[0] < 3


@pytest.mark.parametrize("fault", [(500, {"retry-after-ms": "20"}), (503, {"retry-after-ms": "20"}), (408, {"retry-after-ms": "20"}), "cut", "garbage", "half"])
def test_a_fault_is_followed_by_another_attempt(api: FakeApi, fault: Any) -> None:
    api.faults = [fault]
    raw = client(api).ask("chat", BODY)
    assert (said(raw), raw.retries, len(api.requests)) == ("Hello.", 1, 2)


def test_attempts_are_counted_over_all_kinds_of_faults(api: FakeApi) -> None:
    quick = (500, {"retry-after-ms": "5"})
    api.faults = [quick, "garbage", quick, quick, quick, quick]
    with pytest.raises(Unanswered, match="500: try later"):
        client(api, max_retries=3).ask("chat", BODY)
    assert len(api.requests) == 4


@pytest.mark.parametrize(("fault", "words"), [("garbage", "no JSON object"), ("half", "no choices"), ("cut", "RemoteProtocolError|peer closed")])
def test_what_stays_broken_is_unanswered(api: FakeApi, fault: str, words: str) -> None:
    api.faults = [fault]
    with pytest.raises(Unanswered, match=words):
        client(api, max_retries=0).ask("chat", BODY)


def test_a_slow_answer_times_out(api: FakeApi) -> None:
    api.faults = ["slow"]
    started = time.monotonic()
    with pytest.raises(Unanswered, match="ReadTimeout"):
        client(api, timeout=0.3, max_retries=0).ask("chat", BODY)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_the_server_will_not_take_is_not_repeated(api: FakeApi, status: int) -> None:
    api.faults = [(status, {}, "too long")]
    with pytest.raises(Rejected, match="too long"):
        client(api).ask("chat", BODY)
    assert len(api.requests) == 1


def test_no_such_model_and_no_money_are_fatal(api: FakeApi) -> None:
    with pytest.raises(Fatal, match="404: The model 'huge' does not exist"):
        client(api).ask("chat", BODY | {"model": "huge"})
    api.faults = [(402, {}, "Insufficient balance")]
    with pytest.raises(Fatal, match="402: the account's quota is used up .Insufficient balance"):
        client(api).ask("chat", BODY)


def test_a_refused_key_is_not_repeated_in_the_message_even_if_the_server_does(api: FakeApi) -> None:
    wrong = "sk-wrong-000111222333"
    with pytest.raises(Fatal) as caught:
        client(api, key=wrong).models()
    assert "the key was refused" in str(caught.value)
    assert wrong not in str(caught.value)
    with pytest.raises(Fatal, match="a key is wanted and none was given"):
        client(api, key=None).ask("chat", BODY)


def test_a_key_that_an_answer_repeats_is_struck_out(api: FakeApi) -> None:
    api.answer_with = lambda body: (f"Your key is {KEY}.", "stop")
    assert said(client(api).ask("chat", BODY)) == "Your key is [key]."
    assert KEY not in repr(client(api))


def test_a_key_that_an_answer_repeats_in_other_letters_of_json_is_struck_out() -> None:
    """JSON may write a letter in several ways: PHP writes each slash behind a backslash."""
    key = "sk-planted/7d1f+0a9c/55e2=="
    with serving_bytes(b'{"choices": [{"message": {"role": "assistant", "content": "' + key.replace("/", "\\/").encode() + b'"}}]}') as url:
        body = Client(url, key, 10.0, 0).ask("chat", BODY).body
    assert body["choices"][0]["message"]["content"] == "[key]"


@pytest.mark.parametrize("ending", ["\n", "\r\n", " "])
def test_a_key_that_came_with_the_end_of_its_line_is_sent_without(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request can carry a line break, and the HTTP library quotes what it cannot send: `Illegal header value b'Bearer sk-...'`."""
    monkeypatch.setenv("MY_KEY", KEY + ending)
    with serving_bytes(b'{"choices": [{"message": {"role": "assistant", "content": "Hello."}}]}') as url:
        assert endpoint_problems(url, "MY_KEY") == []
        assert said(Client(url, key_of("MY_KEY"), 10.0, 0).ask("chat", BODY)) == "Hello."


@pytest.mark.parametrize("inside", ["\n", " ", "\N{EN DASH}"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"sk-first{inside}second")
    (problem,) = endpoint_problems("https://host/v1", "MY_KEY")
    assert "'MY_KEY' (not shown) holds a blank, a line break or a letter outside of ASCII" in problem
    assert not any(part in problem for part in ("sk-first", "second"))


def test_models(api: FakeApi) -> None:
    assert client(api).models() is None  # 404: a server without a list
    api.lists_models = True
    assert client(api).models() == ["tiny"]
    api.lists_models = False


def test_nobody_there_is_said_in_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(ApiError, match="cannot be reached: ConnectError.*Is the server running"):
        Client(url, None, 60.0, 5).models()
    assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    ("url", "variable", "problems"),
    [
        ("http://127.0.0.1:8000/v1", "OPENAI_API_KEY", []),  # no key, none wanted
        ("https://api.openai.com/v1", "OPENAI_API_KEY", ["api_key_env: the environment variable 'OPENAI_API_KEY' is not set"]),
        ("http://127.0.0.1:8000/v1", "MY_KEY", ["api_key_env: the environment variable 'MY_KEY' is not set"]),
        ("127.0.0.1:8000", "OPENAI_API_KEY", ["base_url: 127.0.0.1:8000 is no address of a server"]),
        ("https://me:secret@host/v1", "OPENAI_API_KEY", ["base_url holds a user name, a password or a query"]),
        ("https://host/v1?key=secret", "OPENAI_API_KEY", ["base_url holds a user name, a password or a query"]),
        ("https://host/v1", KEY, ["api_key_env (not shown, since it looks like a key rather than a name)"]),
        ("https://host/v1", "abcdef0123456789", ["api_key_env (not shown, since it looks like a key rather than a name)"]),
    ],
)
def test_problems_of_the_address_and_the_key(url: str, variable: str, problems: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = endpoint_problems(url, variable)
    assert len(found) == len(problems)
    assert all(text.startswith(start) for text, start in zip(found, problems, strict=True)), found
    assert not any("secret" in text or KEY in text or "abcdef" in text for text in found)


def test_loopback() -> None:
    assert [is_loopback(url) for url in ("http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:8/v1", "http://10.0.0.1/v1", "https://x.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip
