"""Log-probabilities of chosen tokens from hidden states and an output matrix, with gradients: seconds and memory.

    OMP_NUM_THREADS=1 python benchmarks/logprob.py --way guerdon

One way per process, so that the peak of the resident memory is its own:
  naive      all logits, log_softmax, gather
  selective  all logits, chosen logit minus logsumexp
  chunked    a chunk of logits at a time under activation checkpointing
  trl        TRL's selective_log_softmax (peers' environment)
  guerdon    guerdon.language.logprob.token_logprob
  guerdon-entropy   the same with every token's entropy
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common

WAYS = ("naive", "selective", "chunked", "trl", "guerdon", "guerdon-entropy")
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
    hidden = torch.randn(work.tokens, work.width, requires_grad=work.gradient)
    matrix = (torch.randn(work.vocabulary, work.width) / work.width**0.5).requires_grad_(work.gradient)
    ids = torch.randint(work.vocabulary, (work.tokens,))
    weight = torch.randn(work.tokens)
    way = make(work)
    # a first small call, so that what a library sets up once is not taken for memory of the work
    small = way(hidden[:8], matrix[:64], ids[:8] % 64)
    if work.gradient:
        (small * weight[:8]).mean().backward()
    hidden.grad = matrix.grad = None
    before = common.memory_mib()
    seconds = []
    for _ in range(work.repeat):
        hidden.grad = matrix.grad = None
        start = time.process_time()
        logp = way(hidden, matrix, ids)
        if work.gradient:
            (logp * weight).mean().backward()
        seconds.append(time.process_time() - start)
    added = common.memory_mib("VmHWM") - before
    logits = work.tokens * work.vocabulary * 4 / MIB
    figures = {
        "cpu_s": common.summary(seconds),
        "memory_added_mib": added,
        "logits_mib": logits,
        "memory_in_logits": added / logits,
        "matrix_gradient_mib": matrix.numel() * 4 / MIB if work.gradient else 0.0,
        "sum_logp": logp.detach().double().sum().item(),
    }
    if work.gradient:
        figures["gradient_norm"] = {
            "hidden": hidden.grad.double().norm().item(),
            "matrix": matrix.grad.double().norm().item(),
        }
    common.report(work, figures, target)


if __name__ == "__main__":
    main()
