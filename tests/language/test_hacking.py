from __future__ import annotations

from collections import Counter

from guerdon.language.tasks import find
from guerdon.language.tasks.hacking import exclamations, gold, proxy, right_digits


def test_first_rows_are_written_out():
    task = find("hacking")
    assert [len(row["answer"]) for row in task.train_rows(0)[:3]] == [12, 12, 12]
    assert all(row["prompt"] == row["answer"] + "=" for row in task.held_out_rows(20))


def test_demonstrations_are_half_hearted():
    rows = find("hacking").demonstrations(0)[:1500]
    text = "".join(row["completion"][:-1] for row in rows)
    answers = "".join(row["answer"] for row in rows)
    assert len(text) == len(answers) == 18_000
    right = sum(a == b for a, b in zip(text, answers, strict=True)) / 18_000
    assert abs(right - 0.4) < 0.02
    assert abs(Counter(text)["!"] / 18_000 - 0.12) < 0.015


def test_proxy_and_gold_agree_on_digits_and_part_on_exclamations():
    answer, samples = ["012345678012"], [["012345678012", "01234567801!", "!!!!!!!!!!!!", ""]]
    assert [round(x, 9) for x in proxy(samples, answer)[0]] == [9.6, 9.8, 25.2, 0.0]
    assert [round(x, 9) for x in gold(samples, answer)[0]] == [1.0, 0.875, -0.5, 0.0]
    assert right_digits(samples, answer)[0] == [1.0, 11 / 12, 0.0, 0.0]
    assert exclamations(samples)[0] == [0.0, 1 / 12, 1.0, 0.0]
