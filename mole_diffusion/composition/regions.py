"""Which LoRA owns how much of which pixel."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mole_diffusion.composition.overlay import overlay
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import as_one_file, atomic_path, write_json
from mole_diffusion.pictures import read_painted
from mole_diffusion.reading import regular_text
from mole_diffusion.region_forms import Region, luminance, region_mask, transparency
from mole_diffusion.region_outlines import FORMS

FINE = 8  # regions are drawn on a canvas this many times finer than the grid, and averaged
LIST_NAME = "regions.json"
ROUNDING = 1e-4  # by which sums of float32 shares may exceed one


class RegionMap:
    """Shares of N LoRAs in every pixel of a picture; what is left of one belongs to the background.

    Args:
        values: float32 `(rows, N, height, width)`, each in [0, 1], summing over N to at most 1. `rows` is 1 for all
            pictures of a call, or their number. The grid may be of any size, whatever that of the picture.
        names: The N LoRAs.
        fixed: Those whose region was given, as against found by a method.

    Raises:
        MoLEError: Shape, type, range or names are not as said.
    """

    def __init__(self, values: Tensor, names: Sequence[str], fixed: Sequence[str] = ()) -> None:
        names, fixed = tuple(names), tuple(fixed)
        if len(set(names)) != len(names):
            raise MoLEError(f"a region map for {', '.join(names)} names a LoRA twice. Give each its one plane.")
        if values.ndim != 4 or values.shape[1] != len(names) or 0 in values.shape:
            raise MoLEError(
                f"a region map for {len(names)} LoRAs has values of shape {tuple(values.shape)}. "
                f"Give (rows, {len(names)}, height, width), each at least 1."
            )
        if values.dtype != torch.float32:
            raise MoLEError(f"a region map has values of type {values.dtype}. Give float32: `values.float()`.")
        if not values.isfinite().all() or values.min() < 0 or values.max() > 1 + ROUNDING:
            raise MoLEError(
                f"a region map has values from {values.min():g} to {values.max():g}. Give finite shares in [0, 1]."
            )
        if (total := values.sum(dim=1).max()) > 1 + ROUNDING:
            raise MoLEError(
                f"the shares of a region map sum to {total:g} at a pixel. Give at most 1, e.g. "
                "`values / values.sum(dim=1, keepdim=True).clamp(min=1)`."
            )
        if unknown := [name for name in fixed if name not in names]:
            raise MoLEError(f"`fixed` has {', '.join(unknown)}; this region map is of {', '.join(names)}.")
        self.values = values
        self.names = names
        self.fixed = tuple(name for name in names if name in fixed)
        self._resampled: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def __repr__(self) -> str:
        rows, _, height, width = self.values.shape
        return f"RegionMap({', '.join(self.names)}: {rows} x {height} x {width})"

    @property
    def rows(self) -> int:
        """1 for all pictures of a call, or their number."""
        return self.values.shape[0]

    def at(
        self, height: int, width: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The shares on another grid, by area.

        Args:
            height: Height of the grid.
            width: Width of the grid.
            device: Device of the result; by default that of the map.
            dtype: Number format of the result.

        Returns:
            `(rows, height * width, N)`, row after row of the grid. The same tensor at every call: do not change it.
        """
        device = self.values.device if device is None else torch.device(device)
        key = (height, width, device, dtype)
        if key not in self._resampled:
            # "area" also enlarges: each new pixel takes the mean of the old ones it touches.
            grid = F.interpolate(self.values, size=(height, width), mode="area")
            self._resampled[key] = grid.flatten(2).transpose(1, 2).contiguous().to(device=device, dtype=dtype)
        return self._resampled[key]

    @classmethod
    def from_regions(
        cls,
        regions: Mapping[str, Region | Sequence[Region]] | RegionMap,
        names: Sequence[str],
        *,
        image_size: tuple[int, int],
        grid: tuple[int, int],
        rows: int = 1,
        feather: int = 1,
    ) -> RegionMap:
        """Draws the regions a user gave.

        Where k LoRAs overlap, each gets 1/k (soft masks in proportion). A LoRA without a region gets nothing anywhere
        and is not `fixed`.

        Args:
            regions: LoRA to its region or a list of them, which are united: a box `(left, top, right, bottom)`, a
                polygon `[(x, y), …]`, or a painted mask (PIL image, array, tensor), see `region_forms`. Or the
                `RegionMap` of an earlier call, which is taken as it is, with all its LoRAs fixed.
            names: The LoRAs of the map, in order.
            image_size: Height and width of the picture in pixels.
            grid: Height and width of the map; the latent's size is a good choice.
            rows: Rows of the map; all alike, unless a `RegionMap` with as many was given.
            feather: By how many grid cells edges are softened, by a mean over `2 * feather + 1` cells; 0: hard edges.

        Raises:
            MoLEError: A name is unknown, a region cannot be read, or a region map has another number of rows.
        """
        names = tuple(names)
        if not isinstance(regions, RegionMap | Mapping):
            raise MoLEError(f"`regions` is a {type(regions).__name__}. Give {{name: region}}; a region is {FORMS}.")
        given = regions.names if isinstance(regions, RegionMap) else tuple(regions)
        if unknown := [str(name) for name in given if name not in names]:
            raise MoLEError(
                f"`regions` has {', '.join(unknown)}, which is none of the LoRAs in use: {', '.join(names)}. "
                "Name one of these, or load it first."
            )
        if isinstance(regions, RegionMap):
            return cls(_again(regions, names, grid, rows), names, given)
        if feather < 0 or int(feather) != feather:
            raise MoLEError(f"`feather` is {feather}. Give a whole number of grid cells: 0 (hard edges), 1, 2, …")
        canvas = (FINE * grid[0], FINE * grid[1])
        planes = torch.zeros(len(names), *canvas)
        for name, region in regions.items():
            planes[names.index(name)] = region_mask(region, name, image_size, canvas)
        # Shared on the fine canvas: two boxes that meet inside a cell split it, they do not overlap there.
        values = F.avg_pool2d(_shared(planes[None]), FINE)
        if feather:
            padded = F.pad(values, (feather,) * 4, mode="replicate")
            values = F.avg_pool2d(padded, 2 * feather + 1, stride=1)
        return cls(_shared(values).repeat(rows, 1, 1, 1), names, given)

    def images(self, size: tuple[int, int] | None = None) -> dict[str, list[Image.Image]]:
        """Each LoRA's shares as pictures in shades of grey (mode `"L"`, white is all), one for each row.

        Args:
            size: Height and width; default that of the map's grid.
        """
        if size is not None:
            values = F.interpolate(self.values, size=size, mode="area")
        else:
            values = self.values
        shades = (values * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return {name: [Image.fromarray(row[index]) for row in shades] for index, name in enumerate(self.names)}

    def overlay(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """The pictures with each LoRA's region tinted in a colour of its own and a legend of names below.

        Args:
            pictures: As many as the map has rows; any number where it has one. Small ones are enlarged.

        Raises:
            MoLEError: There is another number of pictures.
        """
        if self.rows not in (1, len(pictures)):
            raise MoLEError(
                f"{len(pictures)} pictures for a region map of {self.rows} rows. Give as many pictures as rows."
            )
        maps = self.values.expand(len(pictures), -1, -1, -1)
        return [overlay(picture, planes, self.names) for picture, planes in zip(pictures, maps, strict=True)]

    def save(self, folder: str | os.PathLike[str], pictures: Sequence[Image.Image] | None = None) -> Path:
        """Writes one PNG for each LoRA and row, a list of them (`regions.json`), and the overlays.

        Edit the PNGs in a paint program (white: the LoRA acts there) and `load` the folder again.

        Args:
            folder: Made where missing; files of the same names are replaced.
            pictures: What the overlays lie over, as in `overlay`; the masks get their size. Default: plain grey.

        Returns:
            The folder.
        """
        folder = Path(folder)
        size = (pictures[0].height, pictures[0].width) if pictures else None
        if pictures is None:
            height, width = self.values.shape[2:]
            pictures = [Image.new("RGB", (width, height), (128, 128, 128))] * self.rows
        files: dict[str, list[str]] = {}
        stems = _file_stems(self.names, taken=("overlay",))
        for (name, images), stem in zip(self.images(size).items(), stems, strict=True):
            files[name] = [f"{stem}-{row}.png" for row in range(len(images))]
            for file, image in zip(files[name], images, strict=True):
                _save_picture(image, folder / file)
        for row, picture in enumerate(self.overlay(pictures)):
            _save_picture(picture, folder / f"overlay-{row}.png")
        write_json(folder / LIST_NAME, {"files": files, "fixed": list(self.fixed)})
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RegionMap:
        """Reads what `save` wrote, edited or not. What was painted to sum to more than one is shared in proportion.

        Raises:
            MoLEError: The list or a picture is missing or cannot be read, or the pictures differ in size.
        """
        path = Path(folder) / LIST_NAME
        files, fixed = _read_list(path)
        masks = {name: [_read_mask(path.parent / file) for file in row] for name, row in files.items()}
        sizes = {mask.shape for row in masks.values() for mask in row}
        if len(sizes) > 1:
            shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise MoLEError(f"the masks in {path.parent} differ in size: {shown}. Scale them to one size.")
        values = torch.from_numpy(np.stack([np.stack(row) for row in masks.values()], axis=1))
        return cls(_shared(values), tuple(files), fixed)


def _shared(values: Tensor) -> Tensor:
    """Shares `(rows, N, …)` scaled down where they sum to more than one."""
    return values / values.sum(dim=1, keepdim=True).clamp(min=1)


def _again(regions: RegionMap, names: tuple[str, ...], grid: tuple[int, int], rows: int) -> Tensor:
    """The planes of another map for `names`, zero where it has none."""
    if regions.rows not in (1, rows):
        raise MoLEError(
            f"the region map given has {regions.rows} rows, but this call draws {rows}. Give one row, or as many."
        )
    old = F.interpolate(regions.values, size=grid, mode="area").expand(rows, -1, -1, -1)
    values = old.new_zeros(rows, len(names), *grid)
    values[:, [names.index(name) for name in regions.names]] = old
    return values


def _file_stems(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """A file name for each LoRA, without characters that some system forbids, and none twice."""
    stems: list[str] = []
    used = set(taken)
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name).strip("._")[:80] or "lora"
        stem, count = plain, 1
        while as_one_file(stem) in used:
            count += 1
            stem = f"{plain}_{count}"
        used.add(as_one_file(stem))
        stems.append(stem)
    return stems


def _save_picture(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        picture.save(temporary)


def _read_list(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    remedy = "Give a folder that `RegionMap.save` wrote."
    try:
        content: Any = json.loads(regular_text(path))
    except (ValueError, RecursionError) as error:
        raise MoLEError(f"{path} cannot be read ({type(error).__name__}). {remedy}") from error
    files = content.get("files") if isinstance(content, dict) else None
    fixed = content.get("fixed", []) if isinstance(content, dict) else None
    good = (
        isinstance(files, dict)
        and len(files) > 0
        and all(isinstance(row, list) and row and all(isinstance(file, str) for file in row) for row in files.values())
        and len({len(row) for row in files.values()}) == 1
        and isinstance(fixed, list)
        and all(isinstance(name, str) for name in fixed)
    )
    if not good:
        raise MoLEError(f"{path} does not list the same number of pictures for each LoRA. {remedy}")
    assert isinstance(files, dict)
    assert isinstance(fixed, list)
    for file in (file for row in files.values() for file in row):
        if Path(file).name != file:
            raise MoLEError(f"{path} names {file!r}, which is not a file beside it. {remedy}")
    return files, fixed


def _read_mask(path: Path) -> np.ndarray:
    """Luminance times alpha: what was rubbed out in a paint program is not white."""
    image = read_painted(path)
    return luminance(image) * transparency(image)
