"""One preference step (DPO or SimPO) on a tiny Llama and random pairs, by guerdon or by TRL.

    OMP_NUM_THREADS=1 python benchmarks/preference_step.py --who guerdon
    OMP_NUM_THREADS=1 .venv-peers/bin/python benchmarks/preference_step.py --who trl --loss simpo --prompt-length 128

A step is one batch of pairs: both samples scored under the policy and, for DPO, under a frozen reference; one update; metrics
logged. TRL's SimPO is that of its experimental CPO trainer.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common


@dataclass(frozen=True)
class Work(common.ModelShape):
    """The step."""

    who: str = field(default="guerdon", metadata={"choices": ["guerdon", "trl"]})
    loss: str = field(default="dpo", metadata={"choices": ["dpo", "simpo"]})
    pairs: int = 32
    prompt_length: int = 8
    new_tokens: int = 16
    precompute: bool = False
    micro_batch: int = 0  # 0: guerdon's own choice
    beta: float = 0.1
    lr: float = 3e-4
    steps: int = 30
    warmup: int = 3

    @property
    def total(self) -> int:
        return self.steps + self.warmup

    def data(self) -> list[dict[str, str]]:
        """Random pairs; every step has its own."""
        draw, words = random.Random(self.seed), common.letters(self.vocabulary)
        sizes = {"prompt": self.prompt_length, "chosen": self.new_tokens, "rejected": self.new_tokens}
        return [
            {name: "".join(draw.choices(words, k=size)) for name, size in sizes.items()}
            for _ in range(self.pairs * self.total)
        ]


def run_trl(work: Work, laps: common.Laps, marks: dict[str, Any], folder: Path) -> list[float]:
    import transformers
    from datasets import Dataset
    from transformers import TrainerCallback

    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": work.pairs,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "max_steps": work.total,
        "max_length": work.prompt_length + work.new_tokens + 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": work.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": work.device == "cpu",
        "seed": work.seed,
    }
    model, extra = common.llama(work), {}
    if work.loss == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        settings |= {"beta": work.beta, "loss_type": "sigmoid", "precompute_ref_log_probs": work.precompute}
        extra = {"ref_model": common.llama(work)}
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        settings |= {"beta": 2.0, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0}
    marks["imported"] = {**common.since_start(), "rss_mib": common.memory_mib()}
    transformers.logging.set_verbosity_error()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            laps.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            laps.lap()

    trainer = Trainer(
        model=model,
        args=Config(**settings),
        train_dataset=Dataset.from_list(work.data()),
        processing_class=common.tokenizer(work.vocabulary),
        callbacks=[Clock()],
        **extra,
    )
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def run_guerdon(work: Work, laps: common.Laps, marks: dict[str, Any], folder: Path) -> list[float]:
    from functools import partial

    from accelerate import Accelerator

    from guerdon.language.policy import LanguagePolicy
    from guerdon.objectives import dpo, simpo
    from guerdon.sampling import uniform
    from guerdon.training import Optim, Preference
    from guerdon.training.records import Records
    from guerdon.training.reference_scores import ReferenceScores

    policy = LanguagePolicy.load(common.llama(work), tokenizer=common.tokenizer(work.vocabulary), dtype=work.dtype)
    accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision="bf16" if work.dtype == "bfloat16" else "no")
    policy.to(accelerator.device)
    marks["imported"] = {**common.since_start(), "rss_mib": common.memory_mib()}
    objective = partial(dpo, beta=work.beta) if work.loss == "dpo" else partial(simpo, beta=2.0, gamma_beta_ratio=0.5)
    rows, reference = work.data(), None
    if work.loss == "dpo" and not work.precompute:
        policy.keep_reference()
    elif work.loss == "dpo":
        from guerdon.training.forms import Paired

        reference = ReferenceScores(policy, rows, Paired().pack)
    loop = Preference(
        policy,
        rows,
        objective,
        batch_size=work.pairs,
        micro_batch=work.micro_batch or None,
        reference=reference,
        optim=Optim(lr=work.lr),
        steps=work.total,
        accelerator=accelerator,
    )
    loop.sampler = uniform(shuffle=False)
    loop.sampler.prepare(len(rows), 0)
    records = Records(folder)
    losses = []
    laps.start()
    for step in range(1, work.total + 1):
        metrics = loop.step()
        records.metrics(step, 0.0, metrics)
        losses.append(metrics["loss"])
        laps.lap()
    records.close()
    return losses


def main() -> None:
    common.quiet()
    work, target = common.settings(Work, __doc__)
    laps, marks = common.Laps(), {}
    with tempfile.TemporaryDirectory() as folder:
        losses = {"guerdon": run_guerdon, "trl": run_trl}[work.who](work, laps, marks, Path(folder))
    step = laps.figures(work.warmup)
    figures = {
        "model": common.fingerprint(common.llama(work)),
        "step": step,
        "pairs_per_cpu_s": work.pairs / step["cpu_s"]["median"],
        "pairs_per_s": work.pairs / step["wall_s"]["median"],
        **marks,
        **common.device_memory(),
        "rss_peak_mib": common.memory_mib("VmHWM"),
        "losses": [round(loss, 5) for loss in losses],
    }
    common.report(work, figures, target)


if __name__ == "__main__":
    main()
