"""What turns pictures into features: CLIP, or a vision backbone of transformers such as DINOv2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..clip import DifferentiableCLIP
from ..errors import MoLEError
from ..loading import loading
from .pictures import Pictures, by_picture


class ImageEncoder(Protocol):
    """Pictures to features; `DifferentiableCLIP` and `VisionBackbone` are such."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-length features `(batch, width)` of pictures in [0, 1], `(batch, 3, height, width)`."""
        ...


class TextImageEncoder(ImageEncoder, Protocol):
    """One that reads text into the same space."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-length features `(len(texts), width)`."""
        ...


def load_clip(source: str) -> DifferentiableCLIP:
    """A CLIP by one word.

    Args:
        source: "toybox", a folder in open_clip's format, or "architecture:weights", such as "ViT-B-32:openai".

    Raises:
        MoLEError: It is neither.
        OSError: Its weights cannot be loaded, say without a network.
    """
    if source == "toybox":
        from .. import toybox

        return DifferentiableCLIP(toybox.clip_dir())
    if Path(source).is_dir():
        return DifferentiableCLIP(source)
    architecture, separator, weights = source.partition(":")
    if not (architecture and separator and weights):
        raise MoLEError(
            f'{source!r} is no CLIP: give "toybox", a folder in the format of open_clip, or "architecture:weights" '
            'such as "ViT-B-32:openai".'
        )
    return DifferentiableCLIP(architecture, weights)


class VisionBackbone(nn.Module):
    """A frozen vision model of transformers, say DINOv2, with its own preprocessing.

    Its feature is the pooled output where the model has one (DINOv2: the normalised class token), else the first
    token of the last layer.

    Args:
        model: A vision model whose output has `last_hidden_state`, of `(batch, tokens, width)`.
        processor: Its image processor.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self._processor = processor

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **kwargs: Any) -> VisionBackbone:
        """From a folder or the Hub, such as "facebook/dinov2-base"; `kwargs` go to `AutoModel.from_pretrained`.

        Raises:
            LoadingError: It is not there, or cannot be read; weights are read from safetensors only.
        """
        from transformers import AutoImageProcessor, AutoModel

        with loading(f"the vision model {source}"):
            model = AutoModel.from_pretrained(source, **{"use_safetensors": True, **kwargs})
            return cls(getattr(model, "vision_model", model), AutoImageProcessor.from_pretrained(source))

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-length features `(batch, width)` of pictures in [0, 1], `(batch, 3, height, width)`."""
        parameter = next(self.model.parameters())
        eight_bit = [(image * 255).round().byte().cpu() for image in images]
        pixels = self._processor(images=eight_bit, return_tensors="pt")["pixel_values"]
        output = self.model(pixel_values=pixels.to(parameter.device, parameter.dtype))
        pooled = getattr(output, "pooler_output", None)
        features: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return nn.functional.normalize(features.float(), dim=-1)


class SharedEncoder:
    """An encoder for several metrics that look at the same pictures: each picture is encoded once.

    Args:
        encoder: Does the work.
        remembers: Features of so many pictures are kept, then all are let go.
    """

    def __init__(self, encoder: Any, remembers: int = 1024) -> None:
        self._encoder = encoder
        self._remembers = remembers
        self._features: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """As the encoder's."""
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
        """As the encoder's."""
        features: Tensor = self._encoder.encode_text(texts)
        return features


@torch.no_grad()
def embed_images(encoder: ImageEncoder, images: Pictures, *, batch_size: int = 32) -> Tensor:
    """Features `(pictures, width)` of pictures of any sizes, in batches of one size.

    Raises:
        TypeError, MoLEError: `images` are of another type, shape or range, there are none, or features are not finite.
    """
    pictures = by_picture(images)
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
            TypeError: `prompts` is a string or holds something else.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"`prompts` must be a list of strings, one for each picture, got {prompts!r}.")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        for k in range(0, len(new), batch_size):
            part = new[k : k + batch_size]
            features = _finite(self._encoder.encode_text(part).float(), "prompts")
            self._features.update(zip(part, features, strict=True))
        return torch.stack([self._features[prompt] for prompt in prompts])


def _finite(features: Tensor, of: str) -> Tensor:
    if not features.isfinite().all():
        raise MoLEError(
            f"the features of the {of} are not finite: the encoder overflows in its precision, or its weights are "
            "broken. Use it in float32."
        )
    return features
