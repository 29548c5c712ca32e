"""Reward expressions: what is read, what is refused, and that values are those of Python's arithmetic."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import RecipeError, ShapeError
from guerdon.rewards import composition
from guerdon.rewards.expression import DEEPEST, LONGEST, RewardExpression, random_expression, thirds
from guerdon.weighting import expression

NAMES = ["g1", "g2", "g3", "g4"]


def parsed(text: str, primitives=4) -> RewardExpression:
    return RewardExpression.parse(text, primitives)


def python_value(tree, scores) -> float:
    """The same arithmetic by Python, from a tree and not from the text; raises as Python does."""
    if isinstance(tree, str):
        return scores[NAMES.index(tree)] if tree in NAMES else float(tree)
    sign, *parts = tree
    values = [python_value(part, scores) for part in parts]
    if len(values) == 1:
        return -values[0] if sign == "-" else +values[0]
    left, right = values
    if sign == "/":
        return left / right
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def written(tree, draw: random.Random) -> str:
    """A tree as text, with parentheses where they are needed and now and then where they are not."""
    if isinstance(tree, str):
        return tree
    sign, *parts = tree
    inner = [f"({written(part, draw)})" if not isinstance(part, str) or draw.random() < 0.1 else part for part in parts]
    gap = draw.choice(["", " "])
    return f"{sign}{inner[0]}" if len(inner) == 1 else f"{inner[0]}{gap}{sign}{gap}{inner[1]}"


leaves = st.sampled_from([*NAMES, "2", "0.5", "3.", ".25", "1e-2", "0"])
trees = st.recursive(
    leaves,
    lambda part: st.one_of(st.tuples(st.sampled_from("+-*/"), part, part), st.tuples(st.sampled_from("+-"), part)),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(trees, st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-6, 3.0]), min_size=4, max_size=4), st.integers(0, 99))
def test_values_are_those_of_python(tree, scores, seed):
    text = written(tree, random.Random(seed))
    if not any(name in text for name in NAMES):
        with pytest.raises(RecipeError, match="no primitive"):
            parsed(text)
        return
    try:
        python_value(tree, [1.0, 1.0, 1e-6, 1 + 1e-6])
    except ZeroDivisionError:
        with pytest.raises(RecipeError, match="divides by zero"):
            parsed(text)
        return
    try:
        expected = python_value(tree, scores)
    except ZeroDivisionError:
        expected = 0.0
    assert parsed(text)(torch.tensor(scores, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("g1-g2-g3", 4.0 - 3.0 - 2.0),
        ("g1/g2/g3", 4.0 / 3.0 / 2.0),
        ("g1-g2*g3", 4.0 - 6.0),
        ("-g1*-g2", 12.0),
        ("--g1", 4.0),
        ("g1*+g2", 12.0),
        ("  g1\t+ g2 ", 7.0),
        ("1.5e1*g3", 30.0),
        ("g1/1e999", 0.0),
        ("0*g1", 0.0),
    ],
)
def test_the_order_of_operations(text, value):
    assert parsed(text)(torch.tensor([4.0, 3.0, 2.0, 1.0])).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("3.0", "no primitive"),
        ("g5", "no primitive 'g5'"),
        ("g0 + g1", "no primitive 'g0'"),
        ("g01", "no primitive 'g01'"),
        ("G1", "no primitive 'G1'"),
        ("g1 g2", "no operator before 'g2'"),
        ("2g1", "no part of an expression"),
        ("2(g1)", "no operator before"),
        ("g1(2)", "no operator before"),
        ("abs(g1)", "no primitive 'abs'"),
        ("__import__('os')", "no primitive '__import__'"),
        ("g1.real", "no part"),
        ("g1**2", "no operand before '\\*'"),
        ("g1//2", "no operand before '/'"),
        ("g1%2", "no part"),
        ("g1 < g2", "no part"),
        ("g1 if g2 else g3", "no primitive 'if'|no operator before 'if'"),
        ("g1, g2", "no part"),
        ("[g1]", "no part"),
        ("g1 = 2", "no part"),
        ("g1;g2", "no part"),
        ("g1\n+g2", "no part"),
        ("'g1'", "no part"),
        ("1_0*g1", "no part"),
        ("0x1*g1", "no part"),
        ("1j*g1", "no part"),
        ("01*g1", "begins with 0"),
        ("1e*g1", "no part"),
        ("(g1", "never closed"),
        ("g1)", "never opened"),
        ("()", "no operand before '\\)'"),
        ("g1+", "operand is missing"),
        ("*g1", "no operand before '\\*'"),
        ("g1/(g1-g2)", "divides by zero"),
        ("g1/0", "divides by zero"),
        ("1e308*10*g1", "not finite"),
        ("9" * 400 + "*g1", "too large"),
        ("g１", "no primitive 'g'"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(RecipeError, match=why):
        parsed(text)


def test_depth_and_length_are_limited():
    assert parsed("(" * DEEPEST + "g1" + ")" * DEEPEST)(torch.ones(4)).item() == 1.0
    with pytest.raises(RecipeError, match="nested"):
        parsed("(" * (DEEPEST + 1) + "g1" + ")" * (DEEPEST + 1))
    with pytest.raises(RecipeError, match="characters"):
        parsed("g1" + "+g1" * LONGEST)
    with pytest.raises(RecipeError, match="never closed"):
        parsed("-" * 4000 + "(g1")


def test_a_batch_is_its_samples_and_scores_stay_as_they_were():
    reward = parsed("g1/g2 - g3*(g4 - 0.5)")
    scores = torch.tensor([0.0, 1.0, -2.0, 0.5])[torch.randint(4, (3, 5, 4))]
    before = scores.clone()
    found = reward.evaluate(scores)
    assert torch.equal(scores, before)
    assert found.values.shape == (3, 5)
    for p in range(3):
        for g in range(5):
            assert found.values[p, g] == reward(scores[p, g])
    assert torch.equal(found.failed, scores[..., 1] == 0)
    assert (found.values[found.failed] == 0).all()


def test_inside_a_division_by_zero_is_no_value_either():
    # 1 / (g1 / g2) would be 0 in floating point where g2 is 0; Python raises, and so the sample has no value
    found = parsed("1/(g1/g2)").evaluate(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]]))
    assert found.failed.tolist() == [True, False]
    assert found.values.tolist() == [0.0, 2.0]


def test_gradients_reach_the_scores_and_are_numbers_everywhere():
    scores = torch.tensor([[2.0, 4.0], [1.0, 0.0], [1e38, 1e-38]], requires_grad=True)
    parsed("g1/g2", 2)(scores).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.25, -0.125], [0.0, 0.0], [0.0, 0.0]]


def test_names_and_places_name_the_same():
    scores = torch.tensor([3.0, 5.0])
    for text in ("right - short", "g1 - g2", "right - g2"):
        assert parsed(text, ("right", "short"))(scores).item() == -2.0
    assert parsed("g1 - g2", ("g2", "g1"))(scores).item() == 2.0  # names go before places
    with pytest.raises(RecipeError, match="Did you mean 'right'"):
        parsed("rigth", ("right", "short"))


def test_equality_is_that_of_what_is_computed():
    assert parsed("g1+0.5*g2") == parsed(" (g1) + 0.50 * g2")
    assert hash(parsed("g1+0.5*g2")) == hash(parsed("g1 + 0.5*g2"))
    assert parsed("g1+g2") != parsed("g2+g1")
    assert parsed("g1", 4) != parsed("g1", 3)


def test_scores_of_another_width_are_an_error():
    with pytest.raises(ShapeError, match="4"):
        parsed("g1")(torch.zeros(2, 3))


def test_random_expressions_are_valid_and_varied():
    texts = [random_expression(random.Random(seed), NAMES) for seed in range(300)]
    for text in texts:
        parsed(text)
    assert len(set(texts)) > 200
    assert any("(" in text for text in texts)
    assert not any("(" in random_expression(random.Random(seed), NAMES, products=0.0) for seed in range(100))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([3.0], [3.0, 0.0, 0.0]),
        ([1.0, 3.0], [1.0, 3.0, 0.0]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 4.0, 8.0], [1.5, 4.0, 8.0]),
        ([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0.5, 1.0, 0.0]),
    ],
)
def test_thirds(steps, expected):
    assert thirds(torch.tensor(steps)).tolist() == expected
    padded = torch.tensor([*steps, float("nan"), float("nan")])
    mask = torch.arange(len(padded)) < len(steps)
    assert thirds(padded, mask).tolist() == expected


def test_thirds_of_no_step_are_zero():
    assert thirds(torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2


def test_a_linear_expression_is_a_linear_weighting():
    scores = torch.randn(3, 4, 2)
    found = expression(scores, ("right", "short"), formula="2*right - short/4")
    assert torch.allclose(found.rewards, 2 * scores[..., 0] - scores[..., 1] / 4)
    assert torch.allclose(found.weights, torch.tensor([2.0, -0.25]).expand(3, 4, 2))


def test_slopes_of_what_is_bent_and_of_what_has_no_value():
    found = expression(torch.tensor([[[3.0, 2.0], [3.0, 0.0]]]), formula="g1*g1/g2")
    assert found.rewards.tolist() == [[4.5, 0.0]]
    assert found.weights.tolist() == [[[3.0, -2.25], [0.0, 0.0]]]


def test_unscored_components_count_as_zero_unless_all_are_unscored():
    nan = float("nan")
    scores = torch.tensor([[[nan, 2.0, 5.0], [1.0, nan, 5.0], [nan, nan, 5.0]]])
    found = expression(scores, formula="g1 + g2").rewards[0].tolist()
    assert found[:2] == [2.0, 1.0]
    assert found[2] != found[2]


def test_a_composition_calls_its_rewards():
    def halves(samples):
        return [[0.5 for _ in group] for group in samples]

    stage = composition(formula="same / half - g2", of={"same": "exact_answer", "half": halves})
    assert stage(["p", "q"], [["a", "b"], ["c", "q"]], answer=["a", "q"]) == [[1.5, -0.5], [-0.5, 1.5]]


def test_a_composition_of_what_was_not_scored():
    def sometimes(samples):
        return [[None if sample == "x" else 2.0 for sample in group] for group in samples]

    of = {"a": sometimes, "same": "exact_answer"}
    assert composition(formula="a", of=of)(["p"], [["x", "y"]], answer=["y"]) == [[None, 2.0]]
    assert composition(formula="a + same", of=of)(["p"], [["x", "y"]], answer=["y"]) == [[0.0, 3.0]]


def test_a_composition_says_what_is_wrong_when_it_is_made():
    with pytest.raises(RecipeError, match="no primitive 'b'"):
        composition(formula="a + b", of={"a": "exact_answer"})
    with pytest.raises(RecipeError, match=r"rewards.composition.of.a"):
        composition(formula="a", of={"a": "exact_anser"})
    with pytest.raises(RecipeError, match="at least one"):
        composition(formula="a", of={})
