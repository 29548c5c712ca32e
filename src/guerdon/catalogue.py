"""The methods that guerdon is about: what each does, where it lives, and whether it is there yet.

Whether a method is built is read from the packages' tables, never written down by hand. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from guerdon.errors import UnknownNameError, nearest
from guerdon.members import STAGES

PACKAGES = (*STAGES, "inference", "metrics", "training", "studies")


@dataclass(frozen=True)
class Method:
    """One method, or one family of baselines.

    Attributes:
        slug: its name in the documentation and on the command line.
        title: what it is called.
        homes: the parts that make it, each `package.name`: an exported name, or a module with exported names.
        source: arXiv identifiers, or where else it was described.
        line: what it does, in one line.
        kind: `method`, or `baseline` for the families that methods are compared with.
    """

    slug: str
    title: str
    homes: tuple[str, ...]
    source: str
    line: str
    kind: Literal["method", "baseline"] = "method"

    @property
    def missing(self) -> tuple[str, ...]:
        """The parts that are not there."""
        return tuple(home for home in self.homes if not exported(home))

    @property
    def built(self) -> bool:
        """Whether every part is there."""
        return not self.missing

    @property
    def state(self) -> Literal["built", "partly", "planned"]:
        """`built`, `partly` (some parts are there) or `planned`."""
        missing = len(self.missing)
        return "built" if not missing else "planned" if missing == len(self.homes) else "partly"

    def as_dict(self) -> dict[str, Any]:
        """Everything about it as plain values."""
        return {**vars(self), "homes": list(self.homes), "state": self.state, "missing": list(self.missing)}


def exported(home: str) -> bool:
    """Whether `package.name` is an exported name, or the module of one."""
    package, _, name = home.partition(".")
    table = _table(package)
    return name in table or name in table.values()


@functools.cache
def _table(package: str) -> Mapping[str, str]:
    if importlib.util.find_spec(f"guerdon.{package}") is None:
        return {}
    return getattr(importlib.import_module(f"guerdon.{package}"), "MEMBERS", {})


def select(stage: str | None = None) -> list[Method]:
    """All methods, or those with a part in one package.

    Raises:
        UnknownNameError: there is no such package.

    Example:
        >>> [method.slug for method in select("sampling")]
        ['vade', 'influence-scores', 'grpo-family', 'basics']
    """
    if stage is not None and stage not in PACKAGES:
        raise UnknownNameError(f"there is no stage {stage!r}.{nearest(stage, PACKAGES)} Stages: {', '.join(PACKAGES)}.")
    return [m for m in METHODS if stage is None or any(home.startswith(f"{stage}.") for home in m.homes)]


def _method(slug: str, title: str, homes: str, source: str, line: str) -> Method:
    return Method(slug, title, tuple(homes.split()), source, line)


def _baseline(slug: str, title: str, homes: str, source: str, line: str) -> Method:
    return Method(slug, title, tuple(homes.split()), source, line, "baseline")


METHODS = (
    _method("copo", "Consistency-aware policy optimisation", "advantages.copo objectives.copo", "arXiv 2508.04138",
            "adds an advantage between prompts, so that groups in which all are right or all wrong still teach"),
    _method("real", "Rewards as labels", "objectives.real", "arXiv 2602.05630",
            "classifies a group's samples by their binary rewards in place of weighting them by advantages"),
    _method("noisy-verifier", "Verifiable yet noisy rewards",
            "shaping.noise_correction rewards.appeal rewards.noise", "arXiv 2510.00915",
            "corrects the policy gradient for a verifier's rates of false positives and false negatives"),
    _method("vade", "Variance-aware dynamic sampling", "sampling.vade", "arXiv 2511.18902",
            "draws the prompts whose estimated difficulty promises the most gradient, before any rollout"),
    _method("arena-rl", "ArenaRL", "rewards.tournament", "arXiv 2601.06487",
            "ranks a group by pairwise comparisons in a tournament in place of scores"),
    _method("sweet-spot", "Sweet spot learning", "shaping.sweet_spot rewards.closeness", "arXiv 2601.22491",
            "adds a few tiers of closeness to a binary reward"),
    _method("copg", "Contrastive policy gradient", "objectives.copg rewards.recorded", "arXiv 2406.19185",
            "learns from scored pairs of any origin, without importance weights"),
    _method("text2grad", "Text2Grad", "rewards.spans advantages.adaptive_gae", "arXiv 2505.22338",
            "turns a written critique into rewards for the spans it speaks of"),
    _method("quark-medical", "Quark medical alignment", "shaping.reference_frozen weighting.tri_factor",
            "arXiv 2602.11661",
            "normalises each score by a frozen reference and weighs components by three factors"),
    _method("constrained-rlhf", "Constrained RLHF",
            "weighting.lagrangian weighting.proxy_points advantages.gae_by_component", "arXiv 2310.04373",
            "holds each reward at its threshold with a multiplier, against over-optimisation"),
    _method("par", "Preference as reward", "shaping.par shaping.bounded shaping.running", "arXiv 2502.18770",
            "bounds a reward by its sigmoid distance from reference samples"),
    _method("dynamic-weighting", "Dynamic reward weighting",
            "weighting.hypervolume weighting.gradient_alignment metrics.hypervolume", "arXiv 2509.11452",
            "adapts the weights of many rewards by hypervolume or by gradients"),
    _method("derl", "Differentiable evolutionary RL",
            "rewards.composition weighting.expression training.bilevel", "arXiv 2512.13399",
            "learns how to compose a reward from parts, with a policy over reward expressions"),
    _method("simpo", "SimPO", "objectives.simpo", "arXiv 2405.14734",
            "preference loss on length-normalised log-probabilities, without a reference"),
    _method("tgdpo", "TGDPO", "objectives.tgdpo", "arXiv 2506.14574",
            "DPO whose tokens are weighted by a guiding model's rewards"),
    _method("srpo", "Self-improving robust preference optimisation", "objectives.srpo inference.revision",
            "arXiv 2406.01660",
            "learns answering and revising from the same pairs; revises at inference"),
    _method("implicit-reward", "Implicit reward as the bridge",
            "objectives.demonstration objectives.demonstration_value", "arXiv 2507.00018",
            "supervised losses from f-divergences, read as learning an implicit reward"),
    _method("cdr", "Customisable density ratios", "rewards.density_ratio", "arXiv 2411.02481",
            "scores a text by how much likelier a strong model finds it than a weak one"),
    _method("condition-po", "Condition preference optimisation", "objectives.condition_preference", "arXiv 2511.04753",
            "contrasts two conditions for the same image in place of two images"),
    _method("lambda-harmonic", "Lambda-harmonic reward", "rewards.harmonic", "arXiv 2407.12164",
            "joins faithfulness to a subject and to a text by a weighted harmonic mean"),
    _method("alignprop", "AlignProp", "training.pathwise inference.adapters shaping.distance", "arXiv 2310.03739",
            "follows a differentiable reward's gradient back through the sampler"),
    _method("r0", "Rewards are enough", "training.pathwise objectives.reward_instruct", "arXiv 2503.13070",
            "turns a many-step generator into a few-step one by maximising rewards with regularisation"),
    _method("reno", "ReNO", "inference.noise", "arXiv 2406.04312",
            "optimises the initial noise of one sample for its reward"),
    _method("controlnet-pp", "ControlNet++", "rewards.consistency training.pathwise", "arXiv 2404.07987",
            "rewards that the condition can be read back from the image, denoised in one step"),
    _method("f-distill", "f-distill", "training.distillation", "arXiv 2502.15681",
            "one-step generator by distribution matching under any f-divergence"),
    _method("dynamic-cfg", "Dynamic guidance", "inference.guidance", "arXiv 2509.16131",
            "chooses the guidance scale at each step by cheap evaluators"),
    _method("score-estimation", "Score estimation", "studies.score_estimation", "arXiv 2401.15604",
            "what gradient descent learns of a score function, and when to stop"),
    _method("prdp", "Proximal reward difference prediction", "objectives.reward_difference", "arXiv 2402.08714",
            "regresses the difference of two samples' rewards on their log-ratios"),
    _method("adv-grpo", "Adversarial reward", "rewards.adversarial", "arXiv 2511.20256",
            "a reward that is trained on to tell samples from reference images"),
    _method("pref-grpo", "Pref-GRPO", "rewards.win_rate metrics.prompt_suite", "arXiv 2508.20751",
            "scores a sample by how many of its group it beats"),
    _method("vgpo", "Value-anchored GRPO", "advantages.value_anchored rewards.instant", "arXiv 2512.12387",
            "values per denoising step, anchored in time and in the group"),
    _method("ac-flow", "AC-Flow", "advantages.flow_critic objectives.weighted_flow", "arXiv 2510.18072",
            "fine-tunes flow models with a critic on noisy states"),
    _method("d2-align", "Directional decoupling", "rewards.directional metrics.diversity", "arXiv 2512.24146",
            "corrects a reward along a learned direction, against collapse of diversity"),
    _method("dragon", "DRAGON", "rewards.distributional", "arXiv 2504.15217",
            "optimises rewards of whole sets of samples"),
    _method("ctrl-diffusion", "CTRL", "rewards.classifier", "arXiv 2406.12120",
            "adds a condition to a diffusion model with a classifier's log-probability as reward"),
    _method("deep-ga", "Deep neuroevolution", "optim.evolution training.evolution", "arXiv 1712.06567",
            "a plain genetic algorithm on the weights of a policy"),
    _method("carl", "CaRL", "rewards.driving", "arXiv 2504.17838",
            "route completion times penalties as the whole reward of a driver"),
    _method("lucy-skg", "Kinesthetic reward combination", "shaping.kinesthetic", "arXiv 2305.15801",
            "combines rewards by a signed geometric mean"),
    _method("starc", "STARC", "metrics.starc", "arXiv 2309.15257",
            "distances between reward functions that bound regret from both sides"),
    _method("odice", "O-DICE", "objectives.dice optim.orthogonal training.offline", "arXiv 2402.00348",
            "offline learning with the backward gradient projected off the forward one"),
    _method("barfi", "Behaviour alignment via reward optimisation", "training.bilevel", "arXiv 2310.19007",
            "learns how far to trust heuristic rewards, by implicit gradients"),
    _method("op-gfn", "Order-preserving GFlowNets", "objectives.order_preserving", "arXiv 2310.00386",
            "samples in the order of a reward that need not be a number"),
    _method("wta-crs", "Winner-take-all column-row sampling", "optim.wta_crs", "arXiv 2305.15265",
            "estimates weight gradients from few activations, without bias"),
    _method("modular-addition", "Modular addition", "studies.modular_addition", "arXiv 2602.16849",
            "Fourier features, and why the network groks"),
    _method("gbnn", "Gradient-boosted networks", "training.boosting", "arXiv 1909.12098",
            "grows a hidden layer unit by unit as boosting does"),
    _method("langevin-averaging", "Langevin with averaging", "optim.langevin studies.high_dimensional",
            "arXiv 2603.06028",
            "averages the iterates of noisy descent on the sphere"),
    _method("influence-scores", "Influence scores", "sampling.influence", "arXiv 2311.16298",
            "picks examples by training dynamics: variance of gradients, EL2N, forgetting"),
    _method("target-surrogates", "Target-based surrogates", "optim.surrogate", "arXiv 2302.02607",
            "many updates per costly gradient, through a surrogate in output space"),
    _method("lottery-ticket", "Lottery ticket", "studies.lottery_ticket optim.pruning", "arXiv 1803.03635",
            "prunes by magnitude, rewinds and trains again"),
    _baseline("grpo-family", "REINFORCE, RLOO, GRPO, Dr. GRPO, DAPO, GSPO, PPO",
              "advantages.group advantages.gae advantages.running objectives.policy_gradient objectives.ppo "
              "sampling.dynamic rewards.overlong rewards.kl_penalty",
              "arXiv 2402.03300 2402.14740 2503.20783 2503.14476 2507.18071 1707.06347",
              "policy gradients with group baselines, clipping and divergence terms"),
    _baseline("dpo-family", "DPO, IPO, SLiC, KTO, ORPO, CPO, Diffusion-DPO",
              "objectives.dpo objectives.ipo objectives.slic objectives.kto objectives.orpo objectives.cpo "
              "objectives.sppo objectives.exo objectives.nca objectives.aot objectives.diffusion_dpo",
              "arXiv 2305.18290 2310.12036 2305.10425 2402.01306 2403.07691 2401.08417 2311.12908",
              "losses on preferred and rejected samples"),
    _baseline("diffusion-rl-base", "DDPO, DPOK, RWR, Flow-GRPO, DanceGRPO",
              "objectives.dpok objectives.reward_weighted advantages.prompt_tracker",
              "arXiv 2305.13301 2305.16381 2302.12192 2505.05470 2505.07818",
              "policy gradients and weighted losses for diffusion and flow"),
    _baseline("gflownet-base", "Flow matching, detailed, trajectory and sub-trajectory balance", "objectives.balance",
              "arXiv 2106.04399 2111.09266 2201.13259 2209.12782",
              "losses that make a sampler proportional to a reward"),
    _baseline("offline-rl-base", "BC, IQL, CQL, SQL, EQL, f-DVL", "objectives.offline",
              "arXiv 2110.06169 2006.04779 2303.15810 2302.08560",
              "learning control from recorded transitions"),
    _baseline("basics", "Verifiers, uniform sampling, weighted sum",
              "rewards.verifiers sampling.uniform weighting.linear",
              "common practice",
              "the plain parts that every run can start from"),
)  # fmt: skip
