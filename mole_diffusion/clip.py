"""One differentiable CLIP for guidance and for scores: open_clip models, pretrained or from a local folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.clip_names import WEIGHTS, open_clip_name
from mole_diffusion.errors import MoLEError
from mole_diffusion.extras import needs
from mole_diffusion.loading import LoadingError, loading

with needs("train", "CLIP"):
    import open_clip


class DifferentiableCLIP(nn.Module):
    """A frozen open_clip model whose image features have gradients with respect to the picture.

    Its preprocessing is open_clip's for inference, done on float tensors: shorter side resized with an antialiased
    bicubic filter, centre cut, mean and standard deviation of the model. It equals open_clip's own, which goes through
    8-bit PIL pictures, to float rounding where a picture has the model's size already, and to 2/255 of the pixel range
    where it is resized, since PIL rounds to 8 bits after each of its two passes. Pictures smaller than the model's
    size are enlarged in the same way.

    `.to(device, dtype)` moves it like any module.

    Args:
        model_name_or_dir: A folder with `open_clip_config.json` and `open_clip_model.safetensors` (with or without
            open_clip's prefix `local-dir:`), or the name of one of open_clip's architectures, such as "ViT-B-32".
        pretrained: For an architecture, which weights, such as "laion2b_s34b_b79k". A folder has its own. Weights that
            were trained with QuickGELU, as OpenAI's were, get it; of a file nobody knows, so give the architecture that
            has it in its name, "ViT-B-32-quickgelu", where it should.

    Raises:
        MoLEError: The folder lacks one of its files; `pretrained` is missing, or given for a folder; open_clip does
            not know the name; or the model wants another preprocessing than the one above.
        LoadingError: The weights cannot be downloaded or read, or do not fit the architecture.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model_name_or_dir: str | os.PathLike[str], pretrained: str | None = None) -> None:
        super().__init__()
        name = open_clip_name(os.fspath(model_name_or_dir), pretrained)
        try:
            model = open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=_quick_gelu(name, pretrained))
        except Exception as error:  # no network, weights of another architecture, damaged files
            what = name if pretrained is None else f"{name} with the weights {pretrained!r}"
            raise LoadingError(
                f"open_clip cannot load {what}: {error} Load it once with a network, or give a folder with "
                f"open_clip_config.json and {WEIGHTS} that fit each other."
            ) from error
        self.model: Any = model.eval().requires_grad_(False)
        with loading(f"the tokenizer of {name}"):
            self._tokenizer: Any = open_clip.get_tokenizer(name)
        settings = open_clip.get_model_preprocess_cfg(self.model)
        size = settings["size"]
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if height != width or settings["resize_mode"] != "shortest" or settings["interpolation"] != "bicubic":
            raise MoLEError(
                f"{name} is preprocessed with {settings}; DifferentiableCLIP knows square pictures, "
                'resize_mode "shortest" and interpolation "bicubic" only. Choose another CLIP.'
            )
        self.image_size = height
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings["std"]).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> DifferentiableCLIP:
        """Stays in evaluation mode, also where a model that it became a part of is trained: it measures."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], `(batch, 3, height, width)`, cut and scaled to `(batch, 3, image_size, image_size)`."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise MoLEError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; they must be floating point in [0, 1] "
                "of shape (batch, 3, height, width)."
            )
        images = images.to(self.mean.device).float()  # the resize filter has no half precision on CPUs
        height, width = images.shape[-2:]
        shorter = min(height, width)
        if shorter != self.image_size:
            new_height, new_width = (int(self.image_size * side / shorter) for side in (height, width))
            # In PIL's order, cut to [0, 1] after each pass as 8-bit pictures are: the filter overshoots at edges.
            for size in ((height, new_width), (new_height, new_width)):
                images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (round((side - self.image_size) / 2) for side in images.shape[-2:])
        images = images[..., top : top + self.image_size, left : left + self.image_size]
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-length features `(batch, width)` of pictures in [0, 1], `(batch, 3, height, width)`; gradients flow."""
        return self.model.encode_image(self.preprocess(images), normalize=True)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-length features `(len(texts), width)`; text has no gradient to give.

        Warns of texts that are longer than the model reads: what comes after that plays no part.
        """
        if isinstance(texts, str):
            raise TypeError(f"`texts` must be a list of strings, got the string {texts!r}.")
        tokens = self._tokenizer(list(texts))
        length = tokens.shape[1]
        # With room for one token more, a text that was cut has a token of its own where the cut one has its end.
        cut = (self._tokenizer(list(texts), length + 1)[:, :length] != tokens).any(dim=1)
        if cut.any():
            first = texts[int(cut.nonzero()[0])]
            warnings.warn(
                f"{int(cut.sum())} of {len(texts)} prompts are longer than the {length} tokens that this CLIP reads, "
                f"and are truncated; their ends play no part. The first: {first[:200]!r}. Shorten them.",
                stacklevel=1,
            )
        return self.model.encode_text(tokens.to(self.mean.device), normalize=True)


def _quick_gelu(name: str, pretrained: str | None) -> bool:
    """Whether weights by name were trained with QuickGELU; a model with another activation scores wrongly.

    Raises:
        MoLEError: The architecture has it, and the weights were trained without.
    """
    if pretrained is None or Path(pretrained).is_file():
        return False
    trained_with = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    if not trained_with and (open_clip.get_model_config(name) or {}).get("quick_gelu", False):
        raise MoLEError(
            f"{name} has QuickGELU, and the weights {pretrained!r} were trained without. "
            f"Choose {name.removesuffix('-quickgelu')}."
        )
    return trained_with
