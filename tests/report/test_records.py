from __future__ import annotations

import json
from pathlib import Path

import pytest

from guerdon.errors import DataError
from guerdon.report import read_run
from guerdon.report.groups import read_ledger
from guerdon.report.records import read_lines
from guerdon.report.samples import read_samples
from guerdon.report.thinning import Evenly, bin_curve, thin
from guerdon.report.words import change, cut, duration, figure, setting

from .synthetic import write_run

LINES = '{"step": 1, "reward": 0.25}\n{"step": 2, "reward": 0.5}\n'


def _run(folder: Path, metrics: str | bytes) -> Path:
    (folder / "metrics.jsonl").write_bytes(metrics.encode() if isinstance(metrics, str) else metrics)
    return folder


def test_a_whole_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "one", steps=20))
    assert run.name == "one"
    assert run.recipe["rewards"] == {"correct": "exact_answer", "short": "length_below"}
    assert [record["step"] for record in run.metrics] == list(range(21))
    assert run.series("lr")[0] == list(range(1, 21))  # step 0 is an evaluation and has no learning rate
    assert run.notes == []


@pytest.mark.parametrize("tail", ['{"step": 3, "rew', '{"step": 3', "\x00\x00\x00", '{"step": 3, "text": "caf\xc3'])
def test_a_last_line_that_was_cut_off_is_left_out_and_said(tmp_path, tail):
    run = read_run(_run(tmp_path, LINES.encode() + tail.encode("latin-1")))
    assert [record["step"] for record in run.metrics] == [1, 2]
    assert len(run.notes) == 1
    assert "metrics.jsonl: line 3, the last, is cut off" in run.notes[0]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    run = read_run(_run(tmp_path, LINES.rstrip("\n")))
    assert [record["step"] for record in run.metrics] == [1, 2]
    assert run.notes == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"step": 1}\n{"step": 2, \n{"step": 3}\n', 2),
        ('{"step": 1}\n{"step": 2, "rew\n', 2),  # it ends with a newline, so no kill cut it
        ('{"step": 1}\n[1, 2]\n', 2),
        ('{"reward": 1}\n', 1),
        ('{"step": "1"}\n', 1),
        ('{"step": 1}\n\n{"step": true}\n', 3),
    ],
)
def test_any_other_malformed_line_names_file_and_line(tmp_path, text, line):
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line {line}: not a JSON object"):
        read_run(_run(tmp_path, text))


def test_missing_files_are_empty_and_a_directory_without_a_run_is_an_error(tmp_path):
    run = read_run(_run(tmp_path, LINES))
    assert (run.recipe, run.environment, run.status, run.supervised) == ({}, {}, {}, [])
    assert list(read_lines(tmp_path / "none.jsonl", [])) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither recipe\.yaml nor metrics\.jsonl"):
        read_run(tmp_path / "empty")
    with pytest.raises(DataError, match="there is no directory"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("recipe.yaml", "loop: online\nrewards: [a\n", r"recipe\.yaml, line 3: not YAML"),
        ("recipe.yaml", "- a\n- b\n", r"recipe\.yaml, line 1: a recipe is a mapping"),
        ("status.json", '{"state":\n "fin', r"status\.json, line 2: not JSON"),
        ("environment.json", "[]", r"environment\.json, line 1: not a JSON object"),
    ],
)
def test_other_malformed_files_name_file_and_line(tmp_path, name, text, says):
    _run(tmp_path, LINES)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        read_run(tmp_path)


def test_a_step_written_twice_keeps_its_later_record(tmp_path):
    run = read_run(_run(tmp_path, LINES + '{"step": 2, "reward": 0.75}\n{"step": 3, "reward": 1.0}\n'))
    assert run.series("reward") == ([1, 2, 3], [0.25, 0.75, 1.0])
    assert "1 steps were written more than once" in run.notes[0]


def test_values_that_are_not_finite_are_gaps_and_are_said(tmp_path):
    run = read_run(_run(tmp_path, '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1}\n{"step": 3, "loss": Infinity}\n'))
    assert run.series("loss") == ([1, 2, 3], [None, 1.0, None])
    assert run.notes == ["metrics.jsonl: loss is not a finite number at 2 steps, first at step 1."]


def _entry(step: int, values: list, **changed) -> dict:
    zeros = [[[0.0] for _ in group] for group in values]
    flat = [[0.0 for _ in group] for group in values]
    scores = [[[score] for score in group] for group in values]
    return {
        "step": step, "prompt_index": list(range(10, 10 + len(values))), "components": ["correct"],
        "raw": scores, "shaped": scores,
        "weights": [2.0], "contributions": zeros, "remainder": flat, "advantages": flat,
        "constant": [len(set(group)) == 1 for group in values], "dropped": [],
    } | changed  # fmt: skip


def _ledger(folder: Path, *entries: dict) -> Path:
    (folder / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "ledger.jsonl"


def test_groups_at_the_highest_and_lowest_score_are_counted(tmp_path):
    first = _entry(1, [[0, 0], [0, 0], [1, 0], [1, 1]])
    view = read_ledger(_ledger(tmp_path, first, _entry(2, [[1, 1], [1, 1], [0, 1], [None, None]])), set(), [])
    assert view.groups == [4, 4]
    assert view.right == {"correct": [1, 2]}
    assert view.wrong == {"correct": [2, 0]}  # a group that was not scored is neither


def test_a_policy_that_never_succeeds_is_all_wrong_not_all_right(tmp_path):
    view = read_ledger(_ledger(tmp_path, _entry(1, [[0, 0], [0, 0]])), set(), [])
    assert (view.right, view.wrong) == ({"correct": [0]}, {"correct": [2]})


def test_scores_outside_the_unit_interval_are_held_against_their_own_range(tmp_path):
    view = read_ledger(_ledger(tmp_path, _entry(1, [[-1, -1], [3, 3], [0, 0], [-1, 3]])), set(), [])
    assert (view.right, view.wrong) == ({"correct": [1]}, {"correct": [1]})


def test_a_step_of_the_ledger_that_was_written_twice_counts_once(tmp_path):
    path = _ledger(tmp_path, _entry(1, [[1, 1]]), _entry(2, [[1, 1]]), _entry(2, [[0, 0]]))
    view = read_ledger(path, set(), [])
    assert (view.steps, view.right["correct"], view.wrong["correct"]) == ([1, 2], [1, 0], [0, 1])
    assert [step.step for step in view.views] == [1, 2]
    assert view.views[1].narrowest[0].samples[0].raw == [0]


def test_the_groups_with_the_largest_and_smallest_spread_are_found(tmp_path):
    raw = [[0.0, 0.1], [0.0, 0.9], [0.5, 0.5], [0.0, 0.3], [0.2, 0.9], [0.0, 0.2], [1.0, 0.0]]
    (step,) = read_ledger(_ledger(tmp_path, _entry(1, raw)), set(), []).views
    assert [group.prompt_index for group in step.widest] == [16, 11, 14]
    assert [group.spread for group in step.widest] == pytest.approx([2.0, 1.8, 1.4])  # weight 2
    assert [group.prompt_index for group in step.narrowest] == [12, 10, 15]
    assert [sample.raw for sample in step.widest[0].samples] == [[1.0], [0.0]]


def test_weights_of_each_sample_and_dropped_samples(tmp_path):
    raw = [[1.0, 1.0, 5.0]]
    entry = _entry(4, raw, weights=[[[1.0], [0.5], [1.0]]], dropped=[[0, 2, "correct", "NaN"]])
    view = read_ledger(_ledger(tmp_path, entry), set(), [])
    assert view.dropped == {("correct", "NaN"): 1}
    assert view.dropped_first == [(4, 10, 2, "correct", "NaN")]
    group = view.views[0].widest[0] if view.views[0].widest else view.views[0].narrowest[0]
    assert group.spread == 0.5
    assert [sample.total for sample in group.samples] == [1.0, 0.5, None]
    assert group.samples[2].dropped == "correct: NaN"


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"raw": [[[1.0, 2.0], [1.0, 2.0]]]}, "line 2: not a step of a ledger: its columns do not fit together"),
        ({"shaped": [[[1.0]]]}, "line 2: not a step of a ledger"),
        ({"dropped": [[7, 0, "correct", "NaN"]]}, "line 2: not a step of a ledger"),
    ],
)
def test_a_ledger_whose_columns_do_not_fit_is_an_error(tmp_path, broken, says):
    with pytest.raises(DataError, match=says):
        read_ledger(_ledger(tmp_path, _entry(1, [[0, 1]]), _entry(2, [[0, 1]], **broken)), set(), [])
    entry = _entry(2, [[0, 1]])
    del entry["components"]
    with pytest.raises(DataError, match="line 2: not a step of a ledger: it has no 'components'"):
        read_ledger(_ledger(tmp_path, _entry(1, [[0, 1]]), entry), set(), [])


def test_only_a_few_steps_of_a_long_ledger_are_held(tmp_path):
    path = _ledger(tmp_path, *(_entry(step, [[0, 1], [1, 1]]) for step in range(1, 201)))
    steps = [view.step for view in read_ledger(path, set(), []).views]
    assert len(steps) <= 13
    assert (steps[0], steps[-1]) == (1, 200)
    wanted = [view.step for view in read_ledger(path, {50, 100}, []).views]
    assert wanted == [50, 100, 200]  # and the last, whatever is wanted


def test_samples_are_paired_by_prompt_and_ordered_by_change(tmp_path):
    def record(phase, index, reward, mode="greedy"):
        scores = {"correct": reward}
        return {
            "step": 0 if phase == "before" else 9, "phase": phase, "mode": mode, "index": index, "reward": reward,
            "prompt": f"p{index}", "sample": f"{phase} {index}", "scores": scores,
        }  # fmt: skip

    before = [record("before", i, r) for i, r in enumerate([0.0, 0.5, 1.0, 0.2])]
    after = [record("after", i, r) for i, r in [(1, 1.0), (0, 1.0), (3, 0.2), (2, 0.0)]]
    records = [*before, record("before", 0, 0.0, "sampled"), *after, record("after", 0, 0.0, "sampled")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    samples = read_samples(tmp_path / "samples.jsonl", [])
    assert samples.mode == "greedy"
    assert [(found.title, found.count) for found in samples.sets] == [
        ("Reward rose", 2), ("Reward fell", 1), ("Reward unchanged", 1),
    ]  # fmt: skip
    assert [(pair.before.text, pair.after.text) for pair in samples.sets[0].pairs] == [
        ("before 0", "after 0"), ("before 1", "after 1"),
    ]  # fmt: skip


def test_streams_and_curves_are_thinned_evenly():
    evenly = Evenly(4)
    for item in range(1000):
        evenly.add(item)
    picked = evenly.pick()
    assert (len(picked), picked[0], picked[-1]) == (4, 0, 999)
    assert thin(list(range(10)), 4) == [0, 3, 6, 9]
    assert bin_curve([1, 2, 3, 4, 5], [1.0, 3.0, None, None, 5.0], 3) == ([2, 4, 5], [2.0, None, 5.0])
    assert bin_curve([1, 2, 3], [1.0, 3.0, 2.0], 2, largest=True) == ([2, 3], [3.0, 2.0])
    assert bin_curve([1, 2], [1.0, None], 2) == ([1, 2], [1.0, None])


def test_words():
    assert [figure(v) for v in (None, 0.0, -0.5, 0.12345, 123.4, 12345.6, 3e-6)] == [
        "–", "0", "−0.5", "0.123", "123", "12,346", "3.0e−06",
    ]  # fmt: skip
    assert [figure(v, "share") for v in (0.0, 0.125, 1.0)] == ["0\u00a0%", "12.5\u00a0%", "100\u00a0%"]
    assert (change(0.1, 0.4), change(0.4, 0.4), change(None, 1.0)) == ("+0.3", "0", "")
    assert (change(0.1, 0.4, "share"), change(0.4, 0.4, "share")) == ("+30 points", "0 points")
    assert [duration(s) for s in (None, 12.4, 200, 7500)] == ["–", "12 s", "3 min 20 s", "2 h 05 min"]
    assert [setting(v) for v in (None, "a", {"grpo": {}}, {"copo": {"gamma": 3}}, [0.9, 0.99])] == [
        "null", "a", "grpo", "{copo: {gamma: 3}}", "[0.9, 0.99]",
    ]  # fmt: skip
    assert cut("abcdef", 4) == "abcd … (2 more characters)"
    assert cut({"a": 1}, 40) == '{"a": 1}'
