"""Which characters of a text each of its tokens wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guerdon.errors import DataError


def token_offsets(tokenizer: Any, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """(start, end) of the characters of `text` that each token wrote, in whole or in part.

    Sampled tokens need not be those that the tokenizer would cut the text into, so nothing is encoded again: the text of
    the first n tokens is compared with the whole text. Tokens that write parts of one character all have that character.

    Args:
        tokenizer: one of transformers.
        ids: tokens of one completion.
        text: what they decode to, without special tokens and as they stand (no clean-up of spaces).

    Returns:
        One pair a token, in characters; start = end for a token that writes nothing, such as the end token.

    Raises:
        DataError: the text is not what the tokens write one after the other.
    """
    found: list[tuple[int, int]] = []
    # tokens that have written whole characters, where decoding starts, what it gives up to there, and the place reached
    done, window, before, place = 0, 0, "", 0
    last = 0
    for count in range(1, len(ids) + 1):
        piece = _decode(tokenizer, ids[window:count])[len(before) :]
        common = _common(piece, text, place)
        reached, whole = place + common, common == len(piece)
        # a piece that goes on otherwise than the text ends in the middle of a character, which is the next one
        found.append((last, reached if whole else min(reached + 1, len(text))))
        last = reached
        if whole and piece:
            # one piece stays in front of what is decoded: a decoder may treat the first token of a text differently
            window, done, place = done, count, reached
            before = _decode(tokenizer, ids[window:done])
    if last != len(text):
        raise DataError(
            f"language.offsets: the tokens of a completion write another text than it has, from character {last} on: "
            f"{text[last : last + 40]!r}. This tokenizer does not decode token by token, so spans cannot be placed."
        )
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _common(piece: str, text: str, start: int) -> int:
    """How many characters a piece and the text from `start` on have in common."""
    for n, letter in enumerate(piece):
        if text[start + n : start + n + 1] != letter:
            return n
    return len(piece)
