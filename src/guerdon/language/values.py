"""What a language model's own logits say every token of a text is worth: Q-values of its implicit reward."""

from __future__ import annotations

import torch

from guerdon.errors import DataError
from guerdon.language.policy import LanguagePolicy
from guerdon.objectives.q_values import QValues, q_values
from guerdon.rollout import Rollout


@torch.no_grad()
def implicit_values(
    policy: LanguagePolicy, rollout: Rollout, *, reference: LanguagePolicy | None = None, beta: float = 1.0
) -> QValues:
    """Q, V, advantage and reward of every token, from a policy that was trained on demonstrations or preferences.

    Two numbers a token are read off, its log-probability and the normaliser of its logits; the logits of a vocabulary are
    made a chunk at a time and thrown away.

    Args:
        policy: the trained one.
        rollout: texts as the policy packs or samples them: `policy.pack(prompts, completions)`, `policy.sample(...)`.
        reference: the policy that training started from, with the same tokenizer; None = the policy's own reference, which
            is the model without its adapters, or what `keep_reference` kept.
        beta: scale of the reward; above 0: that of DPO's loss, or 1 after supervised training.

    Returns:
        [P, G, T] each, in nats times beta, 0 where `rollout.mask` is not live; without gradient. Logits are those that are
        sampled from: they are divided by the policy's temperature.

    Raises:
        CheckpointError: no reference is given and the policy has none.
        DataError: the reference has another vocabulary.
        RecipeError: beta is not above 0.

    Example:
        >>> from guerdon.language.tasks import topics
        >>> policy = LanguagePolicy.load(topics.model(0), tokenizer=topics.tokenizer())
        >>> policy.keep_reference()
        >>> found = implicit_values(policy, policy.pack(["A", "B"], [["ae"], ["bf"]]))
        >>> found.q.shape, found.reward_kl.abs().max().item()  # nothing was learnt yet
        (torch.Size([2, 1, 3]), 0.0)

    Source:
        Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections, 2025, arXiv 2507.00018; see
        `guerdon.objectives.q_values`.
    """
    now = policy.log_prob(rollout, entropy=False, normaliser=True)
    assert now.normaliser is not None
    if reference is None:
        then = policy.reference_scores(rollout)
    elif reference.tokenizer.get_vocab() == policy.tokenizer.get_vocab():
        then = reference.log_prob(rollout, entropy=False)
    else:
        raise DataError(
            "language.implicit_values: the reference has another vocabulary than the policy, so their log-probabilities "
            "cannot be compared. Give the model that training started from."
        )
    return q_values(now.logp, now.normaliser, then.logp, rollout.mask, beta=beta)
