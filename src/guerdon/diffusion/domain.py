"""What the runner asks of the image domain: a policy and data rows, from the settings of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guerdon.diffusion.bases import BASES, base, bundled_models, untrained
from guerdon.diffusion.tasks import TASKS, find
from guerdon.errors import DataError, RecipeError, nearest
from guerdon.language.data import read_rows, require_columns
from guerdon.language.domain import Data, Part, with_share

_NOT_OF_A_POLICY = {"model", "lora"}


def policy_fields() -> tuple[str, ...]:
    """What a policy of this domain can give beside the fields of every rollout, known before one is loaded."""
    from guerdon.diffusion.policy import DenoisingPolicy

    return DenoisingPolicy.fields


def build_policy(settings: Any, *, base: Path | None = None, seed: int = 0) -> Any:
    """The policy of a recipe, without adapters.

    Args:
        settings: the recipe's `policy` section, of kind `diffusion` or `flow`.
        base: a saved model to start from in place of `settings.model` (after a warm start).
        seed: of the weights of an untrained bundled model. A trained base is the same for every seed, as a model from
            a hub is.

    Raises:
        RecipeError: the model is neither bundled nor a pipeline, or its scheduler is of the other kind.
    """
    from guerdon.diffusion.policy import DenoisingPolicy

    options = {name: value for name, value in vars(settings).items() if name not in _NOT_OF_A_POLICY}
    if base is not None:
        return DenoisingPolicy.load(str(base), **options)
    if settings.model in TASKS:
        return untrained(settings.model, seed=seed, **options)
    if settings.model in BASES:
        return trained_base(settings.model, **options)
    if not Path(settings.model).exists() and settings.model.partition("/")[0] in TASKS:
        known = bundled_models()
        raise RecipeError(
            f"policy.model: there is no bundled model {settings.model!r}.{nearest(settings.model, known)} "
            f"Bundled: {', '.join(known)}."
        )
    return DenoisingPolicy.load(settings.model, **options)


trained_base = base  # the parameter of `build_policy` has the same name


def add_adapters(policy: Any, settings: Any) -> None:
    """Give the policy the adapters that the recipe asks for."""
    if settings.lora is not None:
        policy.add_adapters(**vars(settings.lora))


def load_data(source: str, *, loop: str, evaluation: Any, seed: int) -> Data:
    """The rows of a recipe: a bundled task's, or a file's with its last rows held out.

    Args:
        source: a bundled task, or a path to rows with `prompt` and, for supervised training, `image`: the path of a
            picture, from the folder of the data file on.
        loop: `supervised` needs `prompt` and `image`, the others `prompt`.
        evaluation: the recipe's section; `data` names a file of its own, `size` how many rows are held out.
        seed: of a bundled task's rows.

    Raises:
        DataError: the file cannot be read or lacks a column.
    """
    wanted = ["prompt", "image"] if loop == "supervised" else ["prompt"]
    if source in TASKS:
        task = find(source)
        train = task.demonstrations(seed) if loop == "supervised" else task.prompt_rows()
        held_out: Sequence[Mapping[str, Any]] = task.held_out_rows(evaluation.size, images=loop == "supervised")
    else:
        if not Path(source.split(":")[0]).exists():
            raise DataError(
                f"data: {source!r} is neither a file nor a bundled image task.{nearest(source, TASKS)} "
                f"Bundled image tasks: {', '.join(TASKS)}."
            )
        rows = _rows(source, wanted)
        # the last rows are held out: known beforehand, and the same on every machine
        count = 0 if evaluation.data is not None else min(evaluation.size, len(rows) // 5)
        train, held_out = Part(rows, 0, len(rows) - count), Part(rows, len(rows) - count, len(rows))
    if evaluation.data is not None:
        rows = _rows(evaluation.data, wanted)
        held_out = Part(rows, 0, min(evaluation.size, len(rows)))
    return with_share(Data(train, held_out), evaluation)


def demonstrations(source: str, seed: int) -> Sequence[Mapping[str, Any]]:
    """Rows with `prompt` and `image` for a warm start.

    Raises:
        RecipeError: the data has none.
    """
    if source in TASKS:
        return find(source).demonstrations(seed)
    try:
        return _rows(source, ["prompt", "image"])
    except DataError as error:
        raise RecipeError(f"warm_start: the data must have images to learn from: {error}") from error


def _rows(source: str, wanted: list[str]) -> Sequence[Mapping[str, Any]]:
    rows = read_rows(source)
    require_columns(rows, wanted)
    return Pictures(rows, Path(source.split(":")[0]).parent) if "image" in wanted else rows


class Pictures(Sequence[Mapping[str, Any]]):
    """Rows whose `image`, a path, is read when the row is asked for.

    Args:
        rows: with `image`.
        folder: that relative paths start from.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
        self.rows, self.folder = rows, folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        return {**row, "image": read_picture(self.folder / row["image"], f"row {index}")}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(len(self)))


def read_picture(path: Path, where: str) -> Any:
    """A picture file as a tensor [3, H, W] in [0, 1].

    Raises:
        DataError: it is missing or is no picture.
    """
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{where}: the picture {path} cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
