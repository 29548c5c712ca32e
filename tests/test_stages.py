from __future__ import annotations

import functools
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import nn

from guerdon import stages
from guerdon.errors import BindingError


class Two(NamedTuple):
    advantages: int
    returns: int


def plain(rewards, mask, logp_ref=None, *, beta=0.0, scale="group"):
    return rewards, mask, logp_ref, beta, scale


def several(rewards) -> Two:
    return Two(rewards, rewards)


def columns(samples, answer, **rest):
    return samples, answer, rest


class Stateful(nn.Module):
    def __init__(self, *, rate=0.5):
        super().__init__()
        self.rate = rate

    def forward(self, scores):
        return scores

    def observe(self, step):
        self.seen = step


def test_fields_are_handed_over_by_name():
    assert stages.call(plain, {"mask": 2, "rewards": 1, "other": 3}) == (1, 2, None, 0.0, "group")
    bound = functools.partial(plain, scale="none")
    assert stages.call(bound, {"mask": 2, "rewards": 1, "logp_ref": 4}) == (1, 2, 4, 0.0, "none")


def test_the_rest_goes_to_a_stage_that_takes_it():
    assert stages.call(columns, {"samples": 1, "answer": 2, "level": 3}) == (1, 2, {"level": 3})


def test_a_missing_field_is_named_with_what_there_is():
    with pytest.raises(
        BindingError, match=r"plain needs the field 'mask'.*Did you mean 'masks'\?.*There are: masks, rewards"
    ):
        stages.check(plain, {"rewards", "masks"})


def test_a_module_is_read_by_its_forward_and_its_other_methods():
    stage = Stateful()
    assert stages.signature(stage).required == ("scores",)
    stages.call(stage, {"step": 3}, method="observe")
    assert stage.seen == 3


def test_outputs_are_named_by_a_named_tuple():
    assert stages.signature(several).outputs == ("advantages", "returns")
    assert stages.outputs(several(1), "advantages") == {"advantages": 1, "returns": 1}
    assert stages.outputs(5, "rewards") == {"rewards": 5}


def test_a_costly_field_is_wanted_when_its_term_is_on():
    assert not stages.wants(plain, "logp_ref")
    assert stages.wants(functools.partial(plain, beta=0.1), "logp_ref")
    assert stages.wants(plain, "mask")


def test_a_member_wins_over_the_module_of_the_same_name():
    code = (
        "import guerdon.advantages.gae, guerdon.objectives.ppo\n"
        "from guerdon.advantages import gae\n"
        "from guerdon.objectives import ppo\n"
        "import types\n"
        "assert isinstance(gae, types.FunctionType), gae\n"
        "assert isinstance(ppo, types.FunctionType), ppo\n"
        "from guerdon.advantages.gae import gae as again\n"
        "assert again is gae\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_member_names_the_nearest():
    import guerdon.advantages

    with pytest.raises(AttributeError, match=r"no attribute 'grppo'. Did you mean 'grpo'"):
        _ = guerdon.advantages.grppo


def test_labels_name_the_stage():
    from guerdon.advantages import grpo

    assert stages.label(grpo) == "advantages.grpo"
    assert stages.label(functools.partial(torch.add)) == "add"
