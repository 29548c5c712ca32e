"""Revision: a policy improves its own answer a number of times, each time with the last one before it as a draft.

Self-Improving Robust Preference Optimization, arXiv 2406.01660.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from guerdon.errors import RecipeError, ShapeError
from guerdon.rollout import Rollout


def revise(
    policy: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int],
    *,
    revisions: int = 1,
    group_size: int = 1,
    drafts: Sequence[Sequence[str]] | None = None,
    greedy: bool = False,
    module: Callable[..., Any] | None = None,
) -> list[Rollout]:
    """Sample answers, and let the policy revise each of them.

    y_0 ~ pi(. | x), then y_k ~ pi(. | x, y_{k-1}): a revision sees the prompt and the last draft, none before it. The
    draft stands in the prompt by the policy's own template, as in training by `objectives.srpo`.

    Args:
        policy: with `sample(prompts, group_size, seeds, greedy=, module=)` and `revision_prompts(prompts, drafts)`, such as
            a `LanguagePolicy`.
        prompts: P texts or message lists.
        seeds: P integers; what is sampled for a prompt depends on its own alone.
        revisions: N; 0 = just samples.
        group_size: G, answers to each prompt, each revised by itself.
        drafts: P lists of G answers of any origin to start from, in place of the policy's own.
        greedy: take the most probable token every time.
        module: what wraps the policy, if anything does.

    Returns:
        N + 1 rollouts [P, G, T] with `samples`, `mask`, `logp_old`, `extras["truncated"]`: the answers, then each revision;
        N of them where the drafts were given. Revisions have `extras["draft_cut"]` bool [P, G], where the draft had to be
        cut to fit, and no `steps`: they cannot be scored again under the prompt alone.

    Raises:
        RecipeError: revisions or group_size is out of range.
        ShapeError: there is not one seed, or not one list of G drafts, per prompt.
        DataError: a prompt cannot be used.

    Edge cases:
        An empty answer is a draft like any other.

    Source:
        arXiv 2406.01660; the chain is our reading.
    """
    if revisions < 0 or group_size < 1:
        raise RecipeError(
            f"inference.revise: revisions must be 0 or more and group_size 1 or more; got {revisions} and {group_size}."
        )
    if len(seeds) != len(prompts):
        raise ShapeError(f"inference.revise: there must be one seed per prompt (P = {len(prompts)}); got {len(seeds)}.")
    if drafts is None:
        found = [policy.sample(prompts, group_size, seeds, greedy=greedy, module=module)]
        last = found[0].samples
    else:
        found, last = [], drafts
        if len(last) != len(prompts) or any(len(group) != group_size for group in last):
            raise ShapeError(
                f"inference.revise: drafts must be {len(prompts)} lists of {group_size}, one per prompt; got "
                f"{[len(group) for group in last][:8]}."
            )
    later = _later_seeds(seeds, revisions, group_size)
    for k in range(revisions):
        each = [prompt for prompt in prompts for _ in range(group_size)]
        asked, cut = policy.revision_prompts(each, [draft for group in last for draft in group])
        flat = policy.sample(asked, 1, later[k], greedy=greedy, module=module)
        shape = (len(prompts), group_size, -1)
        rollout = Rollout(
            prompts=list(prompts),
            samples=[[flat.samples[p * group_size + g][0] for g in range(group_size)] for p in range(len(prompts))],
            mask=flat.mask.view(shape),
            logp_old=flat.logp_old.view(shape),
            extras={
                "truncated": flat.extras["truncated"].view(shape[:2]),
                "draft_cut": torch.tensor(cut, device=flat.mask.device).view(shape[:2]),
            },
            indices=list(range(len(prompts))),
        )
        found.append(rollout)
        last = rollout.samples
    return found


def _later_seeds(seeds: Sequence[int], revisions: int, group_size: int) -> list[list[int]]:
    """A seed for every revision of every answer, [N][P * G]."""
    drawn = [
        torch.randint(2**62, (revisions, group_size), generator=torch.Generator().manual_seed(int(seed)))
        for seed in seeds
    ]
    return torch.stack(drawn, 1).flatten(1).tolist() if drawn else [[] for _ in range(revisions)]
