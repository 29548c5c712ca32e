"""What a preference loss is computed from: how data rows become a rollout, and a rollout's scores the fields it names.

A form is chosen by the fields that the objective names. A method that needs another arrangement of its rows (more prompts a
row, drafts in the prompt) brings a class of this shape and a line in `FORMS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from guerdon.errors import BindingError, DataError
from guerdon.objectives.kto import kto_reference_point
from guerdon.rollout import Rollout
from guerdon.stages import check, label, signature
from guerdon.training.loop import data_length

Row = Mapping[str, Any]
Scores = dict[str, Tensor]  # `logp`, `logp_ref`, ... -> [P, G, T]
Scorer = Callable[[Rollout], Scores]


@runtime_checkable
class Form(Protocol):
    """How rows are arranged. `kind` names the data that are wanted, `suffixes` what the fields of the sides end in."""

    kind: str
    suffixes: tuple[str, ...]

    def names(self, scored: Sequence[str]) -> set[str]:
        """The fields that there will be for scores of these names."""
        ...

    def usable(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that can be learnt from; of those that are left out a warning gives the number."""
        ...

    def pack(self, policy: Any, rows: Sequence[Row]) -> Rollout:
        """The samples of some rows, to be scored; its prompts are those of whole rows, in order, the same number a row."""
        ...

    def fields(self, rollout: Rollout, scores: Scores) -> dict[str, Any]:
        """What the objective is given."""
        ...

    def shared(
        self,
        wanted: Sequence[str],
        policy: Any,
        rows: Sequence[Row],
        mine: range,
        parts: Sequence[Rollout],
        score: Scorer,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Fields that are a mean over the whole batch: name -> this process's sum, and how many it is over.

        Args:
            wanted: the fields that the objective names.
            policy: packs further rows.
            rows: of the whole batch, over all processes.
            mine: positions of this process's rows.
            parts: this process's rows, packed.
            score: scores a rollout without gradient.
        """
        ...

    def finish(self, means: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The fields from the means over the whole batch of `count` rows."""
        ...

    def describe(self, rollout: Rollout, logp: Tensor, implicit: Tensor | None) -> Scores:
        """Numbers of every row, [rows] each; means of them are metrics, histograms are kept of those named `reward...`."""
        ...


class Paired:
    """A chosen and a rejected sample for each prompt, which is computed once for both: [B, 2, T]."""

    kind = "paired"
    suffixes = ("_chosen", "_rejected")

    def names(self, scored: Sequence[str]) -> set[str]:
        """The scores and the mask of either side, and the mean length of chosen samples."""
        return {name + suffix for name in (*scored, "mask") for suffix in self.suffixes} | {"mean_length_chosen"}

    def usable(self, rows: Sequence[Row]) -> Sequence[Row]:
        """All of them."""
        return rows

    def pack(self, policy: Any, rows: Sequence[Row]) -> Rollout:
        """Chosen first, then rejected."""
        return policy.pack([row["prompt"] for row in rows], [[row["chosen"], row["rejected"]] for row in rows])

    def fields(self, rollout: Rollout, scores: Scores) -> dict[str, Any]:
        """Every score and the mask, split into its sides."""
        given = {**scores, "mask": rollout.mask}
        return {name + suffix: value[:, g] for name, value in given.items() for g, suffix in enumerate(self.suffixes)}

    def shared(
        self,
        wanted: Sequence[str],
        policy: Any,
        rows: Sequence[Row],
        mine: range,
        parts: Sequence[Rollout],
        score: Scorer,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean length of chosen samples."""
        if "mean_length_chosen" not in wanted:
            return {}
        live = torch.stack([part.mask[:, 0].sum() for part in parts]).sum()
        return {"mean_length_chosen": (live, torch.tensor(len(mine), device=live.device))}

    def finish(self, means: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """As they are."""
        return means

    def describe(self, rollout: Rollout, logp: Tensor, implicit: Tensor | None) -> Scores:
        """Length and log-probability of either side; the implicit rewards with margin and accuracy where there are any."""
        live = logp.where(rollout.mask, 0.0).sum(-1)
        lengths = rollout.mask.sum(-1)
        mean = live / lengths.clamp(min=1)
        found = {f"length{suffix}": lengths[:, g].to(logp.dtype) for g, suffix in enumerate(self.suffixes)}
        found |= {f"logp{suffix}": live[:, g] for g, suffix in enumerate(self.suffixes)}
        found["likelihood_gap"] = mean[:, 0] - mean[:, 1]
        found["likelihood_accuracy"] = (mean[:, 0] > mean[:, 1]).to(logp.dtype)
        if implicit is not None:
            found |= {f"reward{suffix}": implicit[:, g] for g, suffix in enumerate(self.suffixes)}
            found["margin"] = implicit[:, 0] - implicit[:, 1]
            found["accuracy"] = (found["margin"] > 0).to(logp.dtype)
        return found


class Unpaired:
    """Samples that are each called good or bad, [P, 1, T], with `desirable` [P, 1] from the column `label`."""

    kind = "unpaired"
    suffixes = ("",)

    def names(self, scored: Sequence[str]) -> set[str]:
        """The scores, the mask, the label and the reference point."""
        return {*scored, "mask", "desirable", "reference_point"}

    def usable(self, rows: Sequence[Row]) -> Sequence[Row]:
        """All of them."""
        return rows

    def pack(self, policy: Any, rows: Sequence[Row]) -> Rollout:
        """One completion a row."""
        rollout = policy.pack([row["prompt"] for row in rows], [[row["completion"]] for row in rows])
        labels = torch.tensor([[bool(row["label"])] for row in rows], device=rollout.mask.device)
        return rollout.update({"desirable": labels})

    def fields(self, rollout: Rollout, scores: Scores) -> dict[str, Any]:
        """The scores as they are, the mask and the label."""
        return {**scores, "mask": rollout.mask, "desirable": rollout.extras["desirable"]}

    def shared(
        self,
        wanted: Sequence[str],
        policy: Any,
        rows: Sequence[Row],
        mine: range,
        parts: Sequence[Rollout],
        score: Scorer,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The log-ratio of mismatched samples: the completion of the row before, after this row's prompt."""
        if "reference_point" not in wanted:
            return {}
        sums, start = [], mine.start
        for part in parts:
            here = range(start, start + len(part))
            start = here.stop
            other = policy.pack([rows[i]["prompt"] for i in here], [[rows[i - 1]["completion"]] for i in here])
            scores = score(other)
            ratio = (scores["logp"] - scores["logp_ref"]).where(other.mask, 0.0)
            sums.append(ratio.sum())
        total = torch.stack(sums).sum()
        return {"reference_point": (total, torch.tensor(len(mine), device=total.device))}

    def finish(self, means: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """The reference point: the mean where it is positive."""
        if "reference_point" not in means:
            return means
        mean = means["reference_point"].expand(count, 1, 1)
        point = kto_reference_point(mean, torch.zeros_like(mean), torch.ones_like(mean).bool())
        return {**means, "reference_point": point}

    def describe(self, rollout: Rollout, logp: Tensor, implicit: Tensor | None) -> Scores:
        """Length, log-probability, implicit reward, and as margin its size in the direction of the label."""
        found = {
            "length": rollout.mask.sum(-1).to(logp.dtype)[:, 0],
            "logp": logp.where(rollout.mask, 0.0).sum(-1)[:, 0],
        }
        if implicit is not None:
            found["reward"] = implicit[:, 0]
            found["margin"] = torch.where(rollout.extras["desirable"], implicit, -implicit)[:, 0]
            found["accuracy"] = (found["margin"] > 0).to(logp.dtype)
        return found


class Revised(Paired):
    """Both samples after the prompt and after prompts that hold one of them as a draft: [3 B, 2, T], row by row."""

    drafts = ("", "_given_chosen", "_given_rejected")

    def names(self, scored: Sequence[str]) -> set[str]:
        """The scores of either side after each prompt; masks of either side, which are the same after all."""
        sides = [name + suffix for name in scored for suffix in self.suffixes]
        return {side + draft for side in sides for draft in self.drafts} | {f"mask{suffix}" for suffix in self.suffixes}

    def usable(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Those with two different samples: of equal ones neither is preferred, and the pair would contradict itself."""
        count = data_length(rows)
        if count is None or isinstance(rows, _Kept):
            return rows  # rows without end are looked at when they are packed
        kept = [
            start + i
            for start in range(0, count, 1024)
            for i, row in enumerate(rows[start : start + 1024])
            if _differ(row)
        ]
        if len(kept) == count:
            return rows
        warnings.warn(
            f"{count - len(kept)} of {count} pairs are left out: their chosen and rejected samples are the same, so that "
            "neither is preferred.",
            UserWarning,
            stacklevel=3,
        )
        if not kept:
            raise DataError("data: no pair is left: in all of them chosen and rejected are the same.")
        return _Kept(rows, kept)

    def pack(self, policy: Any, rows: Sequence[Row]) -> Rollout:
        """A prompt without draft, one with the chosen sample in it and one with the rejected; then those of the next row."""
        for row in rows:
            if not _differ(row):
                raise DataError(
                    f"data: chosen and rejected are the same, so that neither is preferred: {row['chosen']!r:.80}."
                )
        times = range(len(self.drafts))
        return policy.pack(
            [row["prompt"] for row in rows for _ in times],
            [[row["chosen"], row["rejected"]] for row in rows for _ in times],
            [draft for row in rows for draft in (None, row["chosen"], row["rejected"])],
        )

    def fields(self, rollout: Rollout, scores: Scores) -> dict[str, Any]:
        """Every score, split by draft and side; the mask, split by side."""
        found = super().fields(_without_drafts(rollout), {})
        for d, draft in enumerate(self.drafts):
            for name, value in scores.items():
                found |= {
                    f"{name}{suffix}{draft}": value[d :: len(self.drafts), g] for g, suffix in enumerate(self.suffixes)
                }
        return found

    def describe(self, rollout: Rollout, logp: Tensor, implicit: Tensor | None) -> Scores:
        """What there is of pairs, after the prompt without draft; and the share of drafts that had to be cut."""
        cut = rollout.extras["draft_cut"].view(-1, len(self.drafts))[:, 1:].to(logp.dtype).mean(1)
        return {**super().describe(_without_drafts(rollout), logp[:: len(self.drafts)], implicit), "draft_cut": cut}


def _without_drafts(rollout: Rollout) -> Rollout:
    return rollout.select(slice(None, None, len(Revised.drafts)))


def _differ(row: Row) -> bool:
    return row["chosen"] != row["rejected"]


class _Kept(Sequence[Row]):
    """Some of the rows, which are not copied."""

    def __init__(self, rows: Sequence[Row], places: list[int]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.rows[place] for place in self.places[index]]
        return self.rows[self.places[index]]


# field that an objective names -> the form it wants; the first that fits
FORMS: dict[str, type[Any]] = {"logp_chosen_given_rejected": Revised, "logp_chosen": Paired, "desirable": Unpaired}


def form_of(objective: Callable[..., Any]) -> Form:
    """The form that an objective's fields ask for.

    Raises:
        BindingError: it is no preference loss.
    """
    named = signature(objective).fields
    for field, form in FORMS.items():
        if field in named:
            return form()
    raise BindingError(
        f"objective {label(objective)} is no preference loss: it names {', '.join(named) or 'no field'}, and a preference "
        f"loss names one of {', '.join(FORMS)}. Choose dpo, simpo, ipo, kto, orpo, cpo, ... or `loop: online`."
    )


def check_form(objective: Callable[..., Any], form: Form, scored: Sequence[str], columns: Sequence[str]) -> None:
    """Check that an objective will find every field it names.

    Raises:
        BindingError: naming the field and those there are.
    """
    check(objective, form.names(scored) | set(columns))
