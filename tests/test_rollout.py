from __future__ import annotations

import pytest
import torch

from guerdon.errors import ShapeError
from guerdon.rollout import Pairs, Rollout, join

P, G, T = 3, 2, 4


def make(prompts: int = P, group: int = G, steps: int = T, width: int = 5, start: int = 0) -> Rollout:
    mask = torch.ones(prompts, group, steps).bool()
    return Rollout(
        prompts=[f"p{start + i}" for i in range(prompts)],
        samples=[[f"s{start + i}{g}" for g in range(group)] for i in range(prompts)],
        mask=mask,
        logp_old=torch.arange(mask.numel()).view(mask.shape).float(),
        steps={"prompt_ids": torch.ones(prompts, width).long(), "ids": torch.ones(mask.shape).long()},
        columns={"answer": [str(start + i) for i in range(prompts)]},
        extras={"truncated": torch.zeros(prompts, group).bool(), "notes": ["n"] * prompts},
        indices=list(range(start, start + prompts)),
    )


def test_select_keeps_groups_whole_in_every_part():
    part = make().validate().select([2, 0])
    assert part.prompts == ["p2", "p0"]
    assert part.samples == [["s20", "s21"], ["s00", "s01"]]
    assert part.columns == {"answer": ["2", "0"]}
    assert part.indices == [2, 0]
    assert part.logp_old[0, 0, 0] == 2 * G * T
    assert part.steps["ids"].shape == (2, G, T)
    assert part.extras["truncated"].shape == (2, G)
    assert part.extras["notes"] == ["n", "n"]
    part.validate()


def test_select_by_slice_equals_select_by_positions():
    whole = make()
    assert torch.equal(whole.select(slice(0, None, 2)).logp_old, whole.select([0, 2]).logp_old)
    whole.indices = []  # a rollout made by hand may leave them out
    assert whole.select([1]).indices == []
    assert len(whole.select([])) == 0


def test_trim_cuts_steps_that_are_live_nowhere_and_extend_puts_them_back():
    rollout = make()
    rollout.mask[:, :, 2:] = False
    rollout.mask[1, 1, 2] = True
    short = rollout.trim()
    assert short.mask.shape == (P, G, 3)
    assert short.steps["ids"].shape == (P, G, 3)
    assert short.steps["prompt_ids"].shape == (P, 5)
    back = short.extend(T)
    assert torch.equal(back.mask, rollout.mask)
    assert back.steps["ids"].shape == (P, G, T)


def test_trim_of_nothing_live_keeps_one_step():
    rollout = make()
    rollout.mask[:] = False
    assert rollout.trim().mask.shape == (P, G, 1)


def test_scores_of_as_many_components_as_steps_are_not_cut():
    rollout = make().update({"scores": torch.ones(P, G, T), "score_names": tuple("abcd")})
    rollout.mask[:, :, 1:] = False
    assert rollout.trim().scores.shape == (P, G, T)
    assert rollout.trim().extend(6).scores.shape == (P, G, T)


def test_join_pads_steps_right_and_prompts_left():
    a, b = make(2, steps=4, width=5), make(1, steps=2, width=3, start=2)
    b.steps["prompt_ids"][:] = 7
    both = join([a, b]).validate()
    assert both.prompts == ["p0", "p1", "p2"]
    assert both.mask[2].tolist() == [[True, True, False, False]] * G
    assert both.steps["prompt_ids"][2].tolist() == [0, 0, 7, 7, 7]
    assert both.indices == [0, 1, 2]


def test_join_undoes_select():
    whole = make()
    again = join([whole.select(slice(0, 1)), whole.select(slice(1, None))])
    assert torch.equal(again.logp_old, whole.logp_old)
    assert again.columns == whole.columns


def test_join_refuses_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"same group size G; got \[2, 3\]"):
        join([make(), make(group=3)])
    with pytest.raises(ShapeError, match="logp_ref is there in some of the rollouts only"):
        join([make(), make().update({"logp_ref": torch.zeros(P, G, T)})])
    with pytest.raises(ShapeError, match="got none"):
        join([])


@pytest.mark.usefixtures("friendly_errors")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp_old": torch.zeros(P, G)}, r"rollout: logp_old must be \[P, G, T\]; got \[3, 2\]"),
        (
            {"logp_old": torch.zeros(P, G, T + 1)},
            r"logp_old must be \[P, G, T\] with T = 4; got \[3, 2, 5\] where mask has T",
        ),
        ({"rewards": torch.zeros(P * G)}, r"rewards must be \[P, G\]; got \[6\].*reshape\(P, G\)"),
        ({"mask": torch.ones(P, G, T)}, r"mask must be bool; got torch.float32. Use mask.bool\(\)"),
        ({"samples": [["a"] * G] * 2 + [["a"]]}, r"samples\[2\] must hold the whole group \(G = 2\); got 1"),
        ({"prompts": ["a"]}, r"prompts must have one entry per prompt \(P = 3\); got 1"),
        ({"columns": {"answer": ["1"]}}, r"columns\['answer'\] must have one entry per prompt"),
        ({"scores": torch.zeros(P, G, 2), "score_names": ("one",)}, r"score_names must have K = 2 names; got 1"),
    ],
)
def test_validation_says_what_where_and_why(change, message):
    with pytest.raises(ShapeError, match=message):
        make().update(change).validate()


def test_update_puts_unknown_names_into_extras():
    rollout = make().update({"rewards": torch.zeros(P, G), "returns": torch.ones(P, G, T)})
    assert rollout.rewards is not None
    assert "returns" in rollout.extras
    assert {"returns", "answer", "lengths", "truncated"} <= set(rollout.available())
    assert "logp_ref" not in rollout.available()


def test_pairs_check_each_side_for_itself():
    ones = torch.ones(2, 3).bool()
    pairs = Pairs(torch.zeros(2, 3), torch.zeros(2, 4), ones, torch.ones(2, 4).bool(), columns={"prompt": ["a", "b"]})
    assert len(pairs.validate()) == 2
    pairs.columns = {"prompt": ["a"]}
    with pytest.raises(ShapeError, match=r"pairs: columns\['prompt'\] must have B = 2 entries; got 1"):
        pairs.validate()


@pytest.mark.usefixtures("friendly_errors")
def test_pairs_name_the_side_that_is_wrong():
    ones = torch.ones(2, 3).bool()
    with pytest.raises(ShapeError, match=r"pairs: logp_rejected must be \[B, S\] with S = 3; got \[2, 4\]"):
        Pairs(torch.zeros(2, 3), torch.zeros(2, 4), ones, ones).validate()
