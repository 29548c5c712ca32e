"""One GRPO step on a tiny Llama, by guerdon or by TRL: sample, score, learn, log.

    OMP_NUM_THREADS=1 python benchmarks/grpo_step.py --who guerdon
    OMP_NUM_THREADS=1 .venv-peers/bin/python benchmarks/grpo_step.py --who trl --prompt-length 128 --new-tokens 32

A step is one batch of samples with all passes made over it. Every sample has exactly `--new-tokens` tokens (its end is
held back), so both sides do the same work. Both log every step: TRL keeps its metrics, guerdon writes its metrics and
ledger to disk.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common


@dataclass(frozen=True)
class Work(common.ModelShape):
    """The step."""

    who: str = field(default="guerdon", metadata={"choices": ["guerdon", "trl"]})
    prompts: int = 8
    group: int = 8
    prompt_length: int = 8
    new_tokens: int = 16
    beta: float = 0.0
    passes: int = 1
    lr: float = 1e-3
    rewards: int = 1
    records: bool = True
    liger: bool = False
    steps: int = 40
    warmup: int = 3

    @property
    def total(self) -> int:
        return self.steps + self.warmup

    def data(self) -> list[dict[str, str]]:
        count = self.prompts * (self.total + 2)
        return [{"prompt": p} for p in common.prompts(count, self.prompt_length, self.vocabulary, self.seed)]

    def functions(self) -> list[Any]:
        return [common.Hits(self.vocabulary), *(_variety(0.1 * k, f"variety_{k}") for k in range(1, self.rewards))]


def _variety(scale: float, name: str) -> Any:
    """A further reward: how many different characters a sample has."""

    def variety(completions: list[str], **_: Any) -> list[float]:
        return [scale * len(set(text)) / max(len(text), 1) for text in completions]

    variety.__name__ = name
    return variety


class Book:
    """What is noted on the way through a run."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.laps = common.Laps()
        self.phases = common.Phases(work.device)
        self.rewards: list[float] = []
        self.marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        self.marks[name] = {**common.since_start(), "rss_mib": common.memory_mib()}

    def ready(self) -> None:
        """All is set up: the first step begins."""
        self.mark("first_step_begins")
        self.laps.start()

    def step(self) -> None:
        self.laps.lap()
        done = len(self.laps.cpu)
        if done == 1:
            self.marks["first_step_ends"] = common.since_start()
        self.phases.running = done >= self.work.warmup

    def figures(self, model: dict[str, float]) -> dict[str, Any]:
        step = self.laps.figures(self.work.warmup)
        tokens = self.work.prompts * self.work.group * self.work.new_tokens
        return {
            "model": model,
            "step": step,
            "new_tokens": tokens,
            "new_tokens_per_cpu_s": tokens / step["cpu_s"]["median"],
            "new_tokens_per_s": tokens / step["wall_s"]["median"],
            "phases_cpu_s": self.phases.per(self.work.steps),
            **self.marks,
            **common.device_memory(),
            "rss_peak_mib": common.memory_mib("VmHWM"),
            "rewards": [round(reward, 4) for reward in self.rewards],
            "reward_last": sum(self.rewards[-3:]) / 3,
        }


def run_trl(work: Work, book: Book, folder: Path) -> dict[str, float]:
    import transformers
    from datasets import Dataset
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    book.mark("imported")
    transformers.logging.set_verbosity_error()
    model = common.llama(work)
    start = common.fingerprint(model)
    if work.beta > 0:
        # TRL makes the reference by loading the model's path again, so there has to be one
        model.save_pretrained(folder / "start")
        model = LlamaForCausalLM.from_pretrained(folder / "start", attn_implementation="sdpa", dtype=work.dtype)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            book.ready()

        def on_step_end(self, _args: Any, state: Any, _control: Any, **__: Any) -> None:
            if state.global_step % work.passes == 0:
                book.step()

    config = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=work.prompts * work.group,
        num_generations=work.group,
        max_completion_length=work.new_tokens,
        generation_kwargs={"min_new_tokens": work.new_tokens},
        num_iterations=work.passes,
        beta=work.beta,
        loss_type="grpo",
        scale_rewards="group",
        temperature=1.0,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        max_steps=work.total * work.passes,
        bf16=work.dtype == "bfloat16",
        use_liger_kernel=work.liger,
        gradient_checkpointing=False,
        use_cpu=work.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=work.functions(),
        args=config,
        train_dataset=Dataset.from_list(work.data()),
        processing_class=common.tokenizer(work.vocabulary),
        callbacks=[Clock()],
    )
    # metrics are made and kept as usual; only their printing is left out
    trainer.pop_callback(transformers.PrinterCallback)
    book.phases.wrap(trainer, "_generate", "sample")
    book.phases.wrap(trainer, "compute_loss", "forward")
    book.phases.wrap(trainer.accelerator, "backward", "backward")
    trainer.train()
    name = f"rewards/{work.functions()[0].__name__}/mean"
    book.rewards += [row[name] for row in trainer.state.log_history if name in row]
    return start


def run_guerdon(work: Work, book: Book, folder: Path) -> dict[str, float]:
    from functools import partial

    from transformers import LlamaForCausalLM  # noqa: F401

    # nothing that runs this model starts faster
    book.mark("model_imported")
    from accelerate import Accelerator

    from guerdon.advantages import grpo
    from guerdon.language.policy import LanguagePolicy
    from guerdon.ledger import attribute
    from guerdon.objectives import policy_gradient
    from guerdon.signal import Signal
    from guerdon.training import Online, Optim
    from guerdon.training.records import Records

    book.mark("imported")
    model = common.llama(work)
    start = common.fingerprint(model)
    policy = LanguagePolicy.load(
        model,
        tokenizer=common.tokenizer(work.vocabulary),
        max_new_tokens=work.new_tokens,
        min_new_tokens=work.new_tokens,
        dtype=work.dtype,
    )
    if work.beta > 0:
        policy.keep_reference()
    functions = {function.__name__: function for function in work.functions()}
    accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision="bf16" if work.dtype == "bfloat16" else "no")
    policy.to(accelerator.device)
    loop = Online(
        policy,
        work.data(),
        Signal(rewards=functions, advantage=grpo),
        partial(policy_gradient, beta=work.beta),
        prompts_per_step=work.prompts,
        group_size=work.group,
        passes=work.passes,
        optim=Optim(lr=work.lr),
        steps=work.total,
        seed=work.seed,
        accelerator=accelerator,
    )
    kinds = {"log_prob": "forward"}
    book.phases.wrap(policy, "forward", lambda *_, kind="log_prob", **__: kinds.get(kind, kind))
    book.phases.wrap(accelerator, "backward", "backward")
    records = Records(folder, enabled=work.records)
    first = f"score/{next(iter(functions))}"
    written: list[float] = []
    book.ready()
    for _ in range(work.total):
        result = loop.step()
        cpu = time.process_time()
        records.step(result, 0.0, samples=result.step % 10 == 0)
        written.append(time.process_time() - cpu)
        book.rewards.append(result.metrics[first])
        book.step()
    records.close()

    # the ledger is made inside the step; making the last one again shows its part
    def ledger() -> float:
        cpu = time.process_time()
        attribute(result.rollout)
        return time.process_time() - cpu

    book.marks["records_cpu_s"] = {
        "written": common.summary(written[work.warmup :]),
        "ledger": common.summary([ledger() for _ in range(work.steps)]),
    }
    return start


def main() -> None:
    common.quiet()
    work, target = common.settings(Work, __doc__)
    book = Book(work)
    with tempfile.TemporaryDirectory() as folder:
        run = {"guerdon": run_guerdon, "trl": run_trl}[work.who]
        model = run(work, book, Path(folder))
    common.report(work, book.figures(model), target)


if __name__ == "__main__":
    main()
