"""From keys to pairs: down, up and alpha of a place brought together and checked. Needs no model.

Pairs are found in the header alone, so that a file that does not fit is refused before its tensors are read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.layouts import LAYOUTS, Kind, place_keys
from mole_diffusion.lora.sources import LoRAFile
from mole_diffusion.lora.unsupported import explain_unplaced, find_unsupported

Shape = tuple[int, ...]
# More rank than twice the larger side adds nothing, and a gate keeps r x r numbers of a module. Small modules get some
# more, since trainers use one rank for all.
SMALL_MODULE_RANK = 512


@dataclass(frozen=True)
class Pair:
    """Factors of one module as the header tells them; names not yet looked up in a model.

    Attributes:
        component: Model it belongs to; None where the keys do not say.
        module: Name as the file spells it.
        down: Shape of A, `(r, …)`.
        up: Shape of B, `(d_out, r, …)`.
        keys: Key of `"down"`, `"up"` and, where the file has one, `"alpha"`.
    """

    component: str | None
    module: str
    down: Shape
    up: Shape
    keys: Mapping[Kind, str]

    @property
    def r(self) -> int:
        """Rank."""
        return self.down[0]

    @property
    def key(self) -> str:
        """The key of `down`, for messages."""
        return self.keys["down"]


def find_pairs(file: LoRAFile) -> tuple[str, list[Pair]]:
    """Layout of the file and its pairs, in the order of their keys.

    Raises:
        LoRAError: If a kind of adapter is not plain LoRA, a key has no place, a pair is incomplete, its ranks disagree
            or are larger than any LoRA's, or it holds no floating-point numbers.
    """
    if found := find_unsupported(file.entries):
        kind, keys, remedy = found
        raise refusal(file.source, f"{kind} is not supported yet, {len(keys)} keys", remedy, keys=keys)
    layout, places, unplaced = place_keys(file.entries)
    if layout is None:
        raise refusal(
            file.source,
            "no LoRA keys in it",
            f"Give a LoRA in one of the layouts {', '.join(LAYOUTS)}; a full model or an embedding is none.",
            keys=unplaced,
        )
    if unplaced:
        problem, remedy = explain_unplaced(unplaced)
        raise refusal(file.source, f"{len(unplaced)} keys {problem}", remedy, layout=layout, keys=unplaced)
    parts: dict[tuple[str | None, str], dict[Kind, str]] = defaultdict(dict)
    for key, place in places.items():
        owner = parts[place.component, place.module]
        if place.kind in owner:
            raise refusal(
                file.source,
                f"two keys for the {place.kind} of one module",
                "Keep one adapter per file.",
                layout=layout,
                components=_said(place.component),
                keys=[owner[place.kind], key],
            )
        owner[place.kind] = key
    return layout, [_pair(file, layout, *owner, keys) for owner, keys in parts.items()]


def read_alpha(file: LoRAFile, layout: str, pair: Pair) -> float | None:
    """The pair's own alpha; None where the file has none.

    Raises:
        LoRAError: If it is not finite.
    """
    return float(_values(file, layout, pair, "alpha")) if "alpha" in pair.keys else None


def read_factors(file: LoRAFile, layout: str, pair: Pair) -> tuple[Tensor, Tensor]:
    """down and up as the file has them, in fp32 on the CPU.

    Raises:
        LoRAError: If a value is not finite.
    """
    return _values(file, layout, pair, "down"), _values(file, layout, pair, "up")


def _pair(file: LoRAFile, layout: str, component: str | None, module: str, keys: dict[Kind, str]) -> Pair:
    if missing := [kind for kind in ("down", "up") if kind not in keys]:
        raise refusal(
            file.source,
            f"no {' and no '.join(missing)} factor for {module}, only",
            "The file is incomplete; download or save it again.",
            layout=layout,
            components=_said(component),
            keys=sorted(keys.values()),
        )
    shapes = {kind: _checked_shape(file, layout, component, kind, key) for kind, key in keys.items()}
    down, up = shapes["down"], shapes["up"]
    if len(down) not in (2, 4) or len(up) not in (2, 4) or up[1] != down[0] or math.prod(up[2:]) != 1:
        raise refusal(
            file.source,
            f"down {down} and up {up} are not factors of one module",
            "Expected (r, d_in) and (d_out, r), or (r, c_in, kh, kw) and (d_out, r, 1, 1); save it again.",
            layout=layout,
            components=_said(component),
            keys=[keys["down"], keys["up"]],
        )
    if down[0] > max(SMALL_MODULE_RANK, 2 * max(math.prod(down[1:]), up[0])):
        raise refusal(
            file.source,
            f"rank {down[0]} for a module of {math.prod(down[1:])} by {up[0]} numbers, more than any LoRA has",
            "The file is damaged, or made to fill the memory; get another.",
            layout=layout,
            components=_said(component),
            keys=[keys["down"]],
        )
    if math.prod(shapes.get("alpha", ())) != 1:
        raise refusal(
            file.source,
            f"alpha has shape {shapes['alpha']}, expected one number",
            "Save the LoRA again.",
            layout=layout,
            components=_said(component),
            keys=[keys["alpha"]],
        )
    return Pair(component, module, down, up, keys)


def _checked_shape(file: LoRAFile, layout: str, component: str | None, kind: Kind, key: str) -> Shape:
    entry, problem = file.entries[key], None
    if math.prod(entry.shape) == 0:
        problem = f"an empty tensor {entry.shape}"
    elif entry.dtype.is_complex or entry.dtype == torch.bool:
        problem = f"values of type {entry.dtype}, not floating point"
    elif not entry.dtype.is_floating_point and kind != "alpha":
        problem = f"values of type {entry.dtype}, not floating point"
    if problem:
        remedy = "The file is damaged or quantised; save it in floating point, or use another."
        raise refusal(file.source, problem, remedy, layout=layout, components=_said(component), keys=[key])
    return entry.shape


def _values(file: LoRAFile, layout: str, pair: Pair, kind: Kind) -> Tensor:
    # Cast first: float8 has no isfinite.
    key = pair.keys[kind]
    tensor = file.tensors[key].detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    if torch.isfinite(tensor).all():
        return tensor
    raise refusal(
        file.source,
        "NaN or infinity",
        "Training diverged, or the file is damaged; use another checkpoint.",
        layout=layout,
        components=_said(pair.component),
        keys=[key],
    )


def _said(component: str | None) -> list[str]:
    return [component] if component else []
