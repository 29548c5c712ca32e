"""Reports of words, each prompt with a hidden right one; a program that criticises them in words, and a model that learns to."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from torch import Tensor

from guerdon import cache
from guerdon.rewards.critics.base import Response, ask
from guerdon.rewards.critics.records import checked
from guerdon.rewards.critics.token_classifier import TokenClassifier
from guerdon.training.optimisation import Optim
from guerdon.training.supervised import Supervised

PROMPTS, LENGTH, TOKENS = 6, 16, 20
MOST_GOOD, MOST_POOR, LONGEST_RUN = 4, 3, 3  # of the critic that does not say all
RECORDS, STEPS, BATCH, LR = 4000, 500, 64, 3e-3  # of the learned critic
HELD_OUT = 300


def hidden(seed: int) -> Tensor:
    """The right report of each prompt, [P, 1, T]."""
    return torch.randint(TOKENS, (PROMPTS, 1, LENGTH), generator=torch.Generator().manual_seed(7919 + seed))


def words(text: list[int]) -> str:
    """A report as a text."""
    return " ".join(f"w{token:02d}" for token in text)


def places(shape: torch.Size) -> Tensor:
    """The characters of each word of texts [..., T], as [..., T, 2]: three a word, and a space behind it."""
    starts = 4 * torch.arange(LENGTH)
    return torch.stack([starts, starts + 3], -1).expand(*shape, 2)


def critique(response: Response) -> str:
    """What a critic writes: every run of right and of wrong words, quoted; `terse` = only some, and their beginnings."""
    said, target = response.text.split(" "), response.columns["target"].split(" ")
    runs: dict[bool, list[str]] = {True: [], False: []}
    for right, run in itertools.groupby(range(len(said)), lambda t: said[t] == target[t]):
        runs[right].append(" ".join(said[t] for t in run))
    if response.columns["terse"]:
        runs = {
            right: [" ".join(run.split(" ")[:LONGEST_RUN]) for run in runs[right][:most]]
            for right, most in ((True, MOST_GOOD), (False, MOST_POOR))
        }
    told = "; ".join(
        f"{name}: {', '.join(map(repr, runs[right]))}"
        for name, right in (("keeps", True), ("fails", False))
        if runs[right]
    )
    return json.dumps({"textual_feedback": told, "good_spans": runs[True], "poor_spans": runs[False]})


def program(responses: list[Response]) -> list[str]:
    """`critique` of every response."""
    return [critique(one) for one in responses]


def attempts(seed: int, targets: Tensor, count: int) -> tuple[list[Response], Tensor]:
    """Reports of every quality, and whether each word is right, [count, T]."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(PROMPTS, (count,), generator=draw)
    right, quality = targets[prompts, 0], torch.rand(count, 1, generator=draw)
    other = torch.randint(TOKENS, (count, LENGTH), generator=draw)
    texts = torch.where(torch.rand(count, LENGTH, generator=draw) < quality, right, other)
    columns = [{"target": words(row), "terse": False} for row in right.tolist()]
    responses = [
        Response(f"p{prompt}", words(text), column)
        for prompt, text, column in zip(prompts.tolist(), texts.tolist(), columns, strict=True)
    ]
    return responses, texts == right


def untrained(seed: int) -> TokenClassifier:
    """A classifier of two layers, 64 wide, that reads the prompt and words as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    names = ["<pad>", "<end>", *(f"p{n}" for n in range(PROMPTS)), *(f"w{n:02d}" for n in range(TOKENS))]
    core = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH + 1}
    config = GPT2Config(vocab_size=len(names), pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes)
    return TokenClassifier.load(config, tokenizer=tokenizer, seed=seed)


def learned(seed: int, targets: Tensor) -> tuple[TokenClassifier, float]:
    """A classifier trained on records of the program's feedback, and its accuracy on held-out words; kept in the cache."""
    model = untrained(seed)

    def make() -> dict[str, Tensor]:
        responses, _ = attempts(seed, targets, RECORDS)
        kept = (checked(of, said) for of, said in zip(responses, ask(program, responses, "records"), strict=True))
        records = [one.record for one in kept if one.record is not None]
        optim = Optim(lr=LR, warmup_steps=20, schedule="linear", final_lr=0.1)
        Supervised(model, records, batch_size=BATCH, optim=optim, steps=STEPS, seed=seed).run(STEPS)
        return model.model.state_dict()

    recipe: dict[str, Any] = {"seed": seed, "records": RECORDS, "steps": STEPS, "batch": BATCH, "lr": LR}
    model.model.load_state_dict(cache.weights("critics", "reports", recipe, make))
    responses, right = attempts(seed + 10_000, targets, HELD_OUT)
    marks = torch.tensor(model.marks([one.prompt for one in responses], [one.text for one in responses]))
    of_words = marks[:, places(right.shape)[0, :, 0]]
    return model, (of_words == torch.where(right, 1.0, -1.0)).float().mean().item()
