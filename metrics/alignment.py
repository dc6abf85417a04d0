"""Alignment with the prompt and with a concept's pictures, as cosines of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from ..errors import MoLEError
from .averages import Averages, refuse_drawn_again
from .encoders import ImageEncoder, TextImageEncoder
from .features import TextCache, embed_images
from .pictures import Pictures, picture_tensors

Scale = Literal["cosine", "clipscore"]
SCALES: tuple[Scale, ...] = get_args(Scale)


def text_alignment(image_features: Tensor, text_features: Tensor, scale: Scale = "cosine") -> Tensor:
    """How well each picture fits its prompt.

    Args:
        image_features: `(pictures, width)`, of any length.
        text_features: `(pictures, width)`, the prompt of each.
        scale: "cosine", -1 to 1; or "clipscore", `2.5 · max(cosine, 0)`, which the numbers of "Mixture of LoRA
            Experts" seem to be (CLIPScore, https://arxiv.org/abs/2104.08718, up to its factor w).

    Returns:
        `(pictures,)`.

    Raises:
        MoLEError: The scale is unknown, there are not as many prompts as pictures, or features are of two encoders.
    """
    check_scale(scale)
    _check_features(image_features, text_features)
    if len(image_features) != len(text_features):
        raise MoLEError(
            f"there are {len(image_features)} pictures and {len(text_features)} prompts. Give one prompt per picture."
        )
    cosine = torch.nn.functional.cosine_similarity(image_features, text_features.to(image_features.device), dim=-1)
    return on_scale(cosine, scale)


def on_scale(cosine: Tensor, scale: Scale) -> Tensor:
    """Cosines as `text_alignment` gives them on a scale."""
    return cosine if scale == "cosine" else 2.5 * cosine.clamp(min=0)


def image_alignment(image_features: Tensor, reference_features: Tensor) -> Tensor:
    """How well each picture fits a concept: mean cosine to the concept's pictures.

    As in the evaluation of Custom Diffusion (https://arxiv.org/abs/2212.04488), which the paper follows.

    Args:
        image_features: `(pictures, width)`.
        reference_features: `(references, width)`.

    Returns:
        `(pictures,)`.

    Raises:
        MoLEError: There is no reference, or features are of two encoders.
    """
    _check_features(image_features, reference_features)
    if not len(reference_features):
        raise MoLEError("a concept has no pictures to compare with. Give at least one reference.")
    pictures = torch.nn.functional.normalize(image_features, dim=-1)
    references = torch.nn.functional.normalize(reference_features.to(image_features.device), dim=-1)
    return (pictures @ references.T).mean(dim=-1)


def _check_features(one: Tensor, other: Tensor) -> None:
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise MoLEError(
            "features must be (pictures, width), with the width of one encoder, and those given are "
            f"{tuple(one.shape)} and {tuple(other.shape)}. Make both with the same encoder; of one picture, as "
            "`features[None]`."
        )


class TextAlignment(Averages):
    """Mean CLIP cosine between pictures and their prompts. The result's name tells the scale.

    Args:
        clip: Any open_clip model as a `DifferentiableCLIP`.
        scale: As in `text_alignment`.
        batch_size: Pictures at a time.
        kwargs: What every `torchmetrics.Metric` takes.
    """

    higher_is_better = True

    def __init__(self, clip: TextImageEncoder, scale: Scale = "cosine", *, batch_size: int = 32, **kwargs: Any) -> None:
        check_scale(scale)
        super().__init__([text_name(scale)], **kwargs)
        self.clip, self.scale, self.batch_size = clip, scale, batch_size
        self._texts = TextCache(clip)

    def measure(self, images: Pictures, prompts: str | Sequence[str]) -> Tensor:
        """The number of each picture, `(pictures, 1)`; counts nothing.

        Raises:
            TypeError, MoLEError: As `update`.
        """
        if isinstance(prompts, str) and len(picture_tensors(images)) == 1:
            prompts = [prompts]
        texts = self._texts.embed(prompts)
        features = embed_images(self.clip, images, batch_size=self.batch_size)
        return text_alignment(features, texts, self.scale)[:, None]

    def update(self, images: Pictures, prompts: str | Sequence[str]) -> None:
        """Counts pictures with one prompt each; one picture may come with its prompt alone.

        Raises:
            TypeError, MoLEError: They are of another type or shape, not as many, or drawn again by `BootStrapper`.
        """
        refuse_drawn_again(self)
        self.add(self.measure(images, prompts))


class ImageAlignment(Averages):
    """Cosine between pictures and the reference pictures of each concept: by concept, and the mean over concepts.

    Args:
        encoder: CLIP, or a `VisionBackbone` such as DINOv2.
        references: Concept to its pictures.
        batch_size: Pictures at a time.
        kwargs: What every `torchmetrics.Metric` takes.

    Raises:
        MoLEError: There is no concept, or one has no pictures.
    """

    higher_is_better = True

    def __init__(
        self,
        encoder: ImageEncoder,
        references: Mapping[str, Sequence[Image.Image]],
        *,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        check_references(references)
        super().__init__(list(references), **kwargs)
        self.encoder, self.batch_size = encoder, batch_size
        self._references = references
        self._features: dict[str, Tensor] = {}

    def reference_features(self, concept: str) -> Tensor:
        """Features of a concept's pictures, computed once."""
        if concept not in self._features:
            self._features[concept] = embed_images(self.encoder, list(self._references[concept]))
        return self._features[concept]

    def measure(self, images: Pictures, concepts: Sequence[Sequence[str]] | None = None) -> Tensor:
        """The number of each picture and concept, `(pictures, concepts)`, NaN where a picture should not show it.

        Raises:
            TypeError, MoLEError: As `update`.
        """
        features = embed_images(self.encoder, images, batch_size=self.batch_size)
        wanted = asked_for(concepts, self.names, len(features))
        return wanted_only(torch.stack([self._align(features, name) for name in self.names], dim=1), wanted)

    def update(self, images: Pictures, concepts: Sequence[Sequence[str]] | None = None) -> None:
        """Counts pictures.

        Args:
            images: The pictures.
            concepts: Which concepts each picture should show; `None`: all of them.

        Raises:
            TypeError, MoLEError: They are of another type or shape, not as many, or a concept is unknown; or pictures
                with concepts of their own are drawn again by `BootStrapper`.
        """
        if concepts is not None:
            refuse_drawn_again(self)
        self.add(self.measure(images, concepts))

    def _align(self, features: Tensor, concept: str) -> Tensor:
        return image_alignment(features, self.reference_features(concept))

    def result(self) -> dict[str, float]:
        """Mean by concept, and under "mean" the mean over concepts."""
        return with_mean(self.means())


def text_name(scale: str) -> str:
    """The name of text alignment in every table."""
    return f"text alignment ({scale})"


def with_mean(by_concept: Mapping[str, float]) -> dict[str, Any]:
    """The numbers by concept, and under "mean" their mean."""
    return {**by_concept, "mean": sum(by_concept.values()) / len(by_concept)}


def check_scale(scale: str) -> None:
    """Raises MoLEError for a scale that is not known."""
    if scale not in SCALES:
        raise MoLEError(f"`scale` must be one of {list(SCALES)}, got {scale!r}.")


def check_references(references: Mapping[str, Sequence[Image.Image]]) -> None:
    """Raises MoLEError where there is no concept, or one has no pictures; TypeError for one picture without a list."""
    if not references:
        raise MoLEError("there is no concept: `references` is empty. Give the pictures of at least one.")
    for name, pictures in references.items():
        if isinstance(pictures, Image.Image):
            raise TypeError(f"the pictures of concept {name!r} must be a list, got one picture. Write [picture].")
        if not len(pictures):
            raise MoLEError(f"concept {name!r} has no reference pictures. Give at least one, or leave the concept out.")
        if name == "mean":
            raise MoLEError("a concept cannot be called 'mean', the name of the mean over concepts. Rename it.")


def asked_for(concepts: Sequence[Sequence[str]] | None, names: Sequence[str], count: int) -> Tensor:
    """`(count, len(names))` bool: which picture should show which concept.

    Raises:
        TypeError: An entry is one string.
        MoLEError: There are not as many entries as pictures, or an entry names no known concept.
    """
    if concepts is None:
        return torch.ones(count, len(names), dtype=torch.bool)
    if len(concepts) != count:
        raise MoLEError(f"there are {count} pictures and {len(concepts)} lists of concepts. Give one per picture.")
    asked = torch.zeros(count, len(names), dtype=torch.bool)
    for row, wanted in enumerate(concepts):
        if isinstance(wanted, str):
            raise TypeError(
                f"`concepts` must be a list of names for each picture, such as [{wanted!r}], got {wanted!r}."
            )
        for name in wanted:
            if name not in names:
                raise MoLEError(f"concept {name!r} of picture {row} has no references. Known are {', '.join(names)}.")
            asked[row, names.index(name)] = True
    return asked


def wanted_only(values: Tensor, wanted: Tensor) -> Tensor:
    """`values` with NaN where a picture was not asked for a concept."""
    return values.masked_fill(~wanted.to(values.device), float("nan"))
