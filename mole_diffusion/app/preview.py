"""The picture in the middle of drawing, as often as it takes little from drawing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..drawing.settings import PictureSettings

if TYPE_CHECKING:
    from PIL import Image

EVERY = 0.7  # seconds from one to the next, at least
SHARE = 0.1  # of the time, at most: an autoencoder on a CPU takes longer than a step of the denoiser


class Previews:
    """Previews of one picture after another.

    Attributes:
        shown: When the last one was ready; it begins with one.
        took: How long that took, in seconds.
    """

    def __init__(self) -> None:
        self.shown = float("-inf")
        self.took = 0.0

    def next(self, pipe: Any, latents: Tensor, settings: PictureSettings) -> Image.Image | None:
        """A preview, if it is time for one.

        Args:
            pipe, latents, settings: What `preview` takes.
        """
        now = time.monotonic()
        if now - self.shown < max(EVERY, self.took / SHARE):
            return None
        found = preview(pipe, latents, settings)
        self.shown = time.monotonic()
        self.took = self.shown - now
        return found


@torch.no_grad()
def preview(pipe: Any, latents: Tensor, settings: PictureSettings) -> Image.Image | None:
    """What latents look like; `None` where they are beyond the numbers of the autoencoder's format.

    Args:
        pipe: The pipeline.
        latents: Between two steps of a call, as its denoiser is given them.
        settings: The settings of the picture, with both sides, or with none for the base's own.
    """
    grid = None
    if settings.height and settings.width:
        patch = 2 * pipe.vae_scale_factor
        grid = (settings.height // patch, settings.width // patch)
    decoded = pipe.family.picture(pipe, latents[:1], grid)
    if not decoded.isfinite().all():
        return None
    picture: Image.Image = pipe.image_processor.postprocess(decoded.float(), output_type="pil")[0]
    return picture
