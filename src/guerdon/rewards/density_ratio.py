"""Density ratios: a completion is worth how much likelier a strong model finds it than a weak one, without any training.

CDR: Customizable Density Ratios of Strong-over-weak LLMs for Preference Annotation, 2024, arXiv 2411.02481.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from guerdon.components import build
from guerdon.errors import DataError, RecipeError, ScoreError, nearest
from guerdon.rewards.domains import FALLBACK, Domain, customise, read_domains
from guerdon.rewards.likelihood import Likelihood, SequenceLogp
from guerdon.rewards.router import Router
from guerdon.rewards.served import ServedLikelihood

Normalise = Literal["sum", "mean"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Scorer = Callable[[Sequence[Any], Sequence[Sequence[Any]]], SequenceLogp]


class DensityRatioOutput(NamedTuple):
    """What two models make of P groups.

    Attributes:
        scores: [P, G] log-probability under the strong model less that under the weak one, in nats.
        completion_tokens: [P, G] tokens of the completions, as the strong model's tokenizer has them.
        domain: [P] what each prompt was taken for; empty where prompts are not customised.
    """

    scores: Float[Tensor, "P G"]
    completion_tokens: Int[Tensor, "P G"]
    domain: list[str]


def log_density_ratio(
    strong: SequenceLogp, weak: SequenceLogp, *, normalise: Normalise = "sum"
) -> Float[Tensor, "*batch"]:
    """The reward r(x, y) = log pi_strong(y | x) - log pi_weak(y | x).

    Each model sums over its own tokens of the same text, so their tokenizers may differ. If the strong model came from the
    weak one by KL-regularised preference optimisation, r is its implicit reward over beta, up to a number for each prompt.

    Args:
        strong: [...] sums and numbers of tokens under the strong model; see `summed_logp`.
        weak: [...] the same under the weak model.
        normalise: `sum`, or `mean`: divided by the strong model's number of tokens.

    Returns:
        [...] in nats; 0 for a completion without tokens.

    Raises:
        ScoreError: both models give a completion the probability 0.

    Gradient:
        To both sums, if they have a graph.

    Example:
        >>> import torch
        >>> counts = torch.tensor([2, 4])
        >>> pair = SequenceLogp(torch.tensor([-1.0, -2.0]), counts), SequenceLogp(torch.tensor([-3.0, -5.0]), counts)
        >>> log_density_ratio(*pair).tolist(), log_density_ratio(*pair, normalise="mean").tolist()
        ([2.0, 3.0], [1.0, 0.75])

    Source:
        CDR, 2024, arXiv 2411.02481; `mean` as in the authors' code.
    """
    ratio = strong.total - weak.total
    if bool(ratio.isnan().any()):
        where = ratio.isnan().nonzero()[0].tolist()
        raise ScoreError(
            f"rewards.density_ratio: both models give the completion at {where} the probability 0, so their ratio is "
            "nothing. Set floor, such as -20."
        )
    empty = int((strong.tokens == 0).sum())
    if empty:
        warnings.warn(f"rewards.density_ratio: {empty} completions have no tokens; their reward is 0.", stacklevel=2)
    return ratio / strong.tokens.clamp(min=1) if normalise == "mean" else ratio


class DensityRatio:
    """Score completions by two language models that nothing else is done with.

    The further apart the two are in what the reward is to measure, the better it ranks. A pair that works is a model
    after preference training over the supervised model that it came from.

    With `domains`, the criteria and a worked example of a prompt's domain go before its question, the same for both models;
    the completion stays as it is. The domain is `domain`, or the data's column of that name, or what the router says.

    Args:
        strong: a folder, a name on the hub, or a `LanguagePolicy`; {model: ..., dtype: ..., device: ...} for options of its
            own; {base_url: ..., model: ..., tokenizer: ...} for a server that echoes log-probabilities; or a callable
            (prompts, samples [P][G]) -> `SequenceLogp`, also as `module:attribute`.
        weak: the same; None = the strong model with its adapters switched off.
        normalise: `sum` over tokens, or `mean`.
        domains: `default` = the bundled criteria and exemplars; a TOML file of your own, or its content; None = prompts stay
            as they are.
        domain: of all prompts; None = see above.
        router: a model that says which domain a prompt belongs to: a folder, a name on the hub, {base_url: ..., model: ...}
            of a chat endpoint, or a callable from questions to replies.
        end_token: score the token that ends a completion as well.
        floor: of the log-probability of a token; None = none.
        max_prompt: tokens of a longer prompt that are kept, its last ones.
        max_completion: tokens of a longer completion that are kept, its first ones.
        batch_size: completions at a time; bounds memory alone.
        dtype: of the weights.
        device: where the models run, such as cuda:1; None = an accelerator if there is one.
        cache: a file in which the scores of each model are kept, so that another ratio with one of them reads it
            from there; not for servers.
        seed: of the exemplars.
        trust_remote_code: run model code that comes with the files.

    Raises:
        RecipeError: strong and weak are the same, an option is out of its range, or a model cannot be loaded.

    Edge cases:
        The last tokens of a prompt and the first of a completion are never merged into one. A completion that one model gives
        the probability 0 has an infinite reward, which no recipe accepts: set `floor`. Prompts of instruction-tuned models
        should be lists of messages, which go through each model's chat template; a text is read as it stands.

    Example:
        >>> import torch
        >>> def letters(prompts, samples):
        ...     return SequenceLogp(*(torch.tensor([[float(len(s)) for s in g] for g in samples]) for _ in range(2)))
        >>> def nothing(prompts, samples):
        ...     return SequenceLogp(*(torch.tensor([[0.0 for s in g] for g in samples]) for _ in range(2)))
        >>> DensityRatio(strong=letters, weak=nothing)(["p"], [["a", "abc"]]).scores.tolist()
        [[1.0, 3.0]]

    Source:
        CDR, 2024, arXiv 2411.02481: the sum, the limits on lengths, the form of a customised prompt, no customisation of
        `chat`. Criteria, exemplars and the router's words are ours.
    """

    def __init__(
        self,
        *,
        strong: Any,
        weak: Any = None,
        normalise: Normalise = "sum",
        domains: str | Path | Mapping[str, Any] | None = None,
        domain: str | None = None,
        router: Any = None,
        end_token: bool = True,
        floor: float | None = None,
        max_prompt: int = 2000,
        max_completion: int = 1024,
        batch_size: int = 16,
        dtype: Dtype = "float32",
        device: str | None = None,
        cache: str | Path | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        where = "rewards.density_ratio"
        if normalise not in ("sum", "mean"):
            raise RecipeError(f"{where}.normalise: must be sum or mean; got {normalise!r}.")
        if _same(strong, weak):
            raise RecipeError(
                f"{where}: strong and weak are the same model, so that every reward would be 0: {weak!r:.80}."
            )
        if domains is None and (domain is not None or router is not None):
            raise RecipeError(f"{where}: domain and router choose among domains; give them, such as domains: default.")
        self.domains = read_domains(domains) if domains is not None else {}
        if domain is not None and domain.lower() not in self.domains:
            there = ", ".join(self.domains)
            raise RecipeError(
                f"{where}.domain: there is no {domain!r}.{nearest(domain, self.domains)} There are: {there}."
            )
        self.domain = None if domain is None else domain.lower()
        self.router = None if router is None else Router(router, self.domains)
        settings = {
            "end_token": end_token,
            "floor": floor,
            "max_prompt": max_prompt,
            "max_completion": max_completion,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": device,
            "cache": cache,
            "trust_remote_code": trust_remote_code,
        }
        self.strong: Scorer = _scorer(strong, settings, f"{where}.strong")
        self.weak: Scorer = _without_adapters(self.strong) if weak is None else _scorer(weak, settings, f"{where}.weak")
        self.normalise: Normalise = normalise
        self.seed = seed

    def __call__(
        self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]], domain: Sequence[str] | None = None
    ) -> DensityRatioOutput:
        """Score the samples of every group.

        Args:
            prompts: [P] texts or message lists.
            samples: [P][G].
            domain: [P], a column of the data; it is not asked for where the option of that name is set.

        Returns:
            The rewards, and what was counted.

        Raises:
            DataError: a domain is not known, or nothing says which one a prompt belongs to; a prompt cannot be encoded.
            ScoreError: a log-probability is NaN, or both models exclude a completion.
        """
        if self.domains:
            names = self._names(prompts, domain)
            plain = Domain(FALLBACK)
            prompts = [customise(p, self.domains.get(n, plain), self.seed) for p, n in zip(prompts, names, strict=True)]
        else:
            names = [""] * len(prompts)
        strong, weak = self.strong(prompts, samples), self.weak(prompts, samples)
        return DensityRatioOutput(log_density_ratio(strong, weak, normalise=self.normalise), strong.tokens, names)

    def _names(self, prompts: Sequence[Any], column: Sequence[str] | None) -> list[str]:
        where = "rewards.density_ratio"
        if self.domain is not None:
            return [self.domain] * len(prompts)
        if column is not None:
            names = [str(name).lower() for name in column]
            for p, name in enumerate(names):
                if name not in self.domains and name != FALLBACK:
                    there = ", ".join(self.domains)
                    raise DataError(
                        f"{where}: prompt {p} has the domain {column[p]!r:.60}.{nearest(name, self.domains)} There are: {there}."
                    )
            return names
        if self.router is None:
            raise DataError(
                f"{where}: nothing says which domain a prompt belongs to. Set domain or router, or give the data a column domain."
            )
        return self.router(prompts)


def _same(strong: Any, weak: Any) -> bool:
    if isinstance(strong, (str, Path)) and isinstance(weak, (str, Path)):
        return Path(strong).resolve() == Path(weak).resolve()
    return strong is weak or (isinstance(strong, Mapping) and strong == weak)


def _scorer(spec: Any, settings: Mapping[str, Any], where: str) -> Any:
    """A model as something that scores; a policy is a module and so callable, but scores through `Likelihood`."""
    from guerdon.language.policy import LanguagePolicy

    if isinstance(spec, str) and ":" in spec and not Path(spec).exists():
        return build("rewards", spec, where)
    if callable(spec) and not isinstance(spec, LanguagePolicy):
        return spec
    own = dict(spec) if isinstance(spec, Mapping) else {"model": spec}
    kind = ServedLikelihood if "base_url" in own else Likelihood
    known = inspect.signature(kind).parameters
    for name in own:
        if name not in known:
            raise RecipeError(
                f"{where}.{name}: there is no such option.{nearest(name, known)} Options: {', '.join(known)}."
            )
    if "model" not in own:
        raise RecipeError(
            f"{where}: a model is named by its folder, or by {{model: ..., and its options}}; got {spec!r:.80}."
        )
    return kind(**{**{name: value for name, value in settings.items() if name in known}, **own})


def _without_adapters(strong: Any) -> Likelihood:
    if not isinstance(strong, Likelihood) or not strong.policy.has_adapters:
        raise RecipeError(
            "rewards.density_ratio.weak: must be given; only a strong model with adapters has a weak one in itself, the "
            "model without them."
        )
    return strong.without_adapters()


density_ratio = DensityRatio
