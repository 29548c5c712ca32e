# ruff: noqa: RUF009 - the calls of `_set` return dataclasses.field
"""The settings of a recipe: plain dataclasses with a default and a line of help each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from guerdon.components import Component


def _set(default: Any, text: str, **limits: Any) -> Any:
    """A setting: default, one line of help, and limits (`at_least`, `at_most`, `above`, `contains`) or the component's stage."""
    metadata = {"help": text, **limits}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Lora:
    """Low-rank adapters in place of training every weight."""

    rank: int = _set(16, "rank of the adapters", at_least=1)
    alpha: float = _set(32.0, "the update is scaled by alpha / rank", above=0)
    target_modules: str | list[str] = _set("all-linear", "layers that get an adapter")


@dataclass
class Policy:
    """A language model, and how it samples."""

    kind: Literal["language"] = _set("language", "language, spans, diffusion or flow")
    model: str | None = _set(None, "a bundled model, a folder, or a name on the Hugging Face hub")
    max_new_tokens: int = _set(256, "longest sample, in tokens", at_least=1)
    temperature: float = _set(1.0, "of sampling", above=0)
    top_p: float = _set(1.0, "sample from the smallest set of tokens with this probability", above=0, at_most=1)
    top_k: int = _set(0, "sample from this many likeliest tokens; 0 = all", at_least=0)
    lora: Lora | None = _set(None, "train adapters instead of all weights; {} for the defaults")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = _set("float32", "of the weights")
    gradient_checkpointing: bool = _set(False, "less memory, one more forward pass")
    revision: str = _set(
        "{prompt}\n\nA draft of the answer:\n{draft}\n\nA better answer:\n",
        "the prompt that asks for a better answer than a draft, where an objective or evaluation.revisions has drafts",
        contains=("{prompt}", "{draft}"),
    )


@dataclass
class SpanReward:
    """A model of written feedback, learnt from records of it; see `guerdon annotate --critic`."""

    kind: Literal["spans"] = _set("spans", "language, spans, diffusion or flow")
    model: str | None = _set(None, "a bundled model, a folder, or a name on the Hugging Face hub")
    form: Literal["classifier", "generative"] = _set(
        "classifier", "label every token in one pass, or write feedback and labels as text"
    )
    template: str | None = _set(None, "of generative: the question, with {prompt} and {response}; null = a short one")
    lora: Lora | None = _set(None, "of generative: train adapters instead of all weights; {} for the defaults")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = _set("float32", "of the weights")
    gradient_checkpointing: bool = _set(False, "of generative: less memory, one more forward pass")


@dataclass
class ImageLora:
    """Low-rank adapters of an image model."""

    rank: int = _set(16, "rank of the adapters", at_least=1)
    alpha: float = _set(32.0, "the update is scaled by alpha / rank", above=0)
    target_modules: str | list[str] | None = _set(
        None, "layers that get an adapter; null = attention, where there is any"
    )


@dataclass
class Denoiser:
    """What diffusion and flow policies share."""

    kind: Any = _set("", "language, spans, diffusion or flow")
    model: str | None = _set(None, "a bundled model or base, a pipeline's folder, or a name on the Hugging Face hub")
    steps: int = _set(10, "denoising steps of a training sample", at_least=1)
    eval_steps: int | None = _set(None, "denoising steps of a held-out greedy sample; null = steps", at_least=1)
    guidance: float = _set(1.0, "scale of classifier-free guidance; 1 = none", at_least=0)
    logp_reduction: Literal["mean", "sum"] = _set(
        "mean", "over an image's dimensions; scales clips and divergences too"
    )
    trained_share: float = _set(1.0, "train on the first steps only, as a share of all", above=0, at_most=1)
    random_share: float = _set(1.0, "of those, each sample is trained on a random share of its own", above=0, at_most=1)
    window: int | None = _set(None, "only so many steps in a row have noise and are trained; null = all", at_least=1)
    window_range: tuple[int, int] | None = _set(None, "steps [from, to) that the window lies within; null = all")
    shared_noise: bool = _set(False, "the samples of a group start from the same noise")
    condition_dropout: float = _set(
        0.1, "share of examples without a prompt in supervised steps", at_least=0, at_most=1
    )
    kl_scaling: Literal["exact", "time"] = _set(
        "exact", "of the exact divergence; time: times the step's length, as Flow-GRPO's code has it"
    )
    lora: ImageLora | None = _set(None, "train adapters instead of all weights; {} for the defaults")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = _set("float32", "of the weights")
    gradient_checkpointing: bool = _set(False, "less memory, one more forward pass")


@dataclass
class Diffusion(Denoiser):
    """A diffusion model (DDPM), sampled by DDIM with noise."""

    kind: Literal["diffusion"] = _set("diffusion", "language, spans, diffusion or flow")
    eta: float = _set(1.0, "noise of a step, as a share of the ancestral sampler's", above=0, at_most=1)
    spacing: Literal["leading", "trailing", "linspace"] | None = _set(None, "of the times; null = the scheduler's")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = _set(
        None, "what the network gives; null = as its scheduler says"
    )


@dataclass
class Flow(Denoiser):
    """A flow-matching model, sampled by the stochastic equation with the same marginals."""

    kind: Literal["flow"] = _set("flow", "language, spans, diffusion or flow")
    std: Literal["flow_grpo", "dance"] = _set("flow_grpo", "how the noise of a step depends on its time")
    noise_level: float = _set(0.7, "of the noise: a of Flow-GRPO, eta of DanceGRPO (there 0.3)", above=0)
    spacing: Literal["scheduler", "even"] = _set("scheduler", "of the times: as the scheduler's pipeline, or even")
    shift: float | None = _set(None, "of the times towards noise; null = the scheduler's", above=0)
    times: Literal["logit_normal", "uniform"] = _set("logit_normal", "how supervised steps draw their times")


@dataclass
class Pathwise:
    """How rewards are differentiated through the sampler."""

    truncation: Literal["full", "last", "uniform", "gaussian", "low_variance", "single"] = _set(
        "uniform", "which steps have a gradient: all, the last k, or from a random one on; see methods/alignprop"
    )
    k: int = _set(1, "steps of last", at_least=1)
    cut_mean: float = _set(0.84, "of gaussian: the first step with a gradient, as a share of all", above=0, at_most=1)
    cut_std: float = _set(0.1, "of gaussian: its standard deviation, as a share of all steps", above=0)
    renoise: int = _set(2, "new noises a sample of low_variance", at_least=1)
    share: float = _set(0.25, "of the steps, from the last, that single draws one of", above=0, at_most=1)
    scale: float = _set(1.0, "multiplies the reward; matters for gradient clipping", above=0)
    beta: float = _set(0.0, "weight of the drift from the reference's outputs; 0 = none", at_least=0)
    deterministic: bool = _set(False, "sample without noise")
    checkpointing: bool = _set(True, "hold the states of the steps alone, and compute the rest again: less memory")
    skips: int = _set(10, "updates in a row that may be left out for a gradient that is not finite", at_least=0)


@dataclass
class Optim:
    """The optimiser."""

    name: Literal["adamw", "sgd"] = _set("adamw", "optimiser")
    lr: float = _set(1e-6, "peak learning rate", at_least=0)
    lr_scale: float = _set(1.0, "multiplies lr: 0.05 to 0.25 for supervised training before preferences", at_least=0)
    betas: tuple[float, float] = _set(
        (0.9, 0.999), "decay rates of AdamW; the first is SGD's momentum", at_least=0, at_most=1
    )
    eps: float = _set(1e-8, "of AdamW", above=0)
    weight_decay: float = _set(0.0, "decoupled weight decay", at_least=0)
    schedule: Literal["constant", "linear", "cosine"] = _set("constant", "of the learning rate after warm-up")
    final_lr: float = _set(0.0, "where linear and cosine end, as a share of lr", at_least=0, at_most=1)
    warmup_steps: int = _set(0, "updates over which the rate rises from 0", at_least=0)
    clip_norm: float | None = _set(1.0, "largest gradient norm; null = not clipped", above=0)
    ema: float | None = _set(
        None, "decay of an average of the weights, evaluated and saved beside them", above=0, at_most=1
    )


@dataclass
class WarmStart:
    """Supervised steps before the loop."""

    steps: int = _set(70, "supervised steps", at_least=1)
    batch_size: int = _set(128, "examples per step", at_least=1)
    optim: Optim = _set(lambda: Optim(lr=2e-3, warmup_steps=50, weight_decay=0.01), "their optimiser")


@dataclass
class Evaluation:
    """What is measured on held-out prompts, before, during and after training."""

    data: str | None = _set(None, "held-out data; null = a part of the data is held out")
    share: float | None = _set(
        None,
        "hold out this share of the training prompts, by a hash of each, in place of the above",
        above=0,
        at_most=0.9,
    )
    every: int = _set(50, "steps between evaluations; 0 = only before and after", at_least=0)
    size: int = _set(400, "prompts", at_least=1)
    samples: int = _set(1, "samples per prompt at the policy's temperature; 0 = none", at_least=0)
    greedy: bool = _set(True, "also one greedy sample per prompt")
    revisions: int = _set(0, "times the policy revises its samples, which are measured after each", at_least=0)


@dataclass
class Reference:
    """Answers of the policy that training starts from, for stages that measure a score against theirs."""

    samples: int = _set(10, "answers to a prompt, sampled and scored once; one is about as good as ten", at_least=1)
    prompts: int = _set(64, "prompts whose answers calibrate what is calibrated once, before training", at_least=1)


@dataclass
class Preference:
    """How given samples are compared."""

    precompute: bool = _set(False, "score the reference once, beforehand, and keep the scores on disk: no second model")
    guide: str | None = _set(None, "a further frozen policy, a folder or a name, for objectives that read logp_guide_*")


@dataclass
class Stop:
    """When a run that gets no better ends."""

    metric: str = _set("", "what is watched, such as eval/sampled/NAME; counted each time it is measured")
    patience: int = _set(5, "measurements without a new best that end the run", at_least=1)
    goal: Literal["highest", "lowest"] = _set("highest", "which value is the best")


@dataclass
class Bilevel:
    """What reward expressions are worth, and how they are written."""

    inner: str | None = _set(None, "recipe of the inner runs: a bundled one, or a path; its rewards are the primitives")
    settings: dict[str, Any] = _set(dict, "put over that recipe, as on a command line: {steps: 60, optim: {lr: 1e-3}}")
    last: dict[str, Any] = _set(
        dict, "put over it as well for the last runs, with the best expression on all training data"
    )
    last_runs: int = _set(1, "how many of these, with different seeds", at_least=0)
    metric: str = _set("eval/greedy/correct", "what an inner run is worth: a figure of its last evaluation")
    share: float = _set(0.2, "of the inner training prompts, left out to measure on", above=0, at_most=0.9)
    population: bool = _set(False, "inner runs start from the best policy of the iteration before")
    write: Literal["characters", "grammar", "anything"] = _set(
        "characters", "expressions are kept to their characters, to their grammar, or not at all"
    )
    pool: Literal["processes", "ray"] = _set("processes", "where inner runs run; ray: as tasks of a cluster")
    workers: int = _set(2, "inner runs at a time; 0 = in this process (ray: as many as there is room for)", at_least=0)
    gpus: float = _set(0.0, "accelerators of an inner run, of pool: ray", at_least=0)
    retries: int = _set(0, "times that a failed inner run goes on from its last checkpoint", at_least=0)


@dataclass
class Run:
    """Where a run is written, and how it is executed."""

    directory: str = _set("runs", "folder of run folders")
    name: str | None = _set(None, "folder of this run; null = recipe and time")
    checkpoint_every: int = _set(50, "steps between checkpoints; 0 = only the last", at_least=0)
    keep: int = _set(2, "newest checkpoints to keep", at_least=1)
    samples_every: int = _set(10, "steps between written training samples; 0 = never", at_least=0)
    trackers: list[str] = _set(list, "experiment trackers of accelerate, such as tensorboard")
    mixed_precision: Literal["no", "bf16"] = _set("no", "precision of forward and backward passes")


@dataclass
class Recipe:
    """Everything a run is made of."""

    loop: Literal["online", "pathwise", "preference", "supervised", "bilevel"] = _set(
        "online",
        "learn from rewards of own samples, from the rewards' gradients, from given preferences, from given completions, "
        "or what to reward",
    )
    policy: Policy | SpanReward | Diffusion | Flow = _set(Policy, "what is trained, and how it samples")
    data: str | None = _set(None, "a bundled task, or a path: .jsonl, .csv, .parquet, or a saved datasets folder")
    warm_start: WarmStart | None = _set(None, "supervised steps before the loop; null = none")
    sampling: Component = _set("uniform", "which prompts are drawn", component="sampling")
    prompts_per_step: int = _set(8, "prompts of a step over all processes", at_least=1)
    group_size: int = _set(8, "samples per prompt", at_least=1)
    samples: Literal["policy", "data"] = _set(
        "policy", "where they come from; data: the row's `completions`, and the policy's own up to group_size"
    )
    rewards: dict[str, Component] = _set(
        dict, "what a sample is worth: name -> component, or a list", components="rewards"
    )
    shaping: dict[str, list[Component]] = _set(
        dict, "what a score becomes: reward name -> components in order; '*' = every reward", components="shaping"
    )
    weighting: Component | None = _set("linear", "how many scores become one", component="weighting")
    advantage: Component | None = _set("grpo", "a sample against its group or its future", component="advantages")
    objective: Component | None = _set(
        "policy_gradient", "the loss; null, of loop: supervised = the likelihood", component="objectives"
    )
    pathwise: Pathwise = _set(Pathwise, "of loop: pathwise, how rewards are differentiated")
    preference: Preference = _set(Preference, "of loop: preference, what the samples are compared by")
    bilevel: Bilevel = _set(Bilevel, "of loop: bilevel, the runs that a reward is tried in")
    passes: int = _set(1, "times each sample is learnt from", at_least=1)
    mini_batches: int = _set(1, "updates per pass", at_least=1)
    micro_batch: int | None = _set(None, "prompts per forward pass and process; null = all", at_least=1)
    old_logp: Literal["sampler", "recompute"] = _set("sampler", "where the old policy's log-probabilities come from")
    optim: Optim = _set(Optim, "the optimiser")
    steps: int = _set(200, "steps of the run", at_least=0)
    reference: Reference = _set(Reference, "answers to measure scores against")
    evaluation: Evaluation = _set(Evaluation, "measurements on held-out prompts")
    stop_at: dict[str, float] = _set(
        dict, "end the run once a metric reaches a value, such as {eval/greedy/correct: 0.8}"
    )
    stop_below: dict[str, float] = _set(
        dict, "end the run once a metric is below a value, such as {eval/sampled/judge: 0.8}"
    )
    stop: Stop | None = _set(
        None, "end the run once a metric gets no better: {metric: eval/sampled/gold, patience: 5}; null = never"
    )
    on_bad_score: Literal["stop", "drop"] = _set("stop", "what to do with a reward that fails or is no number")
    watch: dict[str, Component] = _set(
        dict, "scored and recorded, never trained on: name -> component", components="rewards"
    )
    seed: int = _set(0, "of everything random", at_least=0)
    run: Run = _set(Run, "where the run is written")
