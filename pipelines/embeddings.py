"""Words of its own that a LoRA brings along: diffusers' textual inversion, for as long as the LoRA is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import MoLEError
from ..lora import LoRA


def check_embeddings(pipe: Any, loras: Mapping[str, LoRA]) -> None:
    """Makes sure that `add_embeddings` will find nothing in its way.

    Raises:
        MoLEError: The pipeline knows no textual inversion, or a word is taken.
    """
    seen: dict[tuple[int, str], str] = {}
    for name, word, vectors, tokenizer, _ in _each(pipe, loras):
        if tokenizer is None or not hasattr(pipe, "load_textual_inversion"):
            raise MoLEError(
                f"LoRA {name!r} brings an embedding of {word!r}, and {type(pipe).__name__} has no textual inversion. "
                "Use a LoRA without, or a family with a CLIP."
            )
        for token in tokens_of(word, vectors):
            other = seen.setdefault((id(tokenizer), token), name)
            if other != name or token in tokenizer.get_vocab():
                owner = f"LoRA {other!r} brings one too" if other != name else "its tokenizer has that token already"
                raise MoLEError(
                    f"LoRA {name!r} brings an embedding of {word!r}, and {owner}. Give it another word: "
                    "`lora = load_lora(file, pipe.components)`, then "
                    f"`load_loras({{{name!r}: dataclasses.replace(lora, embeddings={{'<{name}>': "
                    f"lora.embeddings[{word!r}]}})}})`."
                )


def add_embeddings(pipe: Any, loras: Mapping[str, LoRA]) -> None:
    """Gives the text encoders the words, after `check_embeddings`."""
    for _, word, vectors, tokenizer, encoder in _each(pipe, loras):
        pipe.load_textual_inversion(vectors, token=word, tokenizer=tokenizer, text_encoder=encoder)


def remove_embeddings(pipe: Any, loras: Mapping[str, LoRA]) -> None:
    """Takes the words of LoRAs off again; the text encoders are as before."""
    for _, word, vectors, tokenizer, encoder in _each(pipe, loras):
        pipe.unload_textual_inversion(tokens_of(word, vectors), tokenizer=tokenizer, text_encoder=encoder)


def tokens_of(word: str, vectors: Tensor) -> list[str]:
    """The tokens that diffusers makes of a word with several vectors."""
    return [word, *(f"{word}_{index}" for index in range(1, len(vectors)))]


def _each(pipe: Any, loras: Mapping[str, LoRA]) -> Iterator[tuple[str, str, Tensor, Any, Any]]:
    """Name of the LoRA, word, vectors, tokenizer and text encoder."""
    for name, lora in loras.items():
        for word, by_component in lora.embeddings.items():
            for component, vectors in by_component.items():
                tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"), None)
                yield name, word, vectors, tokenizer, getattr(pipe, component)
