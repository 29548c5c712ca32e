"""Log-probabilities of chosen tokens from hidden states and an output matrix, with gradients: seconds and memory.

    OMP_NUM_THREADS=1 python benchmarks/logprob.py --way guerdon

One way per process, so that the peak of the resident memory is its own:
  naive      all logits, log_softmax, gather
  selective  all logits, chosen logit minus logsumexp
  chunked    a chunk of logits at a time under activation checkpointing
  trl        TRL's selective_log_softmax (peers' environment)
  guerdon    guerdon.language.logprob.token_logprob
  guerdon-entropy   the same with every token's entropy
  liger, cce        liger-kernel's and cut-cross-entropy's fused losses (on a GPU only; a loss per token, no entropy)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common

WAYS = ("naive", "selective", "chunked", "trl", "guerdon", "guerdon-entropy", "liger", "cce")
MIB = 2**20


@dataclass(frozen=True)
class Work:
    """The sizes; `chunk` is for the way `chunked`, guerdon chooses its own."""

    way: str = field(metadata={"choices": WAYS})
    tokens: int = 2048
    width: int = 256
    vocabulary: int = 65536
    chunk: int = 256
    gradient: bool = True
    repeat: int = 3
    device: str = field(default="cpu", metadata={"choices": ["cpu", "cuda"]})
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16"]})
    seed: int = 0


def make(work: Work) -> Callable[[Any, Any, Any], Any]:
    """The way as a function (hidden, matrix, ids) -> log-probabilities."""
    import torch

    def naive(hidden: Any, matrix: Any, ids: Any) -> Any:
        return torch.log_softmax(hidden @ matrix.T, -1).gather(-1, ids[:, None]).squeeze(-1)

    def selective(hidden: Any, matrix: Any, ids: Any) -> Any:
        logits = hidden @ matrix.T
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)

    def chunked(hidden: Any, matrix: Any, ids: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        pieces = zip(hidden.split(work.chunk), ids.split(work.chunk), strict=True)
        return torch.cat([checkpoint(selective, h, matrix, i, use_reentrant=False) for h, i in pieces])

    if work.way == "trl":
        from trl.trainer.utils import selective_log_softmax

        return lambda hidden, matrix, ids: selective_log_softmax((hidden @ matrix.T)[None], ids[None])[0]
    if work.way == "liger":
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # its gradient is made in the forward pass, for the mean of the losses: the only one it gives
        return lambda hidden, matrix, ids: -LigerFusedLinearCrossEntropyFunction.apply(hidden, matrix, ids)[0]
    if work.way == "cce":
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, matrix, ids: -linear_cross_entropy(hidden, matrix, ids, reduction="none")
    if work.way.startswith("guerdon"):
        from guerdon.language.logprob import token_logprob

        entropy = work.way == "guerdon-entropy"
        return lambda hidden, matrix, ids: token_logprob(hidden, matrix, ids, entropy=entropy)[0]
    return {"naive": naive, "selective": selective, "chunked": chunked}[work.way]


def main() -> None:
    common.quiet()
    work, target = common.settings(Work, __doc__)
    import torch

    torch.manual_seed(work.seed)
    place = {"device": work.device, "dtype": getattr(torch, work.dtype)}
    hidden = torch.randn(work.tokens, work.width).to(**place).requires_grad_(work.gradient)
    matrix = (torch.randn(work.vocabulary, work.width) / work.width**0.5).to(**place).requires_grad_(work.gradient)
    ids = torch.randint(work.vocabulary, (work.tokens,)).to(work.device)
    # a fused loss has one weight for all tokens
    weight = torch.ones((), device=work.device) if work.way == "liger" else torch.randn(work.tokens).to(work.device)
    way = make(work)

    def run(size: int, words: int) -> Any:
        hidden.grad = matrix.grad = None
        logp = way(hidden[:size], matrix[:words], ids[:size] % words)
        if work.gradient:
            (logp * weight[:size] if weight.ndim else logp).mean().backward()
        return logp.detach()

    # a first small call, so that what a library sets up once is not taken for memory of the work; kernels are made for
    # the size they are called with, so on a GPU all is run once
    run(*((work.tokens, work.vocabulary) if work.device == "cuda" else (8, 64)))
    hidden.grad = matrix.grad = None
    before = _memory(work.device)
    clock = common.Laps()
    for _ in range(work.repeat):
        clock.start()
        logp = run(work.tokens, work.vocabulary)
        clock.lap()
    added = _memory(work.device, peak=True) - before
    laps = clock.figures(0)
    logits = work.tokens * work.vocabulary * 4 / MIB
    figures = {
        **laps,
        "memory_added_mib": added,
        "logits_mib": logits,
        "memory_in_logits": added / logits,
        "matrix_gradient_mib": matrix.numel() * matrix.element_size() / MIB if work.gradient else 0.0,
        "sum_logp": logp.double().sum().item(),
    }
    if work.gradient:
        figures["gradient_norm"] = {
            "hidden": hidden.grad.double().norm().item(),
            "matrix": matrix.grad.double().norm().item(),
        }
    common.report(work, {**figures, **common.device_memory()}, target)


def _memory(device: str, *, peak: bool = False) -> float:
    """MiB in use now (which also forgets the GPU's peak so far), or the peak."""
    if device == "cpu":
        return common.memory_mib("VmHWM" if peak else "VmRSS")
    import torch

    if peak:
        return torch.cuda.max_memory_allocated() / MIB
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / MIB


if __name__ == "__main__":
    main()
