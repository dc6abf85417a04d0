"""Features of pictures and prompts by an encoder: computed in batches and once, and all of them finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ..errors import MoLEError
from ..reading import is_text
from .encoders import ImageEncoder, TextImageEncoder
from .pictures import Pictures, picture_tensors


class SharedEncoder:
    """An encoder for several metrics that look at the same pictures: each picture is encoded once.

    Args:
        encoder: The encoder that is asked about new pictures.
        remembers: How many pictures' features are kept; beyond that, all are forgotten.
    """

    def __init__(self, encoder: Any, remembers: int = 1024) -> None:
        self._encoder = encoder
        self._remembers = remembers
        self._features: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """The encoder's features of pictures, see `ImageEncoder`; it is asked only about new ones."""
        pixels = images.cpu().contiguous()
        keys = [sha256(image.numpy().tobytes() + str(tuple(image.shape)).encode()).hexdigest() for image in pixels]
        new = [index for index, key in enumerate(keys) if key not in self._features]
        if len(self._features) + len(new) > self._remembers:
            self._features.clear()
            new = list(range(len(keys)))
        if new:
            features = self._encoder.encode_image(images[new])
            self._features.update(zip((keys[index] for index in new), features, strict=True))
        return torch.stack([self._features[key] for key in keys])

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """The encoder's features of texts, see `TextImageEncoder`."""
        features: Tensor = self._encoder.encode_text(texts)
        return features


@torch.no_grad()
def embed_images(encoder: ImageEncoder, images: Pictures, *, batch_size: int = 32) -> Tensor:
    """Features `(pictures, width)` of pictures of any sizes, in batches of one size.

    Raises:
        TypeError, MoLEError: `images` are of another type, shape or range, there are none, or features are not finite.
    """
    if batch_size < 1:
        raise MoLEError(f"`batch_size` must be at least 1, got {batch_size}.")
    pictures = picture_tensors(images)
    by_size: dict[torch.Size, list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(picture.shape, []).append(index)
    features: dict[int, Tensor] = {}
    batches = [same[k : k + batch_size] for same in by_size.values() for k in range(0, len(same), batch_size)]
    for batch in batches:
        encoded = encoder.encode_image(torch.stack([pictures[index] for index in batch]))
        features.update(zip(batch, encoded.float(), strict=True))
    return _finite(torch.stack([features[index] for index in range(len(pictures))]), "pictures")


class TextCache:
    """Text features, each prompt read once.

    Args:
        encoder: Reads the prompts.
    """

    def __init__(self, encoder: TextImageEncoder) -> None:
        self._encoder = encoder
        self._features: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Features `(len(prompts), width)`.

        Raises:
            TypeError: `prompts` is no list, or holds something else than strings.
            MoLEError: One is no text: encoders would read it as if it were empty.
        """
        known = isinstance(prompts, Iterable) and not isinstance(prompts, str | Mapping)
        if not known or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"`prompts` must be a list of strings, one for each picture, got {prompts!r}.")
        for prompt in prompts:
            if not is_text(prompt):
                raise MoLEError(f"the prompt {prompt!r} has half a UTF-16 pair, which is no text. Take it out.")
        if not len(prompts):
            return torch.empty(0, 1)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        for k in range(0, len(new), batch_size):
            part = new[k : k + batch_size]
            features = _finite(self._encoder.encode_text(part).float(), "prompts")
            self._features.update(zip(part, features, strict=True))
        return torch.stack([self._features[prompt] for prompt in prompts])


def _finite(features: Tensor, what: str) -> Tensor:
    if not features.isfinite().all():
        raise MoLEError(
            f"the features of the {what} are not finite: the encoder overflows in its precision, or its weights are "
            "broken. Use it in float32."
        )
    return features
