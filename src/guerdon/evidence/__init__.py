"""Evidence: every paper's claim at small scale, the method against its own baseline.

A module here tests one claim: see `guerdon.evidence.base` for what it defines and `guerdon reproduce` for running it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from guerdon.errors import UnknownNameError, nearest

MEMBERS = {
    "alignprop": "alignprop",
    "arena-rl": "arena_rl",
    "cdr": "cdr",
    "constrained-rlhf": "constrained_rlhf",
    "copg": "copg",
    "copo": "copo",
    "cross-domain": "cross_domain",
    "diffusion-base": "diffusion_base",
    "diffusion-rl-base": "diffusion_rl_base",
    "dpo-family": "dpo_family",
    "dynamic-weighting": "dynamic_weighting",
    "grpo-family": "grpo_family",
    "implicit-reward": "implicit_reward",
    "noisy-verifier": "noisy_verifier",
    "prdp": "prdp",
    "par": "par",
    "pref-grpo": "pref_grpo",
    "quark-medical": "quark_medical",
    "real": "real",
    "reno": "reno",
    "simpo": "simpo",
    "srpo": "srpo",
    "sweet-spot": "sweet_spot",
    "tgdpo": "tgdpo",
    "text2grad": "text2grad",
    "vade": "vade",
    "vgpo": "vgpo",
}  # slug -> module of this package
OWN = ("cross-domain", "diffusion-base")  # claims of the library itself, which no method of the catalogue makes


def find(slug: str) -> ModuleType:
    """The module that tests the claim of a method.

    Raises:
        UnknownNameError: there is none.
    """
    if slug not in MEMBERS:
        raise UnknownNameError(
            f"evidence: there is nothing called {slug!r}.{nearest(slug, MEMBERS)} There are: {', '.join(MEMBERS)}."
        )
    return importlib.import_module(f"{__name__}.{MEMBERS[slug]}")


def __getattr__(name: str) -> ModuleType:
    if name in MEMBERS.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{nearest(name, MEMBERS.values())}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MEMBERS.values()})
