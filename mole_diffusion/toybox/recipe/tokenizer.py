"""A stock CLIP tokenizer with the toybox's words."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import CLIPTokenizer

from ..vocabulary import MAX_TOKENS, RARE_TOKENS, WORDS

_START, _END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """A stock CLIP tokenizer; words that are not in `WORDS` fall apart into letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = letters + [letter + "</w>" for letter in letters] + [_START, _END]
    tokenizer = CLIPTokenizer(
        vocab={entry: k for k, entry in enumerate(vocabulary)},
        merges=[],
        model_max_length=MAX_TOKENS,
        bos_token=_START,
        eos_token=_END,
        unk_token=_END,
        pad_token=_END,
    )
    words = [word for word in WORDS if len(word) > 1]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in RARE_TOKENS])
    # Its files tell how it was called last; so a build that goes on after its trainings writes what one in one go does.
    tokenizer("", padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return tokenizer
