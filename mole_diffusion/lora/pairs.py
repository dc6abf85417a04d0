"""From keys to pairs: down, up and alpha of a place brought together, their numbers checked. Needs no model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.layouts import LAYOUTS, place_keys
from mole_diffusion.lora.sources import LoRAFile
from mole_diffusion.lora.unsupported import find_unsupported


@dataclass(frozen=True, eq=False)
class Pair:
    """Factors of one module as the file has them, in fp32 on the CPU; names not yet looked up in a model.

    Attributes:
        component: Model it belongs to; None where the keys do not say.
        module: Name as the file spells it.
        down: A, `(r, …)`.
        up: B, `(d_out, r, …)`.
        alpha: Of the file; None where it has none.
        key: The key of `down`, for messages.
    """

    component: str | None
    module: str
    down: Tensor
    up: Tensor
    alpha: float | None
    key: str

    @property
    def r(self) -> int:
        """Rank."""
        return self.down.shape[0]


def read_pairs(file: LoRAFile) -> tuple[str, list[Pair]]:
    """Layout of the file and its pairs, in the order of their keys.

    Raises:
        LoRAError: If a kind of adapter is not plain LoRA, a key has no place, a pair is incomplete or its ranks
            disagree, or a value is not finite.
    """
    if found := find_unsupported(file.tensors):
        kind, keys, remedy = found
        raise refusal(file.source, f"{kind} is not supported yet, {len(keys)} keys", remedy, keys=keys)
    layout, places, unplaced = place_keys(file.tensors)
    if layout is None:
        raise refusal(
            file.source,
            "no LoRA keys in it",
            f"Give a LoRA in one of the layouts {', '.join(LAYOUTS)}; a full model or an embedding is none.",
            keys=unplaced,
        )
    if unplaced:
        raise refusal(
            file.source,
            f"{len(unplaced)} keys do not belong to this layout",
            "Remove these keys, or save the LoRA again in one layout.",
            layout=layout,
            keys=unplaced,
        )
    parts: dict[tuple[str | None, str], dict[str, str]] = defaultdict(dict)
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
    pairs = [_pair(file, layout, *owner, keys) for owner, keys in parts.items()]
    return layout, pairs


def _pair(file: LoRAFile, layout: str, component: str | None, module: str, keys: dict[str, str]) -> Pair:
    if missing := [kind for kind in ("down", "up") if kind not in keys]:
        raise refusal(
            file.source,
            f"no {' and no '.join(missing)} factor for {module}, only",
            "The file is incomplete; download or save it again.",
            layout=layout,
            components=_said(component),
            keys=sorted(keys.values()),
        )
    tensors = {kind: _checked(file, layout, component, key) for kind, key in keys.items()}
    down, up, alpha = tensors["down"], tensors["up"], tensors.get("alpha")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[1] != down.shape[0] or up.shape[2:].numel() != 1:
        raise refusal(
            file.source,
            f"down {tuple(down.shape)} and up {tuple(up.shape)} are not factors of one module",
            "Expected (r, d_in) and (d_out, r), or (r, c_in, kh, kw) and (d_out, r, 1, 1); save it again.",
            layout=layout,
            components=_said(component),
            keys=[keys["down"], keys["up"]],
        )
    if alpha is not None and alpha.numel() != 1:
        raise refusal(
            file.source,
            f"alpha has shape {tuple(alpha.shape)}, expected one number",
            "Save the LoRA again.",
            layout=layout,
            components=_said(component),
            keys=[keys["alpha"]],
        )
    return Pair(component, module, down, up, None if alpha is None else float(alpha), keys["down"])


def _checked(file: LoRAFile, layout: str, component: str | None, key: str) -> Tensor:
    tensor = file.tensors[key].detach()
    problem = None
    if tensor.numel() == 0:
        problem = f"an empty tensor {tuple(tensor.shape)}"
    elif not tensor.is_floating_point() and not key.endswith(".alpha"):
        problem = f"values of type {tensor.dtype}, not floating point"
    else:
        # Cast first: float8 has no isfinite.
        tensor = tensor.to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        if not torch.isfinite(tensor).all():
            problem = "NaN or infinity"
    if problem:
        raise refusal(
            file.source,
            problem,
            "Training diverged, or the file is damaged or quantised; use another checkpoint.",
            layout=layout,
            components=_said(component),
            keys=[key],
        )
    return tensor


def _said(component: str | None) -> list[str]:
    return [component] if component else []
