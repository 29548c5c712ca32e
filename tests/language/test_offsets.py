"""Characters of sampled tokens: against the offsets of fast tokenizers, and for tokens that no encoding gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from guerdon.language.characters import character_tokenizer
from guerdon.language.offsets import Offsets, _byte_level
from guerdon.language.policy import LanguagePolicy
from tests.language.conftest import make_model

CORPUS = [
    "the red fox runs, the fox naps.",
    "na\u00efve caf\u00e9 \u2014 \u20ac5",
    "\u65e5\u672c\u8a9e\u306e\u6587",
    "fox \U0001f98a!",
] * 3
TEXTS = [*CORPUS[:4], "  two  spaces ", "\U0001f98a\U0001f600", "unseen \u0416", ""]


def byte_level(words: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE so small that many characters are split between tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: U+2581 for spaces, one before the text, bytes for what is not known."""
    known = {c for text in CORPUS[:2] for c in text if c.isascii() and c != " "}
    letters = [*sorted(known), "\u2581", "\u2581fox", "re"]
    names = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("r", "e")]
    core = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """Names that are neither bytes nor text, and a decoder that moves spaces: only decoding tells."""
    names = ["[UNK]", "[SEP]", "red", "fox", "##es", "run", "##s", ",", ".", "'", "t", "don"]
    core = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", unk_token="[UNK]")


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_they_are_those_of_a_fast_tokenizer(text):
    tokenizer = byte_level()
    found = tokenizer(text, return_offsets_mapping=True)
    assert decoded(tokenizer, found.input_ids) == text
    assert Offsets(tokenizer)(found.input_ids, text) == found.offset_mapping


@given(
    st.text(st.sampled_from("the fox \u00e9\u65e5\u672c\U0001f642,.\n"), max_size=20), st.randoms(use_true_random=False)
)
def test_any_cut_of_a_text_into_bytes(text, random):
    tokenizer = MADE.setdefault("cut", byte_level())
    known = MADE.setdefault("bytes", {_byte_level(name): index for name, index in tokenizer.get_vocab().items()})
    rest, pieces = text.encode(), []
    while rest:
        pieces.append(random.choice([piece for piece in known if rest.startswith(piece)]))
        rest = rest[len(pieces[-1]) :]
    owner = [n for n, letter in enumerate(text) for _ in letter.encode()]
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    wanted = [(owner[start], owner[end - 1] + 1) for start, end in itertools.pairwise(ends)]
    assert Offsets(tokenizer)([known[piece] for piece in pieces], text) == wanted


def test_a_character_in_several_tokens_belongs_to_all_of_them():
    tokenizer = byte_level(257)  # bytes alone
    assert Offsets(tokenizer)(tokenizer("a\u20acb").input_ids, "a\u20acb") == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_tokens_whatever_their_bytes(make, data):
    tokenizer = MADE.setdefault(make, make())
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    text = decoded(tokenizer, ids)
    offsets = Offsets(tokenizer)
    found = offsets(ids, text)
    assert len(found) == len(ids)
    ends = itertools.accumulate((end for _, end in found), max, initial=0)
    for index, (start, end), before in zip(ids, found, ends, strict=False):
        assert 0 <= start <= end <= len(text)
        assert index not in offsets.special or start == end
        assert start <= before, "a character is left out"
    if text:
        written = {place for start, end in found for place in range(start, end)}
        assert all(place in written for place in range(len(text)) if text[place] != " " and text[place] != "\ufffd")


MADE: dict = {}


@pytest.mark.parametrize("make", [byte_level, sentence_piece, word_piece])
def test_reading_bytes_and_decoding_agree(make):
    tokenizer = make()
    for text in ("red foxes, runs.", "don't", "fox"):
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        said = decoded(tokenizer, ids)
        offsets = Offsets(tokenizer)
        found = offsets(ids, said)
        assert found == offsets._by_prefixes(ids, said)
        assert found[-1] == (len(said), len(said))
        # what the tokens wrote, put together, is the text
        assert "".join(said[a:b] for a, b in found).replace(" ", "") == said.replace(" ", "")


def test_words_of_a_decoder_that_moves_spaces():
    tokenizer = word_piece()
    ids = tokenizer("red foxes, runs").input_ids
    assert decoded(tokenizer, ids) == "red foxes, runs"
    assert Offsets(tokenizer)(ids, "red foxes, runs") == [(0, 3), (3, 7), (7, 9), (9, 10), (10, 14), (14, 15)]


def test_a_rollout_has_them_where_they_are_asked_for():
    tokenizer = character_tokenizer("abcdefgh\u00e9\u00df\u65e5jk")
    policy = LanguagePolicy.load(make_model(), tokenizer=tokenizer, max_new_tokens=6, dtype="float64")
    assert "offsets" not in policy.sample(["ab", "c"], 3, [0, 1]).extras
    policy.keep_offsets = True
    rollout = policy.sample(["ab", "c"], 3, [0, 1]).validate()
    offsets = rollout.extras["offsets"]
    assert offsets.shape == (*rollout.mask.shape, 2)
    assert (offsets[~rollout.mask] == 0).all()
    for p, group in enumerate(rollout.samples):
        for g, text in enumerate(group):
            spans = offsets[p, g][rollout.mask[p, g]].tolist()
            assert [text[start:end] for start, end in spans if end > start] == list(text)
    given = policy.given(["ab"], [["c\u65e5"]])
    assert given.extras["offsets"][0, 0].tolist() == [[0, 1], [1, 2], [2, 2]]
    assert torch.equal(
        rollout.select([1]).trim().extras["offsets"][0], offsets[1, :, : int(rollout.mask[1].sum(-1).max())]
    )
