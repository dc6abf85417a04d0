"""What turns pictures into features: CLIP, or a vision backbone of transformers such as DINOv2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..clip import DifferentiableCLIP
from ..drawing.opening import find_clip
from ..loading import LoadingError, loading


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
        MoLEError: It is none of these.
        OSError: Its weights cannot be loaded, say without a network.
    """
    return DifferentiableCLIP(*find_clip(source))


class VisionBackbone(nn.Module):
    """A frozen vision model of transformers, say DINOv2, with its own preprocessing.

    Its feature is the pooled output where the model has one (DINOv2: the normalised class token), else the first
    token of the last layer.

    Args:
        model: A vision model whose output has `last_hidden_state`, of `(batch, tokens, width)`.
        processor: The image processor of that model.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self._processor = processor

    def train(self, mode: bool = True) -> VisionBackbone:
        """Stays in evaluation mode, also where a model that it became a part of is trained: it measures."""
        return super().train(False)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **kwargs: Any) -> VisionBackbone:
        """From a folder or the Hub, such as "facebook/dinov2-base"; `kwargs` go to `AutoModel.from_pretrained`.

        Raises:
            LoadingError: It is not there, or cannot be read; weights are read from safetensors only. Or its files lack
                weights, which transformers would leave random.
        """
        from transformers import AutoImageProcessor, AutoModel

        given = {"use_safetensors": True, **kwargs, "output_loading_info": True}
        with loading(f"the vision model {source}"):
            model, read = AutoModel.from_pretrained(source, **given)
            processor = AutoImageProcessor.from_pretrained(source)
        part = "vision_model." if hasattr(model, "vision_model") else ""
        if lacking := sorted(key for key in read["missing_keys"] if key.startswith(part)):
            raise LoadingError(
                f"the files of the vision model {source} lack {len(lacking)} of its weights, {lacking[0]!r} among "
                "them, which would be random. Give another, or where only a pooler is lacking, add_pooling_layer=False."
            )
        return cls(getattr(model, "vision_model", model), processor)

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
