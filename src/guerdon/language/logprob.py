"""Log-probabilities of chosen tokens from hidden states, without ever holding all the logits.

An output layer over V tokens turns N hidden states into N x V logits, which for a large vocabulary is more memory than
the rest of the model. Only N numbers are wanted, so the logits are made a tile at a time, in forward and in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from guerdon.errors import ShapeError, check_shapes

LOGITS_IN_A_CHUNK = 16 * 2**20
"""Most logits held at once on a CPU: 64 MiB in float32."""
LOGITS_ON_A_DEVICE = 256 * 2**20
"""The same on an accelerator, where small chunks leave it waiting for the next kernel."""

_LOW = (torch.float16, torch.bfloat16)
_FEWEST_COLUMNS = 1024


def token_logprob(
    hidden: Float[Tensor, "N H"],
    matrix: Float[Tensor, "V H"],
    ids: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy: bool = False,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """Log-probability of one chosen token per row under softmax((hidden @ matrix.T + bias) / temperature).

    The same numbers as `log_softmax` and `gather`, with the memory of one chunk of logits. The forward pass keeps one
    normaliser a row; the backward pass makes the logits again, tile by tile, and turns each tile into its gradient. If
    everything fits into one chunk the probabilities are kept instead and nothing is computed twice.

    Args:
        hidden: [N, H] hidden states.
        matrix: [V, H] output layer, a row per token.
        ids: [N] chosen tokens.
        bias: [V] added to the logits.
        temperature: divides the logits; positive.
        chunk: rows whose logits are held at once; None = as many as make 16M logits, on an
            accelerator 256M.
        entropy: also return the entropy of each row's distribution.

    Returns:
        Log-probabilities [N] and entropies [N] in nats (None unless asked for): float64 if an input is, else float32.

    Raises:
        ShapeError: the shapes do not fit.
        ValueError: `temperature` or `chunk` is not positive.

    Gradient:
        Through `hidden`, `matrix` and `bias`, from both results, in the dtype of each; once (no second derivative).

    Edge cases:
        N = 0 gives empty results. V = 1 gives log-probability 0. Half-precision inputs are multiplied and summed up in
        float32.

    Example:
        >>> import torch
        >>> logp, _ = token_logprob(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
        >>> logp.exp()
        tensor([0.2500, 0.2500])
    """
    named = {"hidden": (hidden, "N H"), "matrix": (matrix, "V H"), "ids": (ids, "N")}
    if bias is not None:
        named["bias"] = (bias, "V")
    size = check_shapes("language.token_logprob", **named)
    if temperature <= 0:
        raise ValueError(f"language.token_logprob: temperature must be positive; got {temperature}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"language.token_logprob: chunk must be at least 1 row; got {chunk}.")
    if size["V"] == 0:
        raise ShapeError("language.token_logprob: matrix must have at least one row (token); got none.")
    most = LOGITS_IN_A_CHUNK if hidden.device.type == "cpu" else LOGITS_ON_A_DEVICE
    budget = most if chunk is None else chunk * size["V"]
    hidden = _operand(hidden, matrix)
    keep = torch.is_grad_enabled()
    logp, entropies = _TokenLogprob.apply(hidden, matrix, bias, ids, float(temperature), budget, entropy, keep)
    return logp, entropies if entropy else None


def logits_logprob(
    logits: Float[Tensor, "N V"], ids: Int[Tensor, " N"], *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """The same from logits that are there already, for models whose head is more than one matrix.

    Args:
        logits: [N, V].
        ids: [N] chosen tokens.
        temperature: divides the logits.
        entropy: also return the entropies.

    Returns:
        Log-probabilities [N] and entropies [N] (None unless asked for), at least float32.

    Gradient:
        Through `logits`, from both results.

    Example:
        >>> import torch
        >>> logits_logprob(torch.zeros(1, 2), torch.tensor([1]), entropy=True)
        (tensor([-0.6931]), tensor([0.6931]))
    """
    logits = logits.float() if logits.dtype in _LOW else logits
    table = F.log_softmax(logits / temperature if temperature != 1 else logits, -1)
    logp = table.gather(-1, ids[:, None]).squeeze(-1)
    return logp, -(table.exp() * table).sum(-1) if entropy else None


def token_logit(
    hidden: Float[Tensor, "N H"],
    matrix: Float[Tensor, "V H"],
    ids: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """The logit of one chosen token per row, (hidden @ matrix.T + bias) / temperature, of which no other is made.

    Less the token's log-probability it is the row's normaliser, logsumexp of all its logits.

    Args:
        hidden, matrix, ids, bias, temperature: as for `token_logprob`.

    Returns:
        Logits [N]: float64 if an input is, else float32.

    Gradient:
        Through `hidden`, `matrix` and `bias`.

    Example:
        >>> import torch
        >>> token_logit(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]))
        tensor([7.])
    """
    hidden, rows = _operand(hidden, matrix), matrix[ids]
    dtype = _wide(hidden, matrix)
    low = next((t.dtype for t in (hidden, rows) if t.dtype in _LOW), None)
    if low is not None and hidden.is_cuda:
        hidden, rows = hidden.to(low), rows.to(low)  # rounded as `_multiply` rounds its operands
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (hidden.to(dtype) * rows.to(dtype)).sum(-1)
        return (logits if bias is None else logits + bias[ids]) / temperature


def project(hidden: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits of an output layer, in float32 at least whatever the dtype of its inputs. For use without gradient."""
    if hidden.dtype == matrix.dtype and hidden.dtype not in _LOW and not torch.is_autocast_enabled(hidden.device.type):
        return F.linear(hidden, matrix, bias)
    hidden = _operand(hidden, matrix)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _multiply(hidden.reshape(-1, hidden.shape[-1]), matrix.T)
        logits = logits if bias is None else logits + bias
        return logits.view(*hidden.shape[:-1], -1)


def _operand(hidden: Tensor, matrix: Tensor) -> Tensor:
    """Hidden states in the dtype they are multiplied in: autocast's on an accelerator; never less than the other's."""
    device = hidden.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        return hidden.to(torch.get_autocast_dtype(device))
    if hidden.dtype in _LOW or matrix.dtype in _LOW:
        return hidden
    return hidden.to(torch.promote_types(hidden.dtype, matrix.dtype))


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype results are accumulated in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with a result in float32 (float64) from operands of any dtype."""
    if a.dtype == b.dtype and a.dtype not in _LOW:
        return a @ b
    if a.is_cuda and (a.dtype in _LOW or b.dtype in _LOW):
        dtype = a.dtype if a.dtype in _LOW else b.dtype
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    dtype = _wide(a, b)
    a = a.to(dtype)
    if b.dtype == dtype:
        return a @ b
    # convert the large operand a piece at a time
    step = max(1, LOGITS_IN_A_CHUNK // (4 * max(1, b.shape[0])))
    return torch.cat([a @ piece.to(dtype) for piece in b.split(step, 1)], 1)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in place."""
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total.add_(_multiply(a, b))


def _tile_logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = _multiply(hidden, matrix.T)
    if bias is not None:
        logits += bias
    if temperature != 1:
        logits /= temperature
    return logits


def _less_chosen(log_probabilities: Tensor, at: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities, less one at the chosen token; in half precision rounded on the way out, which saves a pass."""
    chosen = log_probabilities.gather(1, at)
    out = torch.empty_like(log_probabilities, dtype=dtype) if dtype in _LOW else log_probabilities
    torch.exp(log_probabilities, out=out)
    return out.scatter_(1, at, torch.where(inside[:, None], chosen.expm1(), chosen.exp()).to(out.dtype))


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        budget: int,
        entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        keep = keep and any(ctx.needs_input_grad[:3])
        rows, tokens = len(hidden), len(matrix)
        dtype = _wide(hidden, matrix)
        logp, normaliser, entropies = (hidden.new_empty(rows, dtype=dtype) for _ in range(3))
        one = rows * tokens <= budget
        # the entropy needs logits and probabilities side by side
        step = max(1, rows if one else budget // (tokens * (2 if entropy else 1)))
        probabilities = None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, rows, step):
                rows_here = slice(start, start + step)
                logits = _tile_logits(hidden[rows_here], matrix, bias, temperature)
                top = logits.amax(1, keepdim=True)
                logits -= top
                chosen = logits.gather(1, ids[rows_here, None]).squeeze(1)
                weights = logits.exp() if entropy else logits.exp_()
                total = weights.sum(1)
                log_total = total.log()
                torch.sub(chosen, log_total, out=logp[rows_here])
                torch.add(top.squeeze(1), log_total, out=normaliser[rows_here])
                if entropy:
                    # log-probabilities that underflow to -inf have weight 0
                    mean = logits.clamp_(min=-1e4).mul_(weights).sum(1) / total
                    torch.sub(log_total, mean, out=entropies[rows_here])
                if one and keep:
                    probabilities = weights.div_(total[:, None])
                del logits, weights
        if keep:
            ctx.save_for_backward(hidden, matrix, bias, ids, normaliser, entropies)
            # kept beside the saved tensors because backward writes into it and puts it back
            ctx.probabilities = probabilities
            ctx.settings = (temperature, budget)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, grad_entropy = grads
        hidden, matrix, bias, ids, normaliser, entropies = ctx.saved_tensors
        temperature, budget = ctx.settings
        wants_hidden, wants_matrix, wants_bias = ctx.needs_input_grad[:3]
        nothing = (None,) * 8
        if grad is None and grad_entropy is None:
            return nothing
        rows, tokens = len(hidden), len(matrix)
        dtype = normaliser.dtype
        grad = hidden.new_zeros(rows, dtype=dtype) if grad is None else grad / temperature
        grad_entropy = None if grad_entropy is None else grad_entropy / temperature
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if wants_hidden else None
        grad_matrix = torch.empty_like(matrix) if wants_matrix else None
        grad_bias = torch.empty_like(bias) if wants_bias else None

        # Tiles run over tokens first: each part of the matrix gradient is then finished in one go, in full precision,
        # and only the hidden states' gradient (small) is added up.
        if ctx.probabilities is not None:
            height, width = max(rows, 1), tokens
        else:
            # half of the forward pass's, because the matrix gradient stands beside the tile; entropies need two tiles
            budget //= 4 if grad_entropy is not None else 2
            height = max(1, min(rows, budget // min(tokens, _FEWEST_COLUMNS)))
            width = max(1, min(tokens, budget // height))
        plain = grad_entropy is None
        direct = grad_matrix is not None and grad_matrix.dtype == hidden.dtype and hidden.dtype not in _LOW
        with torch.autocast(hidden.device.type, enabled=False):
            # without entropy the factor of a row is taken out of the tile and put on the small side
            scaled = (hidden * -grad[:, None]).to(hidden.dtype) if plain and wants_matrix else hidden
            for left in range(0, tokens, width):
                columns = slice(left, min(left + width, tokens))
                part = matrix[columns]
                part_grad = part_bias = None
                for start in range(0, rows, height):
                    rows_here = slice(start, min(start + height, rows))
                    at = ids[rows_here] - left
                    inside = (at >= 0) & (at < columns.stop - left)
                    at = at.clamp(0, columns.stop - left - 1)[:, None]
                    factor = grad[rows_here]
                    tile, before = ctx.probabilities, None
                    if tile is None:
                        offset = None if bias is None else bias[columns]
                        tile = _tile_logits(hidden[rows_here], part, offset, temperature)
                        tile.sub_(normaliser[rows_here, None])
                        tile = _less_chosen(tile, at, inside, hidden.dtype) if plain else tile.exp_()
                    elif plain:
                        before = tile.gather(1, at)
                        tile.scatter_(1, at, before - inside[:, None].to(dtype))
                    if not plain:
                        slope = grad_entropy[rows_here]
                        fresh = torch.special.entr(tile).mul_(slope[:, None])
                        fresh.addcmul_(tile, (factor + slope * entropies[rows_here])[:, None], value=-1)
                        tile = fresh.scatter_add_(1, at, (factor * inside)[:, None])
                        del fresh
                    small = tile if hidden.dtype not in _LOW else tile.to(hidden.dtype)
                    if grad_hidden is not None:
                        _accumulate(grad_hidden[rows_here], small, part)
                    if grad_matrix is not None:
                        if part_grad is None and direct:
                            part_grad = torch.mm(small.T, scaled[rows_here], out=grad_matrix[columns])
                        elif part_grad is None:
                            part_grad = _multiply(small.T, scaled[rows_here])
                        else:
                            _accumulate(part_grad, small.T, scaled[rows_here])
                    if wants_bias:
                        here = _multiply(tile.T, -factor[:, None]).squeeze(1) if plain else tile.sum(0)
                        part_bias = here if part_bias is None else part_bias + here
                    if before is not None:
                        tile.scatter_(1, at, before)
                    del tile, small
                if grad_matrix is not None and (part_grad is None or not direct):
                    grad_matrix[columns] = 0 if part_grad is None else part_grad
                if grad_bias is not None:
                    grad_bias[columns] = 0 if part_bias is None else part_bias
            if grad_hidden is not None and plain:
                grad_hidden *= -grad[:, None]
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_matrix, grad_bias, None, None, None, None, None
