"""A tokenizer with one word per character, for small tasks that need no download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from guerdon.errors import DataError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def character_tokenizer(
    alphabet: Iterable[str], pad: str = "<pad>", eos: str = "<eos>", bos: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers in which every character is a word.

    Args:
        alphabet: the characters. `pad`, `eos` and `bos` may be among them; the others come first, in this order.
        pad: fills up; a character or a name such as `<pad>`.
        eos: ends a sample.
        bos: opens every prompt if given.

    Returns:
        A `PreTrainedTokenizerFast` that pads on the left. It encodes nothing but the alphabet: another character is an
        error (the policy raises it as DataError).

    Raises:
        DataError: an entry is no single character, or occurs twice.

    Example:
        >>> tokenizer = character_tokenizer("0123456789=.$", pad=".", eos="$")
        >>> tokenizer("12=").input_ids, tokenizer.eos_token_id, len(tokenizer)
        ([1, 2, 10], 12, 13)
    """
    require("transformers", "language")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = list(alphabet)
    odd = [c for c in characters if len(c) != 1]
    twice = sorted({c for c in characters if characters.count(c) > 1})
    if odd or twice:
        raise DataError(
            f"language.characters: every entry must be one character and occur once; got {(odd or twice)!r}."
        )
    special = [name for name in (pad, eos, bos) if name is not None]
    words = [name for name in dict.fromkeys(special) if name not in characters] + characters
    ids = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
