"""`convert_lora`: a LoRA file in another program's layout, its numbers and alphas as they are."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.choices import LAYOUTS, Layout
from mole_diffusion.errors import MoLEError
from mole_diffusion.families.names import canonical_name
from mole_diffusion.files import atomic_folder, atomic_path
from mole_diffusion.lora.adapter import DIFFUSERS_METADATA, read_adapter_settings, strength
from mole_diffusion.lora.embeddings import is_embedding
from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.kinds import Change, dora
from mole_diffusion.lora.kronecker import Rows
from mole_diffusion.lora.layouts.diffusers import write as diffusers_key
from mole_diffusion.lora.layouts.kohya import write as kohya_key
from mole_diffusion.lora.layouts.peft import write as peft_key
from mole_diffusion.lora.layouts.slot import Slot
from mole_diffusion.lora.modules import ModuleIndex
from mole_diffusion.lora.pieces import Piece, find_pieces, fold, read_alpha, read_parts
from mole_diffusion.lora.save import in_files, stable_bytes
from mole_diffusion.lora.skeletons import candidates
from mole_diffusion.lora.sources import PEFT_CONFIG, PEFT_WEIGHTS, LoRAFile, read_source
from mole_diffusion.lora.verdict import fitting

_DOTTED = ("diffusers", "diffusers-old", "peft")


@dataclass(eq=False)
class _Module:
    """What goes into the new file for one module: tensors by part, the rank that alpha is divided by, and alpha."""

    tensors: dict[str, Tensor]
    r: int | None
    alpha: float | None
    magnitude: bool = False


def convert_lora(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Layout,
    components: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Writes a LoRA file in another layout. What it does stays the same, to the last bit of every factor.

    `"kohya"` takes every kind, with `alpha` beside each module, and keeps names that are the authors'. `"diffusers"`
    and `"peft"` have diffusers' names: fused modules are taken apart, LoHa and Tucker cores fold into plain factors,
    and alphas go into the header, or into `adapter_config.json`, where both programs read them.

    Args:
        source: The file, or a folder with one.
        out: A `.safetensors` file; for `"peft"` a folder that is not there yet.
        to: The layout.
        components: Models by name, to look up which module a name with underscores means. By default the published
            base model that the file fits, without its weights.

    Returns:
        `out`.

    Raises:
        LoRAError: The file cannot be read, has something that the layout has no place for, or fits no model that is
            known.
        MoLEError: `out` is no such path, or `source` itself, or `to` is no layout.
    """
    target = Path(out)
    if to not in LAYOUTS:
        raise MoLEError(f"`to` is {to!r}; choose one of {', '.join(LAYOUTS)}.")
    if to == "peft" and target.exists():
        raise MoLEError(f"{target} is there already; name a folder that is not, for the adapter and its config.")
    if to != "peft" and target.suffix != ".safetensors":
        raise MoLEError(f"{target} does not end in .safetensors, as a LoRA file does.")
    file = read_source(source)
    if target.exists() and target.samefile(file.source):
        raise MoLEError(f"{target} is the file that is converted, and would be lost. Give another name.")
    layout, pieces = find_pieces(file)
    if given_whole := [piece.keys[part] for piece in pieces for part in piece.whole]:
        raise refusal(
            file.source,
            "weights or biases that PEFT trained whole, which have no place in another layout",
            "Draw with it as it is, or merge it into its base with PEFT.",
            layout=layout,
            keys=given_whole,
        )
    bundled = {key: file.tensors[key].contiguous() for key in file.entries if is_embedding(key)}
    if to == "kohya":
        modules = _untouched(file, layout, pieces, components)
    elif bundled:
        raise refusal(
            file.source,
            f"an embedding inside, which has no place in {to}'s layout",
            "Convert it to `kohya`, or save the embedding by itself: `load_lora(...).embeddings` has it.",
            keys=list(bundled),
        )
    else:
        modules = _plain(file, layout, pieces, to, components)
    kept = {key: text for key, text in file.metadata.items() if key not in (DIFFUSERS_METADATA, PEFT_CONFIG)}
    if to == "peft":
        return _write_peft(file, target, modules, kept)
    tensors: dict[str, Tensor] = bundled
    several = any(component == "text_encoder_2" for component, _ in modules)
    for (component, name), module in modules.items():
        for part, tensor in module.tensors.items():
            slot = Slot(component, in_files(component, name), part)
            tensors[diffusers_key(slot) if to == "diffusers" else kohya_key(slot, several)] = tensor
    if to == "diffusers":
        kept |= _diffusers_config(modules)
    with atomic_path(target) as temporary:
        temporary.write_bytes(stable_bytes(tensors, kept))
    return target


def _untouched(
    file: LoRAFile, layout: str, pieces: list[Piece], components: Mapping[str, nn.Module] | None
) -> dict[tuple[str, str], _Module]:
    """Every piece as it is, with alpha beside it."""
    if of_parts := [p.key for p in pieces if layout == "xlabs" and re.fullmatch(r"single_blocks\.\d+\.qkv", p.module)]:
        raise refusal(
            file.source,
            "factors of a part of `linear1`, which has no name in kohya's layout",
            "Convert it to `diffusers`, which names queries, keys and values.",
            layout=layout,
            keys=of_parts,
        )
    settings = read_adapter_settings(file, layout)
    nameless = any(piece.component is None for piece in pieces)
    indices = _indices(file, "kohya", components) if nameless else {}
    found = {}
    for piece in pieces:
        own = read_alpha(file, layout, piece)
        alpha, scaling = strength(file, layout, piece, own, settings.get(piece.component, settings.get(None)))
        tensors = {part: file.tensors[key] for part, key in piece.keys.items() if part != "alpha"}
        if "up_bias" in tensors:
            beside = tensors.pop("up_bias").float() * scaling
            tensors["diff_b"] = beside + tensors["diff_b"] if "diff_b" in tensors else beside
        if "magnitude" in tensors:
            given = tensors.pop("magnitude")
            tensors["dora_scale"] = given.reshape(-1, *[1] * (len(piece.shapes.get("down", (0, 0))) - 1))
        if piece.r is None:  # alpha counts for nothing there in other programs
            for part in {"lokr_w1", "diff"} & set(tensors) if scaling != 1 else ():
                tensors[part] = tensors[part].float() * scaling
        elif own is not None and own == scaling * piece.r:
            tensors["alpha"] = file.tensors[piece.keys["alpha"]]
        elif alpha is not None:
            tensors["alpha"] = torch.tensor(scaling * piece.r)
        if piece.form and not piece.form.inputs:  # as LyCORIS names them, whose norms ComfyUI reads too
            names = {"diff": "w_norm", "diff_b": "b_norm"}
            tensors = {names.get(part, part): tensor for part, tensor in tensors.items()}
        component = piece.component or _targets(file, layout, piece, indices)[0]
        found[component, piece.module] = _Module({k: v.contiguous() for k, v in tensors.items()}, piece.r, alpha)
    return found


def _plain(
    file: LoRAFile, layout: str, pieces: list[Piece], to: Layout, components: Mapping[str, nn.Module] | None
) -> dict[tuple[str, str], _Module]:
    """Every piece as plain factors of a module of diffusers; for PEFT with DoRA's magnitudes of rows beside them."""
    settings = read_adapter_settings(file, layout)
    indices = _indices(file, layout, components)
    found: dict[tuple[str, str], _Module] = {}
    for piece in pieces:
        config = settings.get(piece.component, settings.get(None))
        alpha, scaling = strength(file, layout, piece, read_alpha(file, layout, piece), config)
        _refuse_kinds(file, layout, piece, to)
        parts = read_parts(file, layout, piece)
        change: Change | None = fold(piece, parts)
        if change is None or not isinstance(change, tuple):
            raise refusal(file.source, f"{piece.title} has no small rank", "Use `kohya`.", keys=[piece.key])
        down, up = change
        scaled = any(part.startswith("scale_of_") for part in piece.keys)
        if piece.kind and piece.kind.takes == {"down", "up"} and not scaled:  # untouched, whatever their number format
            down, up = (file.tensors[piece.keys[part]] for part in ("down", "up"))
        r = len(down)
        if alpha is not None and (piece.r != r or (config is not None and config.rslora)):
            alpha = scaling * r  # of which this is the scaling again
        component, targets = _targets(file, layout, piece, indices)
        inputs = tuple(down.shape[1:])
        if indices:  # as the module has its weight: kernels of a LoHa are hidden in its factors
            inputs = indices[component].shape(indices[component].find(piece.module))[1:]
        down, up = down.reshape(r, *inputs), up.reshape(len(up), r, *[1] * len(inputs[1:]))
        for name, rows in targets:
            tensors = {"down": down, "up": up if rows is None else torch.cat([up[part] for part in rows])}
            if piece.magnitude:
                given = parts[piece.magnitude].reshape(-1)
                given = given if rows is None else torch.cat([given[part] for part in rows])
                tensors["magnitude"] = given if down.ndim == 2 else given.reshape(1, -1, 1, 1)  # as PEFT has them
            tensors = {part: tensor.detach().cpu().clone().contiguous() for part, tensor in tensors.items()}
            found[component, name] = _Module(tensors, r, alpha, magnitude=bool(piece.magnitude))
    return found


def _refuse_kinds(file: LoRAFile, layout: str, piece: Piece, to: Layout) -> None:
    """Raises LoRAError for what the layout has no place for, or what the programs that read it pass over."""
    beyond = [part for part in ("up_bias", "diff_b") if part in piece.keys]
    rows = (
        piece.magnitude
        and piece.form
        and piece.form.inputs
        and (dora.axis(piece.magnitude, piece.shapes[piece.magnitude], piece.form.out, piece.form.inputs[0]) == 0)
    )
    if piece.magnitude and not (to == "peft" and rows):
        beyond.append(piece.magnitude)
    if beyond or piece.kind is None or piece.kind.name in ("LoKr", "full difference"):
        what = f"{piece.title} with {', '.join(beyond)}" if beyond else piece.title
        raise refusal(
            file.source,
            f"{what} has no place in {to}'s layout, or no program that reads it there",
            "Convert it to `kohya`, which takes every kind.",
            layout=layout,
            keys=[piece.key],
        )


def _indices(file: LoRAFile, layout: str, components: Mapping[str, nn.Module] | None) -> dict[str, ModuleIndex]:
    _, pieces = find_pieces(file)
    hidden = any(piece.form and piece.form.flat and piece.r is not None for piece in pieces)
    if components is None and layout in _DOTTED and all(piece.component for piece in pieces) and not hidden:
        return {}
    if components is None:
        fits = [verdict for verdict in fitting(file.source) if verdict.refusal is None]
        if not fits:
            raise refusal(
                file.source,
                "fits no published base model that is known here, so nobody can say what its names mean",
                "Give the base model it was trained for: `components=`, or --base on the command line.",
                layout=layout,
            )
        known = next(k for k in candidates(piece.module for piece in pieces) if k.title == fits[0].base)
        components = known.build()
    return {name: ModuleIndex(model) for name, model in components.items() if isinstance(model, nn.Module)}


def _targets(
    file: LoRAFile, layout: str, piece: Piece, indices: dict[str, ModuleIndex]
) -> tuple[str, list[tuple[str, Rows | None]]]:
    """The component and the modules, with rows, that a piece is for."""
    if not indices and piece.component:
        return piece.component, [(canonical_name(piece.module), None)]
    likely = [piece.component] if piece.component else []
    for component in sorted(indices, key=lambda name: name not in likely):
        targets = indices[component].find(piece.module)
        if targets and piece.form and indices[component].shape(targets)[0] == piece.out:
            return component, [(canonical_name(target.module), target.rows) for target in targets]
    raise refusal(
        file.source,
        f"module {piece.module} is in none of {', '.join(indices)}",
        "Give the base model it was trained for.",
        layout=layout,
        keys=[piece.key],
    )


def _config(modules: Mapping[str, _Module]) -> dict[str, Any]:
    """The settings of PEFT's `LoraConfig` that say ranks and alphas: the most frequent, and patterns for the others."""
    # Without an alpha the scaling is 1, which is alpha = r.
    alphas = {name: float(module.r or 1) if module.alpha is None else module.alpha for name, module in modules.items()}
    rank = Counter(module.r for module in modules.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "rank_pattern": {name: module.r for name, module in modules.items() if module.r != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _diffusers_config(modules: Mapping[tuple[str, str], _Module]) -> dict[str, str]:
    by_component: dict[str, dict[str, _Module]] = defaultdict(dict)
    for (component, name), module in modules.items():
        by_component[component][name] = module
    if all(module.alpha is None for module in modules.values()):
        return {}
    settings = {
        f"{component}.{setting}": value
        for component, found in by_component.items()
        for setting, value in _config(found).items()
    }
    return {DIFFUSERS_METADATA: json.dumps(settings, sort_keys=True)}


def _write_peft(
    file: LoRAFile, folder: Path, modules: Mapping[tuple[str, str], _Module], metadata: dict[str, str]
) -> Path:
    components = {component for component, _ in modules}
    if len(components) > 1:
        raise refusal(
            file.source,
            f"modules of {', '.join(sorted(components))}, and an adapter of PEFT is for one model",
            "Convert it to `diffusers`, which PEFT's factors are named after.",
        )
    magnitudes = {module.magnitude for module in modules.values()}
    if len(magnitudes) > 1:
        raise refusal(file.source, "DoRA at some modules only", "Convert it to `kohya`, which takes every kind.")
    tensors = {
        peft_key(Slot(None, name, part)): tensor
        for (_, name), module in modules.items()
        for part, tensor in module.tensors.items()
    }
    named = {name: module for (_, name), module in modules.items()}
    config = {"peft_type": "LORA", **_config(named), "use_dora": magnitudes == {True}, "bias": "none"}
    with atomic_folder(folder) as temporary:
        (temporary / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        (temporary / PEFT_WEIGHTS).write_bytes(stable_bytes(tensors, metadata))
    return folder
