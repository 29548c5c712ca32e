"""Which tokens a sample may be made of: a whitelist, and on demand a grammar that says which may come next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from guerdon.errors import DataError, RecipeError


@runtime_checkable
class Grammar(Protocol):
    """Texts of a kind, read from their beginning; see `guerdon.rewards.grammar` for one."""

    @property
    def start(self) -> Any:
        """The state of an empty text."""
        ...

    @property
    def needed(self) -> str:
        """Characters without which a text might not come to an end."""
        ...

    def advance(self, state: Any, text: str) -> Any:
        """The state after more text; None if no text of the kind begins so."""
        ...

    def complete(self, state: Any) -> bool:
        """Whether the text is of the kind."""
        ...

    def shortest(self, state: Any) -> int:
        """Characters that are needed at least to make it so."""
        ...


class Allowed:
    """The tokens that a policy may use; all others have probability 0, in sampling and in training alike.

    Args:
        tokenizer: its tokens are looked through once.
        ends: tokens that end a sample; they are allowed always, with a grammar where the text is complete.
        characters: of which the text of a token must be made.
        grammar: what the whole text must be; None = any text of these characters.

    Raises:
        RecipeError: no token is left, or one of a single character is missing that the grammar may need to come to an end.
    """

    def __init__(
        self, tokenizer: Any, ends: Sequence[int], characters: Iterable[str], grammar: Grammar | None = None
    ) -> None:
        wanted = set(characters)
        special = {*tokenizer.all_special_ids, *ends}
        ordinary = [token for token in range(len(tokenizer)) if token not in special]
        texts = tokenizer.batch_decode([[token] for token in ordinary], skip_special_tokens=False)
        kept = {token: text for token, text in zip(ordinary, texts, strict=True) if text and set(text) <= wanted}
        if not kept:
            raise RecipeError(f"language.allowed: no token is made of {''.join(sorted(wanted))!r} alone.")
        self.ends = tuple(sorted(ends))
        self.tokens = tuple(sorted([*kept, *self.ends]))
        self.texts = [kept.get(token) for token in self.tokens]  # None for an end
        self.grammar = grammar
        if grammar is not None and (missing := set(grammar.needed) - {t for t in kept.values() if len(t) == 1}):
            raise RecipeError(
                f"language.allowed: the grammar needs tokens of a single character, and of "
                f"{''.join(sorted(missing))!r} there is none."
            )
        self._place = {token: place for place, token in enumerate(self.tokens)}
        self._follows: dict[Any, tuple[list[Any], Tensor]] = {}

    def ids(self, device: torch.device) -> Tensor:
        """The allowed tokens [A], rising."""
        return torch.tensor(self.tokens, device=device)

    def places(self, ids: Tensor) -> Tensor:
        """The places of tokens among the allowed ones.

        Raises:
            DataError: one is not among them.
        """
        allowed = self.ids(ids.device)
        found = torch.searchsorted(allowed, ids).clamp(max=len(allowed) - 1)
        wrong = allowed[found] != ids
        if bool(wrong.any()):
            raise DataError(f"language.allowed: token {int(ids[wrong][0])} is none that a sample may be made of.")
        return found

    def masks(self, completion_ids: Tensor, room: int) -> Tensor | None:
        """What the grammar allowed where each token of some completions was chosen.

        Args:
            completion_ids: [N, T].
            room: most tokens of a sample.

        Returns:
            bool [N, T, A]; all True after the end of a sample; None without a grammar.
        """
        if self.grammar is None:
            return None
        rows = []
        for row in completion_ids.tolist():
            state, masks = self.grammar.start, []
            for t, token in enumerate(row):
                masks.append(self.mask(state, room - t))
                state = self.next(state, token)
            rows.append(torch.stack(masks))
        return torch.stack(rows).to(completion_ids.device)

    def next(self, state: Any, token: int) -> Any:
        """The grammar's state after one more token; None after an end."""
        place = self._place.get(token)
        return None if state is None or place is None else self._after(state)[0][place]

    def mask(self, state: Any, left: int) -> Tensor:
        """bool [A], which tokens may come next.

        Args:
            state: of the grammar; None = the text has ended.
            left: tokens that the sample may still have, this one included.
        """
        if state is None:
            return torch.ones(len(self.tokens), dtype=torch.bool)
        # a token for each missing character and one for the end must fit after this one
        return self._after(state)[1] <= left - 1

    def _after(self, state: Any) -> tuple[list[Any], Tensor]:
        """For every allowed token the state that it leads to, and how many tokens are then needed at least."""
        if state not in self._follows:
            grammar = self.grammar
            assert grammar is not None
            states = [None if text is None else grammar.advance(state, text) for text in self.texts]
            needed = [
                (0 if grammar.complete(state) else _NEVER)
                if text is None
                else (_NEVER if after is None else grammar.shortest(after) + 1)
                for text, after in zip(self.texts, states, strict=True)
            ]
            self._follows[state] = states, torch.tensor(needed)
        return self._follows[state]


_NEVER = 2**31
