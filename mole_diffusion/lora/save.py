"""`save_lora`: writes factors to a safetensors file that other programs read with the same effect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError
from mole_diffusion.families.names import TEXT_MODEL
from mole_diffusion.files import atomic_path
from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.factors import LoRA, LoRAFactors
from mole_diffusion.lora.triggers import write_triggers

Factors = Mapping[str, Mapping[str, LoRAFactors]]


def save_lora(
    lora: LoRA | Factors,
    path: str | os.PathLike[str],
    *,
    layout: Literal["diffusers", "kohya"] = "diffusers",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a LoRA; the same factors and metadata give the same bytes.

    Args:
        lora: A LoRA, whose triggers go into the file too, or its factors: component to module name to factors.
        path: Ends in `.safetensors`. Folders are made; an existing file is replaced in one step.
        layout: `"diffusers"` (what `pipe.load_lora_weights` takes; it has no reliable place for an alpha per module,
            so the scaling goes into `up`) or `"kohya"` (with `alpha`, factors untouched).
        metadata: Text for the file's header.
        dtype: Of the factors in the file; half precision makes it half as large.

    Returns:
        The path.

    Raises:
        LoRAError: There are no factors, some are not plain, or the layout has no name for a component.
        MoLEError: The layout is unknown, the path has another suffix, or a factor overflows in `dtype`.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise MoLEError(f"`path` is {str(target)!r}; a LoRA is saved as safetensors, so let it end in .safetensors.")
    if layout not in _WRITERS:
        raise MoLEError(f"`layout` is {layout!r}; choose one of {', '.join(_WRITERS)}.")
    factors = lora.factors if isinstance(lora, LoRA) else lora
    beyond = [f"{c}.{name}" for c, modules in factors.items() for name, one in modules.items() if not one.plain]
    if beyond:
        raise refusal(
            str(target),
            f"{len(beyond)} modules with more than plain factors (DoRA, LoKr, biases, norms), {beyond[0]} first",
            "Keep the file it was read from, or convert that with `mole convert`.",
        )
    tensors = _WRITERS[layout](str(target), factors)
    if not tensors:
        raise refusal(str(target), "no factors to save", "Give at least one module's.", layout=layout)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    if overflowing := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise MoLEError(
            f"{len(overflowing)} tensors of the LoRA are not finite in {dtype}, {overflowing[0]} first. Save it in "
            "torch.float32 or torch.bfloat16."
        )
    triggers = write_triggers(lora.triggers) if isinstance(lora, LoRA) else {}
    data = stable_bytes(tensors, {**triggers, **(metadata or {})})
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)
    return target


def _diffusers(path: str, factors: Factors) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for component, modules in factors.items():
        for name, pair in modules.items():
            stem = f"{component}.{in_files(component, name)}"
            tensors[f"{stem}.lora_A.weight"] = _plain(pair.down)
            tensors[f"{stem}.lora_B.weight"] = _plain(pair.up * pair.scaling)
    return tensors


def _kohya(path: str, factors: Factors) -> dict[str, Tensor]:
    first = "te1" if "text_encoder_2" in factors else "te"
    owners = {"unet": "unet", "text_encoder": first, "text_encoder_2": "te2"}
    if unknown := sorted(set(factors) - set(owners)):
        raise refusal(
            path,
            f"no name for {', '.join(unknown)} in this layout",
            "Save it with layout='diffusers'.",
            layout="kohya",
            components=unknown,
        )
    tensors: dict[str, Tensor] = {}
    for component, modules in factors.items():
        for name, pair in modules.items():
            stem = f"lora_{owners[component]}_{in_files(component, name).replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"] = _plain(pair.down)
            tensors[f"{stem}.lora_up.weight"] = _plain(pair.up)
            tensors[f"{stem}.alpha"] = torch.tensor(pair.scaling * pair.r)
    return tensors


_WRITERS: dict[str, Callable[[str, Factors], dict[str, Tensor]]] = {"diffusers": _diffusers, "kohya": _kohya}


def in_files(component: str, module: str) -> str:
    """The module's name as files spell it: CLIP's encoder keeps the `text_model.` that transformers dropped."""
    is_clip = component.startswith("text_encoder") and module.startswith("encoder.layers.")
    return TEXT_MODEL + module if is_clip else module


def _plain(tensor: Tensor) -> Tensor:
    # A copy, as safetensors refuses tensors that share memory, which two modules' factors may.
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def stable_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a sorted header: the library orders it at random, and the hash identifies a LoRA."""
    data = safetensors.torch.save(dict(tensors), {"format": "pt", **metadata})
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
