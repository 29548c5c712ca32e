"""Characters of tokens: against the bytes that the tokens stand for, however a text was cut into tokens."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from guerdon.errors import DataError
from guerdon.language.characters import character_tokenizer
from guerdon.language.offsets import token_offsets

END = "<eos>"
CORPUS = ["the quick brown fox é jumps over ünïcode 日本語 🙂 lazy dogs, and more words."] * 20


@functools.cache
def byte_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[bytes, int]]:
    """A byte-level BPE with all bytes, and the bytes of each of its tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=[END]))
    # the letters that stand for bytes: printable ones for themselves, the others from 256 on
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    letters = {chr(b): b for b in plain}
    letters |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in plain)}
    vocabulary = {
        bytes(letters[c] for c in word): number for word, number in core.get_vocab().items() if word not in (END,)
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
    return tokenizer, vocabulary


@functools.cache
def piece_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of SentencePiece: words begin with a mark that is a space, which a text loses at its start."""
    words = [f"<0x{b:02X}>" for b in range(256)] + ["▁the", "▁", "fox", "▁fox", "é", "▁日", "本", "s", ",", END]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


def overlaps(text: str, pieces: list[bytes]) -> list[tuple[int, int]]:
    """For each piece of the text's bytes the characters that it has bytes of."""
    owner = [n for n, letter in enumerate(text) for _ in letter.encode()]
    found, start = [], 0
    for piece in pieces:
        found.append((owner[start], owner[start + len(piece) - 1] + 1))
        start += len(piece)
    return found


@given(st.text(st.sampled_from("the fox é日本語🙂,.\n"), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_any_cut_of_a_text_into_byte_tokens(text, random):
    tokenizer, vocabulary = byte_tokenizer()
    rest, pieces = text.encode(), []
    while rest:
        fitting = [piece for piece in vocabulary if rest.startswith(piece)]
        pieces.append(random.choice(fitting))
        rest = rest[len(pieces[-1]) :]
    found = token_offsets(tokenizer, [vocabulary[piece] for piece in pieces], text)
    assert found == overlaps(text, pieces)


@given(st.lists(st.integers(0, 499), max_size=30))
def test_bytes_that_are_no_text(ids):
    tokenizer, vocabulary = byte_tokenizer()
    ids = [n for n in ids if n < len(vocabulary)]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    found = token_offsets(tokenizer, ids, text)
    assert len(found) == len(ids)
    edges = [0]
    for start, end in found:
        assert edges[-1] - 1 <= start <= end <= len(text)
        edges.append(end)
    assert not ids or edges[-1] == len(text)


def test_the_end_token_writes_nothing():
    tokenizer, vocabulary = byte_tokenizer()
    ids = [vocabulary[b"t"], vocabulary["é".encode()[:1]], vocabulary["é".encode()[1:]], tokenizer.eos_token_id]
    assert token_offsets(tokenizer, ids, "té") == [(0, 1), (1, 2), (1, 2), (2, 2)]
    assert token_offsets(tokenizer, [], "") == []


def test_sentence_pieces_with_bytes_and_a_lost_space():
    tokenizer = piece_tokenizer()
    words = ["▁the", "▁fox", "s", ",", "▁日", "<0xE6>", "<0x9C>", "<0xAC>", "é", END]
    ids = tokenizer.convert_tokens_to_ids(words)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "the foxs, 日本é"
    expected = [(0, 3), (3, 7), (7, 8), (8, 9), (9, 11), (11, 12), (11, 12), (11, 12), (12, 13), (13, 13)]
    assert token_offsets(tokenizer, ids, text) == expected


def test_a_text_that_the_tokens_do_not_write():
    tokenizer = character_tokenizer("abc")
    with pytest.raises(DataError, match="from character 1 on: 'c'"):
        token_offsets(tokenizer, tokenizer("ab").input_ids, "ac")
