"""Critics that are language models: behind an endpoint, on this machine, and learned ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from guerdon.components import build
from guerdon.errors import DataError, RecipeError, ScoreError
from guerdon.language.characters import character_tokenizer
from guerdon.language.tasks import sort
from guerdon.language.tasks.small import small_llama
from guerdon.rewards.critics.base import Response, ask
from guerdon.rewards.critics.classifier import ClassifierCritic
from guerdon.rewards.critics.local import LocalCritic
from guerdon.rewards.critics.token_classifier import TokenClassifier
from guerdon.rewards.spans import Spans
from guerdon.training import Optim, Supervised
from tests.rewards.judges.server import Reply, serve

RESPONSE = Response("say it", "a red fox", {"level": 3})
GOOD = '{"textual_feedback": "Vivid.", "good_spans": ["red"], "poor_spans": []}'


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def chat_of(server: Any, **options: Any) -> Any:
    return build("rewards.critics", {"chat": {"base_url": server.url, "model": "m", "backoff": 0.0, **options}})


def test_feedback_of_a_served_model() -> None:
    with serve(lambda request, number: Reply(f"Let me see. {GOOD}")) as server:
        (found,) = chat_of(server, spans_max=2)([RESPONSE])
    assert found.spans == (("red", 1.0),)
    assert (found.critique, found.calls, found.malformed) == ("Vivid.", 1, 0)
    question = server.question()
    assert "say it" in question
    assert "a red fox" in question
    assert '"good_spans"' in question
    assert "at most 2 in each list" in question


def test_what_cannot_be_read_is_asked_for_again_and_counted() -> None:
    replies = {0: Reply("Nice."), 1: Reply('{"good_spans": "red"}'), 2: Reply(GOOD)}
    with serve(lambda request, number: replies[number]) as server:
        (found,) = chat_of(server)([RESPONSE])
        assert (found.failed, found.calls, found.malformed) == (False, 3, 2)
    with serve(lambda request, number: Reply("Nice.")) as server:
        (found,) = chat_of(server, tries=2)([RESPONSE])
        assert (found.failed, found.calls, found.malformed) == (True, 2, 2)
        assert found.why == "there is no JSON object with feedback in the reply: 'Nice.'"


def test_columns_of_the_template_and_settings_that_are_wrong() -> None:
    with serve(lambda request, number: Reply(GOOD)) as server:
        chat_of(server, template="{level}: {response}", system="")([RESPONSE])
        assert server.requests[0]["messages"] == [{"role": "user", "content": "3: a red fox"}]
        with pytest.raises(DataError, match=r"critics.chat.template: \{nothing\} names nothing"):
            chat_of(server, template="{response}{nothing}")([RESPONSE])
        with pytest.raises(RecipeError, match=r"there is no \{response\} in it"):
            chat_of(server, template="{prompt}")
        with pytest.raises(RecipeError, match=r"spans_max: must be 1 or more"):
            chat_of(server, spans_max=0)
    with serve(lambda request, number: Reply(status=401)) as server, pytest.raises(ScoreError, match="401"):
        chat_of(server)([RESPONSE])


LETTERS = "abcdefghijklmnopqrstuvwxyzFLNOVRWT ,.:[]{}\"'_<>0123456789-\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained language model that can read and write the usual question."""
    path = tmp_path_factory.mktemp("critic")
    letters = "".join(sorted({*LETTERS, *map(chr, range(32, 127))}))
    tokenizer = character_tokenizer(letters)
    model = small_llama(0, tokens=len(tokenizer), pad=0, eos=1)
    model.config.max_position_embeddings = 2048
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def replying(critic: Any, replies: list[str]) -> list[Any]:
    """Have a local critic's model say what it is told to; the questions that it was asked."""
    asked: list[Any] = []
    sample = critic.policy.sample

    def instead(questions: list[Any], *arguments: Any, **options: Any) -> Any:
        asked.extend(questions)
        found = sample(questions, *arguments, **options)
        return replace(found, samples=[[replies[len(asked) - len(questions) + k]] for k in range(len(questions))])

    critic.policy.sample = instead
    return asked


def test_feedback_of_a_model_on_this_machine(folder: Path) -> None:
    critic = LocalCritic(model=str(folder), max_new_tokens=4)
    asked = replying(critic, [GOOD, "Nice."])
    first, second = ask(critic, [RESPONSE, Response("p", "x")], "here")
    assert first.spans == (("red", 1.0),)
    assert (second.failed, second.calls, second.malformed) == (True, 1, 1)
    assert asked[0].startswith("You review answers.")
    assert "a red fox" in asked[0]
    assert not any(parameter.requires_grad for parameter in critic.policy.parameters())
    untrained = ask(LocalCritic(model=str(folder), max_new_tokens=4), [RESPONSE], "here")
    assert untrained[0].failed


def test_a_model_that_was_trained_is_asked_as_it_was_trained(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).symlink_to(file)
    (own / "critic.json").write_text(json.dumps({"template": "{prompt}|{response}|", "system": ""}))
    critic = LocalCritic(model=str(own), max_new_tokens=4)
    asked = replying(critic, [GOOD])
    critic([RESPONSE])
    assert asked == ["say it|a red fox|"]
    other = LocalCritic(model=str(own), max_new_tokens=4, template="{response}?")
    assert other.question.plain(RESPONSE) == "a red fox?"
    (own / "critic.json").write_text("{}")
    with pytest.raises(RecipeError, match="does not say how the model is asked"):
        LocalCritic(model=str(own))


def classifier(seed: int = 0, dtype: Any = "float32") -> TokenClassifier:
    return TokenClassifier.load(sort.model(0).config, tokenizer=sort.tokenizer(), seed=seed, dtype=dtype)


def test_a_classifier_learns_records_and_labels_characters() -> None:
    model = classifier()
    # an easy critic: high digits are good
    rows = [{**row, "marks": [1 if d >= "5" else -1 for d in row["response"]]} for row in sort.feedback(0)[:64]]
    loop = Supervised(model, rows, batch_size=32, optim=Optim(lr=5e-3), steps=30)
    losses = [loop.step()["loss"] for _ in range(30)]
    assert losses[-1] < 0.1 * losses[0]
    critic = ClassifierCritic(model=model, batch_size=3)
    chosen = [rows[i] for i in range(8)]
    found = ask(critic, [Response(row["prompt"], row["response"]) for row in chosen], "here")
    given = model.demonstrations(chosen)
    logits = model(given.steps)
    for i, feedback in enumerate(found):
        assert feedback.marks is not None
        likeliest = (logits[i, 0, : len(feedback.marks)].argmax(-1) - 1).tolist()
        assert list(feedback.marks) == likeliest
        assert list(feedback.marks) == chosen[i]["marks"]
    soft = ClassifierCritic(model=model, continuous=True)([Response(chosen[0]["prompt"], chosen[0]["response"])])
    chances = logits[0, 0].softmax(-1)
    torch.testing.assert_close(
        torch.tensor(soft[0].marks), (chances[:, 2] - chances[:, 0])[: len(soft[0].marks or ())].detach()
    )


def test_what_a_classifier_is_taught() -> None:
    model = classifier()
    rows = [
        {"prompt": "21=", "response": "1=2", "marks": [1, 1, -1]},
        {"prompt": "3=", "response": "345", "good_spans": ["345"]},
        {"prompt": "3=", "response": "9", "spans": [[0, 1, -1]]},
    ]
    given = model.demonstrations(rows)
    assert given.mask[:, 0].tolist() == [[True, False, True], [True, True, True], [True, False, False]]
    assert (given.steps["labels"][:, 0] - 1).tolist() == [[1, 0, -1], [1, 1, 1], [-1, -1, -1]]
    whole = model.imitation_loss(given)
    parts = [model.imitation_loss(given.select([i]).trim()) for i in range(3)]
    torch.testing.assert_close(whole.total, torch.stack([part.total for part in parts]).sum())
    assert whole.count == 6 == sum(part.count for part in parts)
    with pytest.raises(DataError, match="record 1: response must be a text"):
        model.demonstrations([rows[0], {"prompt": "p", "response": None}])


def test_a_classifier_is_saved_loaded_and_put_back(tmp_path: Path) -> None:
    model = classifier(dtype="float64")
    model.save(tmp_path)
    again = TokenClassifier.load(str(tmp_path), dtype="float64")
    texts = (["21="], ["12"])
    assert again.marks(*texts, continuous=True) == model.marks(*texts, continuous=True)
    other = classifier(seed=1, dtype="float64")
    assert other.marks(*texts, continuous=True) != model.marks(*texts, continuous=True)
    other.load_weights(tmp_path)
    assert other.marks(*texts, continuous=True) == model.marks(*texts, continuous=True)


def test_a_model_without_such_a_head_is_no_critic(saved: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"is no token classifier but LlamaForCausalLM\. Train one with: guerdon train"
    ):
        ClassifierCritic(model=str(saved))
    assert TokenClassifier.load(str(saved), new_head=True).model.config.num_labels == 3
    with pytest.raises(RecipeError, match="cannot be loaded as a token classifier"):
        ClassifierCritic(model="nowhere/at/all")


def test_an_encoder_with_its_own_tokenizer_pays_the_tokens_of_another() -> None:
    """The classifier reads letters; the policy's tokens are other stretches of the same text."""
    letters = character_tokenizer("ab c", pad="<pad>", eos="<eos>")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = TokenClassifier.load(BertConfig(vocab_size=len(letters), **sizes), tokenizer=letters)
    with torch.no_grad():
        model.model.classifier.weight.zero_()
        model.model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))  # all is good
    reward = Spans(critic=ClassifierCritic(model=model))
    offsets = torch.tensor([[[[0, 2], [2, 3], [3, 4]]]])
    found = reward(["a"], [["ab c"]], offsets, torch.ones(1, 1, 3).bool())
    assert found.step_scores.tolist() == [[[1.0, 0.0, 1.0]]]


def test_a_response_that_cannot_be_read_fails_alone() -> None:
    found = ClassifierCritic(model=classifier())([Response("1=", "1"), Response("1=", "x"), Response("1=", "2" * 80)])
    assert [one.failed for one in found] == [False, True, True]
    assert "cannot be encoded" in found[1].why
    assert "too long" in found[2].why
