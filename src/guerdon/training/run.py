"""From a recipe to a run directory: build the parts, run the loop, write records and checkpoints, go on after a stop."""

from __future__ import annotations

import importlib
import os
import shutil
import signal as signals
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from guerdon.components import build
from guerdon.errors import CheckpointError, RecipeError
from guerdon.recipes.schema import Recipe, dump, load_recipe
from guerdon.signal import Signal
from guerdon.stages import signature, wants
from guerdon.training import checkpoint, deepspeed, expressions
from guerdon.training.bilevel import Performance
from guerdon.training.evaluation import Evaluation, evaluate
from guerdon.training.forms import check_form, form_of
from guerdon.training.front import FrontTracker
from guerdon.training.inner_runs import InnerRuns, inner_recipe, make_pool
from guerdon.training.loop import data_length
from guerdon.training.online import Online, check_fields
from guerdon.training.optimisation import Optim
from guerdon.training.pathwise import Pathwise, Truncation, check_rewards
from guerdon.training.patience import Patience
from guerdon.training.preference import Preference, needs_reference
from guerdon.training.progress import Display
from guerdon.training.records import Records
from guerdon.training.reference_scores import ReferenceScores
from guerdon.training.supervised import REFERENCE_FIELDS, Supervised, check_objective

# below this many weights a second thread costs more than it brings, above all on a busy machine
_SMALL = 5_000_000

# all that a run can have written before its first figure
_OF_A_FAILED_RUN = {
    "recipe.yaml",
    "recipe.yaml.draft",
    "status.json",
    "environment.json",
    "supervised.jsonl",
    "base",
    "base.draft",
}

# a domain gives the runner its policy and its rows; the loops never see it
DOMAINS = {
    "language": "guerdon.language.domain",
    "spans": "guerdon.rewards.critics.domain",
    "diffusion": "guerdon.diffusion.domain",
    "flow": "guerdon.diffusion.domain",
}


def train(recipe: Recipe, name: str | None = None) -> Path:
    """Run a recipe from its beginning.

    Args:
        recipe: complete and checked, from `guerdon.recipes.schema.load_recipe`.
        name: what to call the run when the recipe gives no `run.name`; time is added.

    Returns:
        The run directory.

    Raises:
        GuerdonError: whatever went wrong; the run directory says so too and its checkpoints stay readable.
    """
    accelerator = _accelerator(recipe)
    wanted = recipe.run.name or f"{name or recipe.loop}-{time.strftime('%Y%m%d-%H%M%S')}"
    chosen = [str(Path(recipe.run.directory) / wanted)]
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    run = Path(chosen[0])
    _check_free(run)
    runner = _Runner(recipe, run, accelerator)
    runner.build()  # what a recipe can get wrong is found before anything is written
    if accelerator.is_main_process:
        try:
            if run.exists():
                shutil.rmtree(run)  # what `_check_free` found to be a run that failed before its first figure
            run.mkdir(parents=True)
            (run / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"run.directory: {run} cannot be written: {error.strerror}.") from error
    accelerator.wait_for_everyone()
    return runner.execute()


def resume(run: Path | str, overrides: Iterable[str] = (), from_step: int | None = None) -> Path:
    """Go on with a run as if it had never stopped.

    Args:
        run: its directory.
        overrides: settings to change, such as `["--steps", "400"]`.
        from_step: the checkpoint to start from; None = the newest.

    Returns:
        The run directory.

    Raises:
        CheckpointError: there is no run, or its checkpoint is damaged.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run} is no run directory: it has no recipe.yaml.")
    recipe = load_recipe(run / "recipe.yaml", overrides)
    accelerator = _accelerator(recipe)
    runner = _Runner(recipe, run, accelerator, resumed=True, from_step=from_step)
    runner.build()  # what an override can get wrong is found before the recipe is written over
    if accelerator.is_main_process:
        draft = run / "recipe.yaml.draft"
        draft.write_text(dump(recipe), encoding="utf-8")
        draft.replace(run / "recipe.yaml")
    return runner.execute()


def _check_free(run: Path) -> None:
    """A new run takes no folder but an empty one, or that of a run which failed before its first figure.

    Raises:
        RecipeError: the folder holds a run, or files that no run wrote.
    """
    if not run.exists():
        return
    if (run / "metrics.jsonl").exists() or checkpoint.list_steps(run):
        raise RecipeError(f"run.name: {run} holds a run already. Choose another name, or: guerdon resume {run}")
    found = {path.name for path in run.iterdir()} if run.is_dir() else {run.name}
    if found and not ("recipe.yaml" in found and found <= _OF_A_FAILED_RUN):
        raise RecipeError(f"run.name: {run} is there already and is no run of guerdon's. Choose another name.")


def _accelerator(recipe: Recipe) -> Accelerator:
    trackers: Any = recipe.run.trackers or None
    made = Accelerator(mixed_precision=recipe.run.mixed_precision, log_with=trackers, project_dir=recipe.run.directory)
    deepspeed.check(made)
    return made


class _Runner:
    """One execution of a run: from its beginning or from a checkpoint, to its end or a stop."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        accelerator: Accelerator,
        *,
        resumed: bool = False,
        from_step: int | None = None,
    ) -> None:
        self.recipe, self.run, self.accelerator, self.resumed = recipe, run, accelerator, resumed
        self.from_step = from_step
        self.main = accelerator.is_main_process
        self.domain = importlib.import_module(DOMAINS[recipe.policy.kind])
        self.records = Records(run, enabled=self.main)
        self.step = 0
        self.scores_before: dict[str, list[float]] = {}  # of the samples before training, for win rates
        self.patience = None if recipe.stop is None else Patience(**vars(recipe.stop))
        self.elapsed_before = 0.0
        self.start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.start

    def execute(self) -> Path:
        state, reason = "failed", ""
        try:
            self.records.status("running", self.step, self.recipe.steps)
            self.records.environment(self.accelerator.num_processes, str(self.accelerator.device))
            set_seed(self.recipe.seed)
            with _Interrupt() as interrupt:
                loops = {
                    "online": self._online,
                    "bilevel": self._bilevel,
                    "pathwise": self._pathwise,
                    "preference": self._preference,
                    "supervised": self._supervised,
                }
                state, reason = loops[self.recipe.loop](interrupt)
        except KeyboardInterrupt:
            state, reason = "stopped", "interrupted"
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.records.status(state, self.step, self.recipe.steps, reason)
            self.records.close()
            self.accelerator.end_training()
        if interrupt.hit:
            raise KeyboardInterrupt
        return self.run

    # -- parts ---------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Import the components and open the data: all that can be wrong before a model is loaded."""
        recipe = self.recipe
        if recipe.loop == "bilevel":
            self._build_bilevel()
            return
        assert recipe.data is not None
        if recipe.loop == "preference":
            self._build_preference(recipe.data)
            return
        self.data = self.domain.load_data(recipe.data, loop=recipe.loop, evaluation=recipe.evaluation, seed=recipe.seed)
        if recipe.loop == "supervised":
            self.objective = self._built_objective()
            if self.objective is not None:
                check_objective(self.objective, self.data.train[0])
            self.signal = self._measured()
            return
        self.signal = Signal(
            rewards={name: build("rewards", spec, f"rewards.{name}") for name, spec in recipe.rewards.items()},
            shaping={
                name: [build("shaping", spec, f"shaping.{name}") for spec in chain]
                for name, chain in recipe.shaping.items()
            },
            weighting=None if recipe.weighting is None else build("weighting", recipe.weighting),
            advantage=None if recipe.advantage is None else build("advantages", recipe.advantage, "advantage"),
            watch={name: build("rewards", spec, f"watch.{name}") for name, spec in recipe.watch.items()},
            on_bad_score=recipe.on_bad_score,
        )
        self._build_sampler()
        if recipe.loop == "pathwise":
            self.signal.advantage = None  # nothing is estimated from scores
            check_rewards(self.signal, self.data.train[0])
            return
        self._build_objective()

    def _build_sampler(self) -> None:
        self.sampler: Any = build("sampling", self.recipe.sampling)
        self.sampler.prepare(data_length(self.data.train), self.recipe.seed)

    def _build_objective(self) -> None:
        self.objective = self._built_objective()
        check_fields(
            self.signal,
            self.objective,
            columns=self.data.train[0],
            policy_fields=self.domain.policy_fields(),
            prepared={"logp_ref", "kl_old", "drift", "values", "values_old", "ref_scores"},
        )

    def _build_bilevel(self) -> None:
        recipe, settings = self.recipe, self.recipe.bilevel
        if self.accelerator.num_processes > 1:
            raise RecipeError("loop: bilevel runs in one process; its inner runs go side by side (bilevel.workers).")
        self.inner = InnerRuns(
            inner_recipe(settings),
            self.run / "inner",
            make_pool(settings),
            metric=settings.metric,
            share=settings.share,
            retries=settings.retries,
            last=inner_recipe(settings, settings.last),
        )
        self.performance = Performance(self.inner, self.inner.names, population=settings.population)
        if recipe.data is None:
            self.data = self.domain.Data(expressions.instruction(self.inner.names), ())
        else:
            found = self.domain.load_data(recipe.data, loop="online", evaluation=recipe.evaluation, seed=recipe.seed)
            self.data = self.domain.Data(found.train, ())
        self.signal = Signal(
            rewards={"performance": self.performance},
            advantage=None if recipe.advantage is None else build("advantages", recipe.advantage, "advantage"),
            watch={name: build("rewards", spec, f"watch.{name}") for name, spec in recipe.watch.items()},
            on_bad_score=recipe.on_bad_score,
        )
        self._build_sampler()
        self._build_objective()

    def _build_preference(self, data: str) -> None:
        recipe = self.recipe
        if not hasattr(self.domain, "load_preferences"):
            raise RecipeError(f"loop: preference needs a language policy; got kind: {recipe.policy.kind}.")
        self.objective = self._built_objective()
        form = form_of(self.objective)
        loaded = self.domain.load_preferences(data, form.kind, evaluation=recipe.evaluation, seed=recipe.seed)
        # before anything is kept by a row's position
        self.data = loaded._replace(train=form.usable(loaded.train), held_out=form.usable(loaded.held_out))
        guide = () if recipe.preference.guide is None else ("logp_guide",)
        check_form(self.objective, form, ("logp", "logp_ref", *guide), list(self.data.train[0]))
        self.signal = self._measured()

    def _built_objective(self) -> Any:
        """The recipe's loss; None of a supervised loop: the policy's own."""
        spec = self.recipe.objective
        return None if spec is None else build("objectives", spec, "objective")

    def _measured(self) -> Signal:
        """Rewards of a loop that trains on none: they measure what the policy samples."""
        named = {"rewards": self.recipe.rewards, "watch": self.recipe.watch}
        measured = {
            name: build("rewards", spec, f"{part}.{name}")
            for part, specs in named.items()
            for name, spec in specs.items()
        }
        return Signal(rewards=measured, on_bad_score="drop")

    def _policy(self) -> Any:
        """The policy as the loop starts with it: bundled or loaded, after its warm start, with adapters."""
        settings, base = self.recipe.policy, self.run / "base"
        policy = self.domain.build_policy(settings, base=base if base.exists() else None, seed=self.recipe.seed)
        policy.to(self.accelerator.device)
        if self.recipe.loop == "bilevel" and self.recipe.bilevel.write != "anything":
            expressions.restrict(policy, len(self.inner.names), grammar=self.recipe.bilevel.write == "grammar")
        if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in policy.parameters()) < _SMALL:
            torch.set_num_threads(1)
        if self.recipe.warm_start is not None and not base.exists():
            self._warm_start(policy)
            if self.main:
                policy.save(base.with_name("base.draft"))
                base.with_name("base.draft").rename(base)
            self.accelerator.wait_for_everyone()
        self.domain.add_adapters(policy, settings)
        return policy

    def _warm_start(self, policy: Any) -> None:
        warm = self.recipe.warm_start
        assert warm is not None
        if self.recipe.loop == "bilevel":
            rows = expressions.demonstrations(self.data.train, len(self.inner.names), self.recipe.seed)
        else:
            assert self.recipe.data is not None
            rows = self.domain.demonstrations(self.recipe.data, self.recipe.seed)
        loop = Supervised(
            policy,
            rows,
            batch_size=warm.batch_size,
            optim=Optim(**vars(warm.optim)),
            steps=warm.steps,
            seed=self.recipe.seed,
            accelerator=self.accelerator,
        )
        with Display("warm start", warm.steps, enabled=self.main) as display:
            for _ in range(warm.steps):
                metrics = loop.step()
                display.update(loop.steps_done, metrics)
                self._supervised_line(loop.steps_done, metrics)
        loop.finish()
        # the loop that follows wraps the policy anew
        self.accelerator.free_memory()

    def _supervised_line(self, step: int, metrics: dict[str, float]) -> None:
        self.records.line("supervised", {"step": step, "elapsed": round(self.elapsed, 3), **metrics})

    # -- loops ---------------------------------------------------------------------------------------------------

    def _online(self, interrupt: _Interrupt) -> tuple[str, str]:
        recipe = self.recipe
        data, signal = self.data, self.signal
        policy = self._policy()
        objective = _with_longest(self.objective, policy.max_steps)
        if signal.value_heads:
            policy.add_critic(signal.value_heads)
        if signal.needs_reference or any(wants(objective, field) for field in ("logp_ref", "kl", "drift")):
            policy.keep_reference()
        state = self._read_checkpoint(policy)
        loop = Online(
            policy,
            data.train,
            signal,
            objective,
            sampler=self.sampler,
            prompts_per_step=recipe.prompts_per_step,
            group_size=recipe.group_size,
            samples=recipe.samples,
            passes=recipe.passes,
            mini_batches=recipe.mini_batches,
            micro_batch=recipe.micro_batch,
            old_logp=recipe.old_logp,
            reference_samples=recipe.reference.samples,
            reference_prompts=recipe.reference.prompts,
            optim=Optim(**vars(recipe.optim)),
            steps=recipe.steps,
            seed=recipe.seed,
            accelerator=self.accelerator,
        )
        return self._rewarded(loop, policy, state, interrupt)

    def _bilevel(self, interrupt: _Interrupt) -> tuple[str, str]:
        with self.inner.pool:
            base = self.inner.prepare()
            state, reason = self._online(interrupt)
            if state == "finished":
                self._conclude(base)
        return state, reason

    def _tell_expressions(self) -> None:
        """What a step of the bilevel loop tried, and what each was worth; checkpoints that nobody needs are deleted."""
        for record in self.performance.records:
            self.records.line("expressions", {"step": self.step, **record})
        self.inner.forget([self.performance.start])

    def _conclude(self, base: float) -> None:
        """Train with the best expression on all training data (or take what a population has arrived at), and say how good."""
        best, settings = self.performance.best, self.recipe.bilevel
        runs = []
        if best is not None:
            start = self.performance.start if settings.population else None
            runs = self.inner.conclude(best["expression"], start, settings.last_runs)
        found = {
            "metric": settings.metric,
            "base": base,
            "best": best,
            "primitives": self.inner.names,
            "last_runs": runs,
        }
        self.records.record("expression", found)

    def _pathwise(self, interrupt: _Interrupt) -> tuple[str, str]:
        recipe, given = self.recipe, self.recipe.pathwise
        policy = self._policy()
        if given.beta:
            policy.keep_reference()
        state = self._read_checkpoint(policy)
        loop = Pathwise(
            policy,
            self.data.train,
            self.signal,
            truncation=Truncation(
                given.truncation,
                k=given.k,
                mean=given.cut_mean,
                std=given.cut_std,
                renoise=given.renoise,
                share=given.share,
            ),
            scale=given.scale,
            beta=given.beta,
            deterministic=given.deterministic,
            checkpointing=given.checkpointing,
            skips=given.skips,
            sampler=self.sampler,
            prompts_per_step=recipe.prompts_per_step,
            group_size=recipe.group_size,
            micro_batch=recipe.micro_batch,
            optim=Optim(**vars(recipe.optim)),
            steps=recipe.steps,
            seed=recipe.seed,
            accelerator=self.accelerator,
        )
        return self._rewarded(loop, policy, state, interrupt)

    def _rewarded(
        self, loop: Online | Pathwise, policy: Any, state: checkpoint.LoopState | None, interrupt: _Interrupt
    ) -> tuple[str, str]:
        """Run a loop whose samples are scored: evaluate before, on the way and after, and keep its records."""
        recipe, data = self.recipe, self.data
        front = FrontTracker(loop.signal.score_names)
        if state is not None:
            loop.load_state(state)
            front.restore(self.run / "metrics.jsonl")

        def test() -> Evaluation:
            found = self._evaluate(loop, data.held_out)
            loop.signal.validate(found.metrics)
            found.metrics.update(front.add(found.metrics))
            return found

        if loop.steps_done == 0:
            loop.prepare()
            before = test()
            self._reached(before.metrics)
            self.records.metrics(0, self.elapsed, before.metrics)
            self._keep_samples(loop, before, "before")

        def step() -> dict[str, float]:
            result = loop.step()
            self.step = result.step
            evaluation = test() if self._evaluation_due() else None
            result.metrics.update(evaluation.metrics if evaluation else {})
            if self.step == recipe.steps or self._reached(result.metrics):
                if evaluation is None:
                    evaluation = test()
                    result.metrics.update(evaluation.metrics)
                self._keep_samples(loop, evaluation, "after")
            often = recipe.run.samples_every
            self.records.step(result, self.elapsed, samples=bool(often) and self.step % often == 0)
            if recipe.loop == "bilevel":
                self._tell_expressions()
            return result.metrics

        return self._steps(loop, policy, step, interrupt)

    def _preference(self, interrupt: _Interrupt) -> tuple[str, str]:
        recipe, data = self.recipe, self.data
        policy, settings = self._policy(), recipe.preference
        reference = held_out_reference = None
        if needs_reference(self.objective):
            if settings.precompute:
                pack = form_of(self.objective).pack
                size = recipe.micro_batch or 32
                reference, held_out_reference = (
                    ReferenceScores(policy, rows, pack, batch=size, accelerator=self.accelerator) if len(rows) else None
                    for rows in (data.train, data.held_out)
                )
            else:
                policy.keep_reference()
        guides = {}
        if settings.guide is not None:
            model = replace(recipe.policy, model=settings.guide, lora=None)
            guides["guide"] = self.domain.build_policy(model, seed=recipe.seed).to(self.accelerator.device)
            guides["guide"].requires_grad_(False)
        state = self._read_checkpoint(policy)
        loop = Preference(
            policy,
            data.train,
            self.objective,
            batch_size=recipe.prompts_per_step,
            micro_batch=recipe.micro_batch,
            reference=reference,
            guides=guides,
            optim=Optim(**vars(recipe.optim)),
            steps=recipe.steps,
            seed=recipe.seed,
            accelerator=self.accelerator,
        )

        def held_out() -> dict[str, float]:
            found = loop.evaluate(data.held_out, held_out_reference)
            if self.main and found.histograms:
                self.records.line("pairs", {"step": self.step, **found.histograms})
            return found.metrics

        return self._judged(loop, policy, state, held_out, interrupt)

    def _supervised(self, interrupt: _Interrupt) -> tuple[str, str]:
        recipe, policy = self.recipe, self._policy()
        fields = [] if self.objective is None else [f for f in REFERENCE_FIELDS if wants(self.objective, f)]
        if fields or self.signal.needs("logp_ref"):
            policy.keep_reference()
        state = self._read_checkpoint(policy)
        loop = Supervised(
            policy,
            self.data.train,
            self.objective,
            batch_size=recipe.prompts_per_step,
            micro_batch=recipe.micro_batch,
            optim=Optim(**vars(recipe.optim)),
            steps=recipe.steps,
            seed=recipe.seed,
            accelerator=self.accelerator,
        )
        return self._judged(loop, policy, state, lambda: loop.evaluate(self.data.held_out), interrupt)

    def _judged(
        self,
        loop: Preference | Supervised,
        policy: Any,
        state: checkpoint.LoopState | None,
        held_out: Callable[[], dict[str, float]],
        interrupt: _Interrupt,
    ) -> tuple[str, str]:
        """Run a loop whose samples are given: measure held-out rows and own samples before, on the way and after."""
        recipe = self.recipe
        if state is not None:
            loop.load_state(state)
            self.scores_before = state.facts.get("scores_before", {})
        prompts: Any = []
        if self.signal.rewards:
            of_task = getattr(self.domain, "measured_rows", lambda source, rows, evaluation: rows)
            prompts = of_task(recipe.data, self.data.held_out, recipe.evaluation)

        def judge(phase: str | None) -> dict[str, float]:
            found = held_out()
            evaluation = self._evaluate(loop, prompts, self.signal)
            if phase == "before":
                self.scores_before = _scores(evaluation)
            if phase is not None:
                self._keep_samples(loop, evaluation, phase)
            return {**found, **evaluation.metrics, **_win_rates(self.scores_before, _scores(evaluation))}

        if loop.steps_done == 0:
            before = judge("before")
            self._reached(before)
            self.records.metrics(0, self.elapsed, before)

        def step() -> dict[str, float]:
            metrics = loop.step()
            self.step = loop.steps_done
            due = self._evaluation_due()
            metrics |= judge("after" if self.step == recipe.steps else None) if due else {}
            if not due and self._reached(metrics):
                metrics |= judge("after")
            self.records.metrics(self.step, self.elapsed, metrics)
            return metrics

        return self._steps(loop, policy, step, interrupt)

    def _steps(
        self,
        loop: Online | Pathwise | Preference | Supervised,
        policy: Any,
        step: Callable[[], dict[str, float]],
        interrupt: _Interrupt,
    ) -> tuple[str, str]:
        """Step to the end, a target or a stop; gives the run's state and the reason for it."""
        recipe = self.recipe
        if recipe.run.trackers:
            self.accelerator.init_trackers(self.run.name, config={"recipe": dump(recipe)})
        self.step = loop.steps_done
        with Display("train", recipe.steps, self.step, enabled=self.main) as display:
            while self.step < recipe.steps:
                metrics = step()
                display.update(self.step, metrics)
                self.accelerator.log(metrics, step=self.step)
                last = self.step == recipe.steps
                reached = self._reached(metrics)
                stop = interrupt.agreed(self.accelerator)
                if last or reached or stop or self._due(recipe.run.checkpoint_every):
                    self._checkpoint(loop, policy)
                if reached:
                    return "finished", reached
                if stop and not last:
                    display.say(f"stopped after step {self.step}; go on with: guerdon resume {self.run}")
                    return "stopped", "interrupted"
        return "finished", ""

    # -- what happens between steps ------------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _evaluation_due(self) -> bool:
        return self.step == self.recipe.steps or self._due(self.recipe.evaluation.every)

    def _reached(self, metrics: dict[str, float]) -> str:
        """Which target, or want of improvement, ends the run, in words; empty if none."""
        spent = "" if self.patience is None else self.patience.spent(self.step, metrics)
        return _reached(self.recipe.stop_at, self.recipe.stop_below, metrics) or spent

    def _evaluate(
        self, loop: Online | Pathwise | Preference | Supervised, rows: Any, signal: Signal | None = None
    ) -> Evaluation:
        settings = self.recipe.evaluation
        with loop.averaged():
            return evaluate(
                loop.policy,
                rows,
                signal or self.signal,
                greedy=settings.greedy,
                samples=settings.samples,
                revisions=settings.revisions,
                seed=self.recipe.seed,
                accelerator=self.accelerator,
                module=loop.module,
            )

    def _keep_samples(
        self, loop: Online | Pathwise | Preference | Supervised, evaluation: Evaluation, phase: str
    ) -> None:
        for mode, rollout in evaluation.rollouts.items():
            shown = loop.with_references(rollout.select(slice(0, 16)))
            self.records.samples(self.step, phase, mode, self.signal.weigh(shown))

    def _checkpoint(self, loop: Online | Pathwise | Preference | Supervised, policy: Any) -> None:
        state, weights = loop.state(), checkpoint.weights(policy)  # on every process: each may hold a part
        if self.main:
            facts = {**state.facts, "elapsed": self.elapsed, "scores_before": self.scores_before}

            def save(folder: Path) -> None:
                policy.save(folder, state=weights)
                if loop.average is not None:
                    with loop.averaged():
                        policy.save(folder.with_name("average"))

            checkpoint.write(self.run, self.step, state._replace(facts=facts), save, self.recipe.run.keep)
        self.accelerator.wait_for_everyone()

    def _read_checkpoint(self, policy: Any) -> checkpoint.LoopState | None:
        """Put the checkpoint's weights into the policy, and give the rest for the loop; None at a run's beginning."""
        if not self.resumed:
            return None
        if not checkpoint.list_steps(self.run) and self.from_step is None:
            self.records.rewind(-1)  # stopped before its first checkpoint: the beginning is where it goes on
            return None
        folder, state = checkpoint.read(self.run, self.from_step)
        policy.load_weights(folder / "policy")
        self.elapsed_before = state.facts["elapsed"]
        self.records.rewind(state.facts["steps_done"])
        if self.patience is not None:
            self.patience.restore(self.run / "metrics.jsonl", state.facts["steps_done"])
        return state


def _scores(evaluation: Evaluation) -> dict[str, list[float]]:
    """`mode/component` -> the first sample's score for every held-out prompt."""
    return {
        f"{mode}/{name}": rollout.scores[:, 0, k].tolist()
        for mode, rollout in evaluation.rollouts.items()
        if rollout.scores is not None
        for k, name in enumerate(rollout.score_names)
    }


def _win_rates(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, float]:
    """Share of held-out prompts whose sample now scores above that before training; ties count half."""
    found = {}
    for name, scores in after.items():
        pairs = [(a, b) for a, b in zip(scores, before.get(name, ()), strict=False) if a == a and b == b]  # not NaN
        if pairs:
            mode, _, component = name.partition("/")
            wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
            found[f"eval/{mode}/{component}_win_rate"] = wins / len(pairs)
    return found


def _with_longest(objective: Any, max_steps: int) -> Any:
    """A constant denominator is the longest sample there can be, which only the policy knows."""
    options = signature(objective).options
    if options.get("denominator", "constant") == "constant" and options.get("max_length", 0) is None:
        return partial(objective, max_length=max_steps)
    return objective


def _reached(targets: dict[str, float], floors: dict[str, float], metrics: dict[str, float]) -> str:
    for name, value in targets.items():
        if name in metrics and metrics[name] >= value:
            return f"{name} = {metrics[name]:.4g} reached {value:g}"
    for name, value in floors.items():
        if name in metrics and metrics[name] < value:
            return f"{name} = {metrics[name]:.4g} fell below {value:g}"
    return ""


class _Interrupt:
    """The first Ctrl-C (or SIGTERM) asks for a stop after the current step; the second stops at once."""

    def __init__(self) -> None:
        self.hit = False

    def __enter__(self) -> _Interrupt:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signals.SIGINT, signals.SIGTERM):
                self.before[number] = signals.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signals.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.hit
        asked = torch.tensor(float(self.hit), device=accelerator.device)
        return cast(torch.Tensor, accelerator.reduce(asked, reduction="sum")).item() > 0
