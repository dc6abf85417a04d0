"""Ground truth: which objects are in a picture, where, and in whose look.

Every object is parametric, so the oracle simply tries them all: sixteen classes and three patterns at several sizes
and every second pixel. Sums over the inks' masks say how well each pair of colours fits, which makes the search over
all looks a convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mole_diffusion.errors import MoLEError

from .shapes import CLASSES, PATTERNS, ink_masks
from .subjects import Subject, subject
from .world import COLORS, GRID, OUTLINE_COLOR, Look

_SIZES = (16, 20, 24, 28, 32)  # the sizes of the world, and those between: a base may draw any
_STRIDE = 2
_REMEMBERS = 64  # pictures
_MAX_OVERLAP = 0.4  # of the smaller box; objects of the world do not overlap
_COLOR_NAMES = tuple(COLORS)
_PALETTE = torch.tensor(list(COLORS.values()))
_OUTLINE_RGB = torch.tensor(OUTLINE_COLOR)


@dataclass(frozen=True)
class Detection:
    """An object the oracle found.

    Attributes:
        class_name: What it is.
        look: The look that fits best.
        box: Left, top, right, bottom in pixels.
        error: Root mean square difference to the drawing, 0 to 1; lower is surer.
    """

    class_name: str
    look: Look
    box: tuple[int, int, int, int]
    error: float


@dataclass(frozen=True)
class Finding:
    """What the oracle says of one subject in one picture.

    Attributes:
        present: An object of the subject's class wears the subject's look. box: Where, or where the object of its
        class stands that wears another look; `None` if there is none. class_present: There is an object of the
        subject's class, in whatever look. wears: Name of the asked subject whose look that object wears, the subject
        itself included; `None` for a stranger's. leaked_to: Classes of other objects that wear this subject's look.
    """

    present: bool
    box: tuple[int, int, int, int] | None
    class_present: bool
    wears: str | None
    leaked_to: tuple[str, ...]


class Oracle:
    """Finds the toybox's objects and subjects in pictures of any size that fits the world's grid of 8 pixels.

    Args:
        max_error: An object counts when its root mean square difference to the drawing is below this. Drawn objects
            stay under 0.13 even through the autoencoder, and no other class fits them better than 0.16.
    """

    def __init__(self, max_error: float = 0.16) -> None:
        if not 0 < max_error < 1:
            raise MoLEError(f"max_error must lie between 0 and 1, got {max_error}.")
        self.max_error = max_error
        self._found: dict[bytes, list[Detection]] = {}  # of the latest pictures, which several metrics may look at

    @cached_property
    def _templates(self) -> dict[int, _Templates]:
        return {size: _Templates(size) for size in _SIZES}

    def __call__(self, image: Image.Image, names: Sequence[str | Subject]) -> dict[str, Finding]:
        """Which of these subjects are in the picture, where, and in whose look.

        Raises:
            MoLEError: The picture does not fit the grid, or a name is not a subject.
        """
        return judge(self.detect([image])[0], names)

    @torch.no_grad()
    def detect(self, images: Iterable[Image.Image]) -> list[list[Detection]]:
        """All objects in each picture, surest first.

        Raises:
            MoLEError: A picture does not fit the grid.
        """
        return [list(self._remembered(image)) for image in images]

    def _remembered(self, image: Image.Image) -> list[Detection]:
        pixels = _to_tensor(image)
        key = str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()
        if key not in self._found:
            if len(self._found) >= _REMEMBERS:
                self._found.clear()
            self._found[key] = self._detect(pixels)
        return self._found[key]

    def _detect(self, pixels: Tensor) -> list[Detection]:
        candidates = []
        for size, templates in self._templates.items():
            squares = templates.squared_errors(pixels)  # (classes, patterns, colours, colours, h, w)
            best, looks = squares.permute(0, 4, 5, 1, 2, 3).flatten(3).min(dim=3)  # (classes, h, w)
            for m, y, x in (best < self.max_error**2).nonzero().tolist():
                box = (x * _STRIDE, y * _STRIDE, x * _STRIDE + size, y * _STRIDE + size)
                pattern, pair = divmod(int(looks[m, y, x]), len(_COLOR_NAMES) ** 2)
                primary, secondary = divmod(pair, len(_COLOR_NAMES))
                look = Look(_COLOR_NAMES[primary], _COLOR_NAMES[secondary], PATTERNS[pattern])
                candidates.append(Detection(CLASSES[m], look, box, best[m, y, x].clamp_min(0).sqrt().item()))
        kept: list[Detection] = []
        for candidate in sorted(candidates, key=lambda detection: detection.error):
            if all(_overlap(candidate.box, other.box) <= _MAX_OVERLAP for other in kept):
                kept.append(candidate)
        return kept


class _Templates:
    """All drawings of one size, compared with a picture at every second pixel.

    A drawing is `T = w_0 c_0 + w_1 c_1 + w_2 c_2`: ink masks w, the outline's colour c_0 and two free colours. Its
    mean squared difference to the picture I under pixel weights V is `ΣV I² − 2 Σ_k c_k·(ΣV w_k I) + Σ_kl c_k·c_l (ΣV
    w_k w_l)`, so two convolutions give it for every look at once. V covers the pixels the object hides fully, one
    half of it on the outline, for that is where classes differ.
    """

    def __init__(self, size: int) -> None:
        masks = np.stack([[ink_masks(name, pattern, size) for pattern in PATTERNS] for name in CLASSES])
        inks = torch.from_numpy(masks)  # (classes, patterns, 3, size, size)
        opaque = (inks.sum(dim=2, keepdim=True) > 0.99).float()
        outline, fill = opaque * inks[:, :, :1], opaque * (1 - inks[:, :, :1])
        weights = outline / outline.sum((-2, -1), keepdim=True) + fill / fill.sum((-2, -1), keepdim=True)
        weights = weights / 2
        self._weights = weights[:, 0]  # opacity and outline do not depend on the pattern
        self._inks = (weights * inks).flatten(0, 2).unsqueeze(1)
        gram = torch.einsum("mpkyx,mplyx->mpkl", weights * inks, inks)
        self._gram = gram[..., None, None]  # (classes, patterns, 3, 3, 1, 1)

    def squared_errors(self, pixels: Tensor) -> Tensor:
        """Mean squared difference per class, pattern, primary and secondary colour and place.

        Args:
            pixels: Shape `(3, height, width)`.

        Returns:
            Shape `(classes, patterns, colours, colours, h, w)`; infinite where both colours are the same.
        """
        squares = F.conv2d(pixels.square().sum(0)[None, None], self._weights, stride=_STRIDE)[0]  # (classes, h, w)
        sums = F.conv2d(pixels.unsqueeze(1), self._inks, stride=_STRIDE)
        sums = sums.unflatten(1, (len(CLASSES), len(PATTERNS), 3))  # (rgb, classes, patterns, inks, h, w)
        dark, gram = _OUTLINE_RGB, self._gram
        fixed = squares[:, None] - 2 * torch.einsum("cmphw,c->mphw", sums[:, :, :, 0], dark)
        fixed = fixed + gram[:, :, 0, 0] * dark.square().sum()
        free = []
        for k in (1, 2):
            product = torch.einsum("cmphw,nc->mpnhw", sums[:, :, :, k], _PALETTE)
            with_outline = 2 * gram[:, :, 0, k, None] * (_PALETTE @ dark).view(-1, 1, 1)
            with_itself = gram[:, :, k, k, None] * _PALETTE.square().sum(1).view(-1, 1, 1)
            free.append(with_outline + with_itself - 2 * product)  # (classes, patterns, colours, h, w)
        mixed = 2 * gram[:, :, 1, 2, None, None] * (_PALETTE @ _PALETTE.T)[:, :, None, None]
        errors = fixed[:, :, None, None] + free[0][:, :, :, None] + free[1][:, :, None, :] + mixed
        same = torch.eye(len(_COLOR_NAMES), dtype=torch.bool)[:, :, None, None]
        return (errors / 3).masked_fill(same, float("inf"))


def judge(detections: Sequence[Detection], names: Sequence[str | Subject]) -> dict[str, Finding]:
    """Turns the objects found in one picture into a finding for each asked subject."""
    asked = [subject(name) for name in names]
    findings = {}
    for item in asked:
        own = [d for d in detections if d.class_name == item.class_name]
        right = [d for d in own if d.look == item.look]
        best = next(iter(right or own), None)
        wearer = None if best is None else next((s.name for s in asked if s.look == best.look), None)
        leaked = tuple(d.class_name for d in detections if d.class_name != item.class_name and d.look == item.look)
        findings[item.name] = Finding(bool(right), best.box if best else None, bool(own), wearer, leaked)
    return findings


def _to_tensor(image: Image.Image) -> Tensor:
    if any(side % GRID or side < max(_SIZES) for side in image.size):
        raise MoLEError(
            f"the oracle reads pictures whose sides are multiples of {GRID} pixels, at least {max(_SIZES)}, as the "
            f"toybox draws them; got {image.width}×{image.height}."
        )
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area as a part of the smaller box."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / min(areas)
