"""Which characters of a text each of its tokens wrote, from the tokens that were sampled.

Encoding the text anew will not do: it can give other tokens than those that were sampled.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Any

Span = tuple[int, int]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Offsets:
    """Finds the characters of each token, for any tokenizer of transformers.

    A token's bytes are read off its name where names are bytes (byte-level BPE) or text with U+2581 for a space and
    <0xE2> for a byte (SentencePiece). That is checked against the whole text; where it does not make it, the text is
    decoded once for every number of tokens.

    Args:
        tokenizer: whose tokens they are.

    Example:
        >>> from guerdon.language.characters import character_tokenizer
        >>> offsets = Offsets(character_tokenizer("abc"))
        >>> offsets([2, 4, 1], "ac")  # the last is the end token
        [(0, 1), (1, 2), (2, 2)]
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
        self._pieces: dict[Callable[[str], bytes], dict[int, bytes]] = {_byte_level: {}, _sentence_piece: {}}

    def __call__(self, ids: Sequence[int], text: str) -> list[Span]:
        """The span (start, end) of each token.

        Args:
            ids: T tokens.
            text: what they are decoded to, without special tokens and without a clean-up of spaces.

        Returns:
            T spans in characters. A token that wrote part of a character spans all of it, so spans of neighbours may
            overlap; a special token has an empty span.
        """
        for read, known in self._pieces.items():
            found = _by_bytes([self._piece(index, read, known) for index in ids], text)
            if found is not None:
                return found
        return self._by_prefixes(ids, text)

    def _piece(self, index: int, read: Callable[[str], bytes], known: dict[int, bytes]) -> bytes:
        if index not in known:
            known[index] = b"" if index in self.special else read(self.tokenizer.convert_ids_to_tokens(index) or "")
        return known[index]

    def _by_prefixes(self, ids: Sequence[int], text: str) -> list[Span]:
        """Decode the first token, the first two, ...: what they share with the text is complete."""
        prefixes = [list(ids[: k + 1]) for k in range(len(ids))]
        found: list[Span] = []
        start = 0
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        for index, sofar in zip(ids, self.tokenizer.batch_decode(prefixes, **options), strict=True):
            if index in self.special:
                found.append((start, start))
                continue
            done = _shared(sofar, text, start)
            # what is there beyond stands for a character that the next token completes
            found.append((start, min(done + (len(sofar) > done), len(text))))
            start = done
        return found


def _by_bytes(pieces: Sequence[bytes], text: str) -> list[Span] | None:
    """Spans of pieces that make up the text; None if they make another."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    made, spans, done, open_ = [], [], 0, False
    for piece in pieces:
        part = decoder.decode(piece)
        made.append(part)
        # a character that this piece cannot go on with was cut off before it
        start = done + (open_ and bool(piece) and piece[0] & 0xC0 != 0x80)
        done += len(part)
        open_ = bool(decoder.getstate()[0])
        spans.append((start, done + open_) if piece else (done, done))
    whole = "".join([*made, decoder.decode(b"", final=True)])
    if whole == text:
        return spans
    if whole == f" {text}":  # SentencePiece opens with a space that is not written
        return [(max(start - 1, 0), max(end - 1, 0)) for start, end in spans]
    return None


def _shared(first: str, second: str, start: int) -> int:
    """Up to where two texts are the same, which they are up to `start`."""
    stop = min(len(first), len(second))
    while start < stop and first[start] == second[start]:
        start += 1
    return start


def _byte_level(name: str) -> bytes:
    try:
        return bytes(_BYTES[letter] for letter in name)
    except KeyError:  # a token that was added stands for itself
        return name.encode("utf-8", "replace")


def _sentence_piece(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ").encode("utf-8", "replace")


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level BPE: printable Latin-1 for itself, the others from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _byte_letters()
