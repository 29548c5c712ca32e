"""Scores of completions that are kept in a file, so that no model reads the same text twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guerdon.errors import RecipeError


class ScoreStore:
    """A number and a count for each (prompt, completion) under one model; several models share a file.

    Args:
        path: of the file, an SQLite database; made if it is not there.
        name: everything beside prompt and completion that decides a score.

    Raises:
        RecipeError: the file is there and is something else.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path, self.name = Path(path), name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._open()) as table, table:
                table.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, total REAL, tokens INTEGER)")
        except sqlite3.Error as error:
            raise RecipeError(f"cache: {path} cannot be used to keep scores: {error}. Name another file.") from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60.0)

    def _keys(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]]) -> list[bytes]:
        texts = [
            json.dumps([self.name, p, s], sort_keys=True) for p, g in zip(prompts, samples, strict=True) for s in g
        ]
        return [blake2b(text.encode(), digest_size=20).digest() for text in texts]

    def find(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor] | None:
        """Scores and counts [P, G] if all of them are kept; None otherwise."""
        keys = self._keys(prompts, samples)
        with closing(self._open()) as table:
            rows = [table.execute("SELECT total, tokens FROM scores WHERE key = ?", (key,)).fetchone() for key in keys]
        if not all(rows):
            return None
        shape = (len(samples), len(samples[0]))
        return (
            torch.tensor([total for total, _ in rows], dtype=torch.float64).view(shape),
            torch.tensor([tokens for _, tokens in rows], dtype=torch.int64).view(shape),
        )

    def add(self, prompts: Sequence[Any], samples: Sequence[Sequence[Any]], total: Tensor, tokens: Tensor) -> None:
        """Keep scores and counts [P, G]."""
        rows = zip(self._keys(prompts, samples), total.flatten().tolist(), tokens.flatten().tolist(), strict=True)
        with closing(self._open()) as table, table:
            table.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
