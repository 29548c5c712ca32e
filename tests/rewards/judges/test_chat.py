"""The judge behind a chat endpoint, against a server in this process."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch

from guerdon.components import build
from guerdon.errors import DataError, RecipeError, ScoreError
from guerdon.rewards import tournament
from guerdon.rewards.judges import chat
from guerdon.rewards.judges.base import Match, Verdict
from guerdon.rollout import Rollout
from guerdon.signal import Signal
from tests.rewards.judges.server import Reply, Server, serve

KEY = "sk-very-secret-0123456789"
MATCH = Match("What is 2 + 2?", "four", "five")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge_of(server: Server, **options: Any) -> Any:
    return chat(base_url=server.url, model="judge-1", **{"backoff": 0.01, "timeout": 5.0, **options})


def answers(text: str) -> tuple[str, str]:
    """The two answers in a question."""
    found = re.search(r"First answer:\n(.*)\n\nSecond answer:\n(.*)\n\n", text)
    assert found is not None
    return found[1], found[2]


def by_number(request: dict[str, Any], number: int) -> Reply:
    """A judge that likes large numbers."""
    first, second = answers(request["messages"][-1]["content"])
    return Reply(f'{{"first": {first}, "second": {second}}}')


def test_a_verdict() -> None:
    with serve(lambda request, number: Reply('{"first": 9, "second": 2.5}')) as server:
        verdicts = judge_of(server, temperature=0.3, max_tokens=77, body={"top_p": 0.9})([MATCH])
    assert verdicts == [Verdict(9.0, 2.5, calls=1, malformed=0)]
    request = server.requests[0]
    assert server.paths == ["/v1/chat/completions"]
    assert (request["model"], request["temperature"], request["max_tokens"], request["top_p"]) == (
        "judge-1",
        0.3,
        77,
        0.9,
    )
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert answers(server.question()) == ("four", "five")
    assert "What is 2 + 2?" in server.question()
    assert '{"first": <score>, "second": <score>}' in server.question()
    assert "Authorization" not in server.headers[0]


def test_verdicts_come_in_the_order_of_the_matches() -> None:
    def slow_first(request: dict[str, Any], number: int) -> Reply:
        reply = by_number(request, number)
        reply.pause = 0.1 if number == 0 else 0.0
        return reply

    with serve(slow_first) as server:
        found = judge_of(server)([Match("p", str(i), str(9 - i)) for i in range(10)])
    assert [(v.first, v.second) for v in found] == [(float(i), float(9 - i)) for i in range(10)]
    assert judge_of(server)([]) == []


@pytest.mark.parametrize("bound", [1, 3])
def test_concurrency_is_bounded(bound: int) -> None:
    def slow(request: dict[str, Any], number: int) -> Reply:
        return Reply('{"first": 1, "second": 2}', pause=0.03)

    with serve(slow) as server:
        judge_of(server, concurrency=bound)([MATCH] * 12)
    assert len(server.requests) == 12
    assert server.most == bound


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_an_error_that_passes_is_tried_again(status: int) -> None:
    def second_time(request: dict[str, Any], number: int) -> Reply:
        return Reply("busy", status=status) if number == 0 else Reply('{"first": 3, "second": 4}')

    with serve(second_time) as server:
        assert judge_of(server)([MATCH]) == [Verdict(3.0, 4.0, calls=2, malformed=0)]


def test_an_error_that_does_not_pass_fails_the_match() -> None:
    with serve(lambda request, number: Reply(status=500, body=b"out of memory")) as server:
        (found,) = judge_of(server, tries=3)([MATCH])
    assert found.failed
    assert (found.calls, found.malformed) == (3, 0)
    assert found.why == "HTTP 500: out of memory"
    assert len(server.requests) == 3


def test_pauses_double_and_follow_the_server() -> None:
    with serve(lambda request, number: Reply(status=500, body=b"")) as server:
        start = time.perf_counter()
        judge_of(server, tries=4, backoff=0.04)([MATCH])
        assert time.perf_counter() - start > (0.04 + 0.08 + 0.16) / 2  # jitter takes up to half

    def wait(request: dict[str, Any], number: int) -> Reply:
        return (
            Reply(status=429, body=b"", headers={"Retry-After": "0.3"})
            if number == 0
            else Reply('{"first": 1, "second": 1}')
        )

    with serve(wait) as server:
        start = time.perf_counter()
        judge_of(server)([MATCH])
        assert time.perf_counter() - start > 0.3


def test_silence_times_out() -> None:
    with serve(lambda request, number: Reply('{"first": 1, "second": 1}', pause=0.5)) as server:
        start = time.perf_counter()
        (found,) = judge_of(server, timeout=0.1, tries=2)([MATCH])
        assert time.perf_counter() - start < 0.5
    assert found.failed
    assert found.calls == 2
    assert "timed out" in found.why


def test_a_trickle_times_out_too() -> None:
    with serve(lambda request, number: Reply('{"first": 1, "second": 1}', trickle=0.02)) as server:
        (found,) = judge_of(server, timeout=0.2, tries=1)([MATCH])
    assert found.why == "TimeoutError: the reply took longer than 0.2 s"


def test_a_late_reply_is_not_too_late_for_the_next_try() -> None:
    def first_is_slow(request: dict[str, Any], number: int) -> Reply:
        return Reply('{"first": 6, "second": 1}', pause=0.5 if number == 0 else 0.0)

    with serve(first_is_slow) as server:
        assert judge_of(server, timeout=0.2)([MATCH]) == [Verdict(6.0, 1.0, calls=2)]


def test_nobody_there() -> None:
    with serve(by_number) as server:
        pass
    (found,) = judge_of(server, tries=2)([MATCH])
    assert found.failed
    assert "ConnectionRefusedError" in found.why


MALFORMED = {
    "no json": Reply("The first one."),
    "cut json": Reply('{"first": 3, "second"'),
    "a number missing": Reply('{"first": 3}'),
    "out of range": Reply('{"first": 3, "second": 12}'),
    "no number": Reply('{"first": "good", "second": "bad"}'),
    "no text": Reply(None),
    "not a completion": Reply(body=b'{"result": "fine"}'),
    "no choices": Reply(body=b'{"choices": []}'),
    "not json at all": Reply(body=b"<html>"),
    "not utf-8": Reply(body=b"\xff\xfe\x00"),
    "deep": Reply(body=b"[" * 100_000),
}


@pytest.mark.parametrize("reply", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_is_counted_and_tried_again(reply: Reply) -> None:
    def third_time(request: dict[str, Any], number: int) -> Reply:
        return reply if number < 2 else Reply('{"first": 8, "second": 3}')

    with serve(third_time) as server:
        assert judge_of(server)([MATCH]) == [Verdict(8.0, 3.0, calls=3, malformed=2)]


def test_malformed_to_the_end_fails_the_match() -> None:
    with serve(lambda request, number: Reply("I cannot decide.")) as server:
        (found,) = judge_of(server)([MATCH])
    assert found.failed
    assert (found.calls, found.malformed) == (10, 10)
    assert found.why == "no verdict in the reply 'I cannot decide.'"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_not_sent_again(status: int) -> None:
    def too_long(request: dict[str, Any], number: int) -> Reply:
        if "long" in request["messages"][-1]["content"]:
            return Reply(status=status, body=b"context length exceeded")
        return Reply('{"first": 1, "second": 2}')

    with serve(too_long) as server:
        found = judge_of(server, concurrency=1)([MATCH, Match("p", "long", "b"), MATCH])
    assert [v.failed for v in found] == [False, True, False]
    assert found[1].why == f"HTTP {status}: context length exceeded"
    assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "hint"), [(401, "Give a key"), (403, ""), (404, "Look at base_url and model")])
def test_a_wrong_setting_stops_at_once(status: int, hint: str) -> None:
    with serve(lambda request, number: Reply(status=status, body=b"no")) as server:
        with pytest.raises(
            ScoreError, match=rf"judges.chat: {server.url}/chat/completions answered HTTP {status}: no.*{hint}"
        ):
            judge_of(server, concurrency=2)([MATCH] * 50)
        assert len(server.requests) < 10


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serve(by_number) as other:
        headers = {"Location": f"{other.url}/chat/completions"}
        for status in (301, 302, 307, 308):
            with (
                serve(lambda request, number, status=status: Reply(status=status, body=b"", headers=headers)) as server,
                pytest.raises(ScoreError, match=r"redirects, which is not followed: give the final address"),
            ):
                judge_of(server, api_key_env="MY_KEY")([MATCH])
    assert other.requests == []


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")

    def echo(request: dict[str, Any], number: int) -> Reply:
        if number == 0:
            return Reply('{"first": 1, "second": 2}')
        return Reply(status=401 if number == 1 else 500, body=f"Incorrect key: {KEY}".encode())

    with serve(echo) as server:
        judge = judge_of(server, api_key_env="MY_KEY", tries=1)
        judge([MATCH])
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        with pytest.raises(ScoreError, match=r"Incorrect key: \*\*\*. Look at the key in MY_KEY") as caught:
            judge([MATCH])
        (failed,) = judge([MATCH])
    assert KEY not in repr(caught.getrepr(style="long", showlocals=False))
    assert failed.why == "HTTP 500: Incorrect key: ***"
    kept = repr([vars(judge), vars(judge.ask), vars(judge.ask.endpoint), vars(judge.question)])
    assert KEY not in kept
    assert KEY not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("wrong", [KEY, "Bearer x", "sk.live", ""])
def test_a_key_in_place_of_a_name_is_refused_and_not_shown(wrong: str) -> None:
    with pytest.raises(RecipeError, match=r"must be the name of an environment variable, never the key itself\.$"):
        chat(base_url="http://127.0.0.1:1/v1", model="m", api_key_env=wrong)


@pytest.mark.parametrize("value", ["", "  ", "two\nlines", "schlüssel"])
def test_a_variable_without_a_key(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(
        RecipeError, match=r"the environment variable MY_KEY (is not set|holds something that is no key)\.$"
    ):
        chat(base_url="http://127.0.0.1:1/v1", model="m", api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, r"base_url: must be an address like http"),
        ({"base_url": "file:///etc/passwd"}, r"base_url: must be an address like http"),
        ({"base_url": "http://me:secret@host/v1"}, r"base_url: it holds a user name or password. Give a key by"),
        ({"timeout": 0.0}, r"timeout: must be above 0 seconds; got 0.0"),
        ({"concurrency": 0}, r"concurrency: must be 1 or more; got 0"),
        ({"tries": 0}, r"tries: must be 1 or more; got 0"),
        ({"backoff": -1.0}, r"backoff: must be 0 or more; got -1"),
        ({"template": "{first} or the other?"}, r"template: it must show both answers; there is no {second} in it"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^judges.chat.{message}") as caught:
        chat(**{"base_url": "http://127.0.0.1:1/v1", "model": "m", **options})
    assert "secret" not in str(caught.value)


def test_templates_rubrics_and_columns() -> None:
    rubric = {
        "answer": {"levels": {0: "wrong", 10: "right"}, "about": "Is it right?", "weight": 3},
        "process": {"levels": {1: "aimless", 3: "to the point"}},
    }
    reply = '{"first": {"answer": 10, "process": 1}, "second": {"answer": 0, "process": 3}, "reason": "-"}'
    template = "Gold: {answer}\n{first}|{second}\n{rubric}\n{form}\n{'kept': {}}"
    with serve(lambda request, number: Reply(reply)) as server:
        judge = judge_of(server, template=template, rubric=rubric, system="", parsing="strict")
        found = judge([Match("p", "say {answer}", "b", {"answer": 4})])
    assert found == [Verdict(7.5, 2.5, categories={"answer": (10.0, 0.0), "process": (0.0, 10.0)})]
    assert [message["role"] for message in server.requests[0]["messages"]] == ["user"]
    assert server.question() == (
        "Gold: 4\nsay {answer}|b\n"
        "Give each answer points for every criterion:\n- answer (weight 3): Is it right?\n    0: wrong\n    10: right\n"
        "- process (weight 1)\n    1: aimless\n    3: to the point\n"
        '{"first": {"answer": <points>, "process": <points>}, "second": {"answer": <points>, "process": <points>}}\n'
        "{'kept': {}}"
    )
    with pytest.raises(
        DataError, match=r"judges.chat.template: {answer} names nothing. There are: first, form, prompt"
    ):
        judge([MATCH])


def test_sixty_four_samples_in_a_linear_number_of_calls() -> None:
    samples = [f"{(i * 37) % 64 / 10}" for i in range(64)]
    with serve(by_number) as server:
        found = tournament(judge=judge_of(server, concurrency=32))(["p"], [samples])
    best = sorted(range(64), key=lambda i: -float(samples[i]))
    assert found.ranks[0].argsort().tolist() == best
    assert found.comparisons.tolist() == [126]  # 2 (N - 1)
    assert found.judge_calls.tolist() == [252]  # in both orders
    assert len(server.requests) == 252
    assert server.most <= 32


def test_a_liking_for_the_first_place_cancels_out() -> None:
    def biased(request: dict[str, Any], number: int) -> Reply:
        first, second = answers(request["messages"][-1]["content"])
        return Reply(f'{{"first": {float(first) + 5}, "second": {second}}}')

    samples = [["1", "4", "3", "2"]]
    with serve(biased) as server:
        fair = tournament(judge=judge_of(server), topology="round_robin")(["p"], samples)
        unfair = tournament(judge=judge_of(server), topology="round_robin", both_orders=False)(["p"], samples)
    assert fair.ranks.tolist() == [[4.0, 1.0, 2.0, 3.0]]
    assert unfair.ranks.tolist() == [[1.0, 2.0, 3.0, 4.0]]  # whoever is named first wins


def test_failures_in_a_tournament_are_ties_and_are_counted() -> None:
    def no_opinion_on_3(request: dict[str, Any], number: int) -> Reply:
        if "3" in answers(request["messages"][-1]["content"]):
            return Reply("hm")
        return by_number(request, number)

    with serve(no_opinion_on_3) as server:
        judge = judge_of(server, tries=2)
        found = tournament(judge=judge, topology="round_robin")(["p"], [["1", "3", "5", "7"]])
    # 1 loses twice and draws, 3 draws three times, 5 wins one, draws one, 7 wins two, draws one
    assert found.ranks.tolist() == [[4.0, 2.0, 2.0, 1.0]]
    assert found.judge_failures.tolist() == [6]
    assert found.judge_malformed.tolist() == [12]
    assert found.judge_calls.tolist() == [6 + 12]


def test_a_judge_that_is_down_stops_the_run() -> None:
    with (
        serve(lambda request, number: Reply(status=503, body=b"down")) as server,
        pytest.raises(
            ScoreError, match=r"6 of 6 verdicts failed, more than failures_max = 0.5 .* The first: HTTP 503: down"
        ),
    ):
        tournament(judge=judge_of(server, tries=1))(["p"], [["1", "2", "3", "4"]])


@pytest.mark.parametrize("on_bad_score", ["stop", "drop"])
def test_a_wrong_key_stops_a_signal_soon(on_bad_score: Any) -> None:
    with serve(lambda request, number: Reply(status=401, body=b"who are you?")) as server:
        signal = Signal(rewards={"arena": tournament(judge=judge_of(server, concurrency=2))}, on_bad_score=on_bad_score)
        shape = (8, 4)
        samples = [[str(g) for g in range(shape[1])] for _ in range(shape[0])]
        rollout = Rollout(["p"] * shape[0], samples, torch.ones(*shape, 1).bool(), torch.zeros(*shape, 1))
        with pytest.raises(ScoreError, match=r"HTTP 401: who are you\?. Give a key by api_key_env"):
            signal(rollout)
    assert len(server.requests) < 20  # of 96


def test_a_judge_of_a_recipe() -> None:
    with serve(by_number) as server:
        options = {"base_url": server.url, "model": "m", "rubric": None, "body": {"seed": 3}}
        stage = build("rewards", {"tournament": {"judge": {"chat": options}, "topology": "anchor"}})
        assert stage(["p"], [["1", "3", "2"]]).scores == [[0.0, 1.0, 0.5]]
    assert server.requests[0]["seed"] == 3
    with pytest.raises(RecipeError, match=r"rewards.tournament.judge.chat.concurency: there is no such option"):
        build("rewards", {"tournament": {"judge": {"chat": {**options, "concurency": 2}}}})
