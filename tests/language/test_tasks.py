from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch

from guerdon.errors import UnknownNameError
from guerdon.language.tasks import TASKS, Task, find, topics
from guerdon.language.tasks.sort import HELD_OUT_SHARE, LONGEST, SHORTEST, _held_out

# what every bundled task must keep


@pytest.fixture(params=TASKS)
def task(request) -> Task:
    return find(request.param)


def test_task_names_itself(task):
    assert find(task.name) is task
    assert task.description


def test_rows_depend_on_seed_and_position_only(task):
    backwards = [task.train_rows(3)[i] for i in reversed(range(20))]
    assert task.train_rows(3)[:20] == backwards[::-1]
    if task.name != "formulas":  # has one prompt only
        assert task.train_rows(3)[:20] != task.train_rows(4)[:20]
    assert task.demonstrations(3)[:20] != task.demonstrations(4)[:20]


def test_training_never_shows_a_held_out_prompt():
    task = find("sort")
    held_out = {row["prompt"] for row in task.held_out_rows(500)}
    seen = {row["prompt"] for seed in (0, 1) for row in task.train_rows(seed)[:1000]}
    seen |= {row["prompt"] for row in task.demonstrations(0)[:1000]}
    assert len(held_out) == 500
    assert not held_out & seen


def test_fewer_held_out_rows_are_the_first_of_more(task):
    assert list(task.held_out_rows(20)) == list(task.held_out_rows(50))[:20]


def test_rows_have_the_same_columns(task):
    columns = {frozenset(row) for row in task.train_rows(0)[:50]}
    assert len(columns) == 1
    complete = [*task.demonstrations(0)[:50], *task.held_out_rows(50)]
    assert {frozenset(row) for row in complete} == {columns.pop() | {"completion"}}


def test_tokenizer_covers_prompts_and_completions(task):
    tokenizer = task.tokenizer()
    for row in task.demonstrations(0)[:100]:
        text = row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer(text).input_ids).removeprefix(tokenizer.bos_token or "") == text


def test_weights_depend_on_the_seed_and_leave_the_global_generator(task):
    state = torch.random.get_rng_state()
    first, again, other = (task.model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# sort


def test_first_rows_are_written_out():
    """Rows are part of what makes runs comparable between versions and machines."""
    sort = find("sort")
    assert sort.train_rows(0)[:3] == [
        {"prompt": "9814759200=", "answer": "0012457899", "length": 10},
        {"prompt": "0119=", "answer": "0119", "length": 4},
        {"prompt": "04806=", "answer": "00468", "length": 5},
    ]
    assert sort.held_out_rows(2) == [
        {"prompt": "116=", "answer": "116", "length": 3, "completion": "116$"},
        {"prompt": "8997373=", "answer": "3377899", "length": 7, "completion": "3377899$"},
    ]
    assert sort.demonstrations(0)[0] == {"prompt": "71936=", "answer": "13679", "length": 5, "completion": "13679$"}


def test_sort_rows_are_right():
    for row in find("sort").demonstrations(1)[:300]:
        digits = row["prompt"][:-1]
        assert row["prompt"][-1] == "="
        assert digits.isdigit()
        assert Counter(digits) == Counter(row["answer"])
        assert list(row["answer"]) == sorted(row["answer"])
        assert row["length"] == len(digits) == len(row["answer"])
        assert row["completion"] == row["answer"] + "$"


def test_lengths_and_digits_are_uniform():
    rows = find("sort").train_rows(0)[:4000]
    lengths = Counter(row["length"] for row in rows)
    assert set(lengths) == set(range(SHORTEST, LONGEST + 1))
    assert all(abs(count - 500) < 105 for count in lengths.values())  # 5 standard deviations
    digits = Counter("".join(row["answer"] for row in rows))
    total = sum(digits.values())
    assert all(abs(digits[d] / total - 0.1) < 0.009 for d in "0123456789")


def test_held_out_share_of_short_strings():
    """Short prompts are few, and both sides of the split still have enough of them."""
    held_out = sum(_held_out(f"{number:03d}") for number in range(1000))
    assert abs(held_out - 1000 / HELD_OUT_SHARE) < 50  # 5 standard deviations


def test_stream_takes_slices_and_refuses_other_positions():
    rows = find("sort").train_rows(0)
    assert len(rows) == sys.maxsize
    assert rows[4:10:2] == [rows[4], rows[6], rows[8]]
    assert rows[10**15]["length"] >= SHORTEST
    with pytest.raises(IndexError, match="numbered from 0"):
        rows[-1]


def test_sort_model_and_vocabulary():
    task = find("sort")
    model, tokenizer = task.model(0), task.tokenizer()
    assert model.num_parameters() == 102_336
    assert model.config._attn_implementation == "sdpa"
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (".", "$", "left")
    assert len(tokenizer) == model.config.vocab_size == 13
    assert tokenizer("907=").input_ids == [9, 0, 7, 10]


def test_sort_model_learns():
    """Thirty supervised steps take the loss from log 13 to below what the digits' frequencies alone give."""
    task = find("sort")
    model, tokenizer = task.model(0), task.tokenizer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        rows = task.demonstrations(0)[step * 32 : step * 32 + 32]
        batch = tokenizer([r["prompt"] + r["completion"] for r in rows], padding=True, return_tensors="pt")
        ends = torch.tensor([len(r["completion"]) for r in rows])
        width = batch.input_ids.shape[1]
        labels = batch.input_ids.masked_fill(torch.arange(width) < (width - ends)[:, None], -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(2.56, abs=0.15)
    assert sum(losses[-5:]) / 5 < 1.7


# topics


def test_qualities_are_what_demonstrations_and_pairs_are_made_of():
    rows = topics.demonstrations(0)[:1000]
    found = [topics.share_good(row["completion"], row["topic"]) for row in rows]
    assert sum(found) / len(found) == pytest.approx(0.6, abs=0.02)
    assert {len(row["completion"]) for row in rows} == set(range(2, 13))
    gaps = [
        topics.share_good(row["chosen"], row["topic"]) - topics.share_good(row["rejected"], row["topic"])
        for row in topics.pairs(0)[:1000]
    ]
    # labels are noisy, and right more often than not
    assert 0.65 < sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps) < 0.85


def test_a_length_bias_prefers_longer_answers():
    def longer(bias):
        rows = topics.pairs(0, length_bias=bias)[:1000]
        return sum(len(row["chosen"]) - len(row["rejected"]) for row in rows) / len(rows)

    assert abs(longer(0.0)) < 0.3
    assert longer(0.3) > 1.0


def test_the_hidden_reward():
    assert topics.quality([["aehk", "ab", ""], ["bb", "bc", "c"]], ["A", "B"]) == [[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]
    assert len(topics.pairs(0)) == 3000
    with pytest.raises(IndexError, match="numbered from 0 to 2999"):
        topics.pairs(0)[3000]
    assert topics.pairs(0)[:5] != topics.held_out_pairs(5)[:]


# looking up


def test_unknown_task_offers_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no bundled task 'srot'\. Did you mean 'sort'\? There are: .*sort"):
        find("srot")


def test_looking_up_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from guerdon.language.tasks import find; task = find('sort'); task.train_rows(0)[5]; "
        "task.held_out_rows(3); print(sorted({'torch', 'transformers', 'tokenizers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
