"""Domains of prompts, and the models that say which one a prompt belongs to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from guerdon.errors import DataError, RecipeError, ScoreError
from guerdon.rewards.domains import BUNDLED, customise, question_of, read_domain, read_domains
from guerdon.rewards.router import Router
from tests.rewards.judges.server import Reply, serve
from tests.rewards.judges.test_local import folder  # noqa: F401 - a model on disk

DOMAINS = read_domains()


@pytest.mark.parametrize(
    ("reply", "domain"),
    [
        ("[START]SAFETY[END]", "safety"),
        ("Hm. [START] Reasoning\n[END] since it is a sum", "reasoning"),
        ("[START]CHAT[END]", "chat"),
        ("SAFETY", "chat"),
        ("[START]SAFETY", "chat"),
        ("[START]POETRY[END]", "chat"),
        ("", "chat"),
        ("[START]KIND[END]: [START]SAFETY[END]", "safety"),
    ],
)
def test_what_cannot_be_read_is_chat(reply, domain):
    assert read_domain(reply, DOMAINS) == domain


def test_the_bundled_domains():
    assert list(DOMAINS) == ["safety", "reasoning", "chat"]
    for name in ("safety", "reasoning"):
        domain = DOMAINS[name]
        assert domain.about
        assert domain.criteria
        assert len(domain.exemplars) >= 3
        for text in domain.exemplars:
            assert text.endswith("\n\nUser:")
            places = [text.index(part) for part in ("\nGood Assistant: ", "\nBad Assistant: ", "\nWhy it is bad: ")]
            assert places == sorted(places)
    assert customise("hello", DOMAINS["chat"]) == "hello"


def test_a_file_of_your_own(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(BUNDLED.read_text(encoding="utf-8") + '\n[poems]\nabout = "verse"\ncriteria = "It rhymes."\n')
    found = read_domains(mine)
    assert customise([{"role": "user", "content": "On rain"}], found["poems"]) == [
        {"role": "system", "content": "It rhymes."},
        {"role": "user", "content": "On rain\nGood Assistant:"},
    ]
    for text, complaint in (
        ("[poems]\ncritera = 'x'", "mine.toml: poems.critera: there is no such key. Did you mean 'criteria'"),
        ("[poems]\ncriteria = 3", "criteria: must be text; got 3"),
        ("[poems]\nexemplars = [3]", r"exemplars\[0\]: must be a text, or a mapping"),
        ("[[poems.exemplars]]\ngood = 'x'", "must be a text, or a mapping"),
        ("poems = 3", "must be a mapping"),
        ("[poems", "is no TOML file"),
        ("", "there is no domain in it"),
    ):
        mine.write_text(text)
        with pytest.raises(RecipeError, match=complaint):
            read_domains(mine)


def test_the_last_question_is_what_counts():
    talk = [{"role": r, "content": c} for r, c in (("user", "one"), ("assistant", "two"), ("user", "three"))]
    assert question_of(talk) == "three"
    changed = customise(talk, DOMAINS["safety"])
    assert [m["content"] for m in changed[1:3]] == ["one", "two"]
    assert changed[3]["content"].endswith("User:\nthree\nGood Assistant:")


def test_a_served_router():
    def answer(request, number):
        if number == 0:
            return Reply("", status=503)
        question = request["messages"][-1]["content"]
        return Reply("[START]SAFETY[END]" if "bomb" in question else "no idea")

    with serve(answer) as server:
        route = Router({"base_url": server.url, "model": "m", "concurrency": 1}, DOMAINS)
        assert route(["a bomb", "a poem", "a bomb"]) == ["safety", "chat", "safety"]
        assert len(server.requests) == 3  # one was tried again, one was asked about before
        assert server.requests[-1]["temperature"] == 0.0
    with (
        serve(lambda request, number: Reply("", status=400)) as server,
        pytest.raises(ScoreError, match=r"router: .* gave no reply"),
    ):
        Router({"base_url": server.url, "model": "m"}, DOMAINS)(["a"])


def test_a_router_on_this_machine(folder: Path, tmp_path: Path):  # noqa: F811
    from guerdon.language.policy import LanguagePolicy

    with pytest.raises(DataError, match=r"router: .* is too long"):
        Router(str(folder), DOMAINS)(["abc"])
    shutil.copytree(folder, tmp_path / "longer")
    config = tmp_path / "longer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1024}))
    route = Router({"model": str(tmp_path / "longer"), "max_new_tokens": 4, "batch_size": 2}, DOMAINS)
    assert isinstance(route.reply.policy, LanguagePolicy)
    replies = route.reply(["abc", "d", "efgh"])
    assert len(replies) == 3
    assert replies == [route.reply([q])[0] for q in ("abc", "d", "efgh")]  # greedy, whatever is in the batch
    assert route(["abc", "d"]) == ["chat", "chat"]  # random weights name no domain


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"base_url": "http://127.0.0.1:1/v1"}, "a model, or"),
        ({"model": "m", "temprature": 0}, "router.temprature: there is no such option"),
        (3, "a model, or"),
    ],
)
def test_mistakes(model, text):
    with pytest.raises(RecipeError, match=text):
        Router(model, DOMAINS)


def test_a_router_must_answer_every_question():
    with pytest.raises(ScoreError, match="one reply for each of 2 prompts"):
        Router(lambda questions: json.dumps(questions), DOMAINS)(["a", "b"])
