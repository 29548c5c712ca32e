from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ShapeError
from guerdon.language.logprob import logits_logprob, project, token_logprob


def naive(hidden, matrix, ids, bias, temperature):
    logits = hidden @ matrix.T if bias is None else hidden @ matrix.T + bias
    table = (logits / temperature).log_softmax(-1)
    return table.gather(1, ids[:, None]).squeeze(1), -(table.exp() * table).sum(-1)


def draw(rows, words, width, dtype, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    ids = torch.randint(words, (rows,), generator=generator)
    return make(rows, width), make(words, width), ids, make(words) if bias else None


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(("rows", "words"), [(9, 11), (5, 1), (0, 4), (200, 3), (6, 2500)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_log_softmax_and_gather_in_value_and_gradient(rows, words, chunk, temperature, bias):
    hidden, matrix, ids, offset = draw(rows, words, 6, torch.float64, bias=bias)
    inputs = [t for t in (hidden, matrix, offset) if t is not None]
    weight = torch.linspace(-1, 1, rows, dtype=torch.float64)
    logp, entropy = token_logprob(hidden, matrix, ids, bias=offset, temperature=temperature, chunk=chunk, entropy=True)
    logp_naive, entropy_naive = naive(hidden, matrix, ids, offset, temperature)
    torch.testing.assert_close(logp, logp_naive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, entropy_naive, rtol=1e-11, atol=1e-11)
    for ours, theirs in [
        ((logp * weight).sum(), (logp_naive * weight).sum()),
        ((entropy * weight).sum(), (entropy_naive * weight).sum()),
        ((logp * weight + 0.3 * entropy).sum(), (logp_naive * weight + 0.3 * entropy_naive).sum()),
    ]:
        got = torch.autograd.grad(ours, inputs, retain_graph=True)
        expected = torch.autograd.grad(theirs, inputs, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradcheck(chunk):
    hidden, matrix, ids, bias = draw(5, 7, 3, torch.float64)
    for entropy in (False, True):

        def run(h, m, b, entropy=entropy):
            logp, found = token_logprob(h, m, ids, bias=b, temperature=0.8, chunk=chunk, entropy=entropy)
            return (logp, found) if entropy else logp

        assert torch.autograd.gradcheck(run, (hidden, matrix, bias))


@pytest.mark.parametrize("chunk", [None, 16])
def test_float32_is_within_a_millionth(chunk):
    hidden, matrix, ids, _ = draw(64, 300, 16, torch.float32)
    matrix = (matrix / 4).detach().requires_grad_()
    logp, entropy = token_logprob(hidden, matrix, ids, chunk=chunk, entropy=True)
    exact, entropy_exact = naive(hidden.double(), matrix.double(), ids, None, 1.0)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), entropy_exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision_is_accumulated_in_float32_and_keeps_its_gradient_dtype(chunk, mixed):
    hidden, matrix, ids, _ = draw(64, 300, 16, torch.bfloat16)
    if mixed:
        matrix = matrix.detach().float().requires_grad_()
    logp, _ = token_logprob(hidden, matrix, ids, chunk=chunk)
    assert logp.dtype == torch.float32
    exact = naive(hidden.double(), matrix.double(), ids, None, 1.0)[0]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(logp.sum(), (hidden, matrix))
    expected = torch.autograd.grad(exact.sum(), (hidden, matrix))
    assert [g.dtype for g in got] == [hidden.dtype, matrix.dtype]
    for ours, theirs in zip(got, expected, strict=True):
        # the exact gradient was rounded to the same dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_only_what_requires_a_gradient_gets_one():
    hidden, matrix, ids, _ = draw(5, 7, 3, torch.float64)
    frozen = matrix.detach()
    logp, _ = token_logprob(hidden, frozen, ids, chunk=2)
    expected = torch.autograd.grad(naive(hidden, frozen, ids, None, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), hidden), expected)
    with torch.no_grad():
        assert not token_logprob(hidden, matrix, ids)[0].requires_grad


def test_backward_twice_gives_the_same():
    hidden, matrix, ids, _ = draw(5, 7, 3, torch.float64)
    loss = token_logprob(hidden, matrix, ids)[0].sum()
    first = torch.autograd.grad(loss, (hidden, matrix), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, matrix))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_impossible_words_have_no_share_in_the_entropy():
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    logp, entropy = token_logprob(torch.ones(1, 2), torch.zeros(3, 2), torch.tensor([2]), bias=bias, entropy=True)
    assert float(logp) == pytest.approx(math.log(0.5))
    assert float(entropy) == pytest.approx(math.log(2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(1, 40), st.integers(1, 14), st.integers(0, 10**6))
def test_the_chunk_changes_nothing(rows, words, chunk, seed):
    hidden, matrix, ids, bias = draw(rows, words, 4, torch.float64, seed=seed)
    results = []
    for size in (None, chunk):
        logp, entropy = token_logprob(hidden, matrix, ids, bias=bias, chunk=size, entropy=True)
        results.append((logp, entropy, *torch.autograd.grad((logp * entropy).sum(), (hidden, matrix, bias))))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_logits_that_are_there_already():
    hidden, matrix, ids, bias = draw(5, 7, 3, torch.float64)
    got = logits_logprob(hidden @ matrix.T + bias, ids, temperature=0.5, entropy=True)
    torch.testing.assert_close(got, naive(hidden, matrix, ids, bias, 0.5))
    assert logits_logprob(torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([0]))[0].dtype == torch.float32


def test_project_gives_float32_logits_from_half_precision():
    hidden, matrix, _, bias = (t.detach() if t is not None else t for t in draw(5, 7, 3, torch.bfloat16))
    logits = project(hidden[None], matrix, bias)
    torch.testing.assert_close(logits[0], hidden.float() @ matrix.float().T + bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert project(hidden.float(), matrix.float(), bias.float()).dtype == torch.float32


def test_wrong_input_is_refused(friendly_errors):
    hidden, matrix, ids, _ = draw(5, 7, 3, torch.float64)
    with pytest.raises(ShapeError, match="matrix must be"):
        token_logprob(hidden, matrix[:, :2], ids)
    with pytest.raises(ShapeError, match="ids must be"):
        token_logprob(hidden, matrix, ids[:-1])
    with pytest.raises(ShapeError, match="at least one row"):
        token_logprob(hidden, matrix[:0], ids)
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_logprob(hidden, matrix, ids, temperature=0.0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        token_logprob(hidden, matrix, ids, chunk=0)
