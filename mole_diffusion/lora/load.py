"""`load_lora`: reads a LoRA file into factors for the modules of a model, or says why it cannot."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mole_diffusion.families import Original
from mole_diffusion.families.base import unwrapped
from mole_diffusion.lora.adapter import read_adapter_settings, strength
from mole_diffusion.lora.effect import READ_REMEDY, UNREAD, changes_nothing, never_read, overflows
from mole_diffusion.lora.embeddings import Embeddings, read_embeddings
from mole_diffusion.lora.errors import refusal
from mole_diffusion.lora.factors import LoRA, LoRAFactors
from mole_diffusion.lora.families import family_hint, text_width
from mole_diffusion.lora.kinds import KindError, dora
from mole_diffusion.lora.kronecker import Kronecker, Rows
from mole_diffusion.lora.modules import ModuleIndex
from mole_diffusion.lora.pieces import Piece, find_pieces, fold, read_alpha, read_parts
from mole_diffusion.lora.skeletons import by_authors, names_of
from mole_diffusion.lora.sources import LoRAFile, read_source
from mole_diffusion.lora.spoken import spoken
from mole_diffusion.lora.trainers import trainer_of
from mole_diffusion.lora.triggers import read_triggers


def load_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    components: Mapping[str, nn.Module],
    *,
    name: str | None = None,
) -> LoRA:
    """Reads a LoRA in any known layout for the given models.

    Args:
        source: A `.safetensors` file, a folder that holds one, or a state dict.
        components: Models by component name, e.g. `{"unet": pipe.unet, "text_encoder": pipe.text_encoder}`;
            values that are no models (as in `pipe.components`) are passed over. Nothing in them is changed.
        name: What to call it. Default: the file's name without suffix.

    Returns:
        Factors in fp32 on the CPU for every module the file has, in the order of the models' modules. What PEFT trained
        whole (`bias="all"`, `modules_to_save`) is in them as the difference to these models' own values.

    Raises:
        LoRAError: The file cannot be read, is not plain LoRA on the whole base, has a key that finds no place, a
            shape that does not fit, a value that is not finite, or would change nothing in the base's precision.
    """
    return _Reader(read_source(source), components).lora(name)


def fits(source: str | os.PathLike[str] | Mapping[str, Tensor], components: Mapping[str, nn.Module]) -> LoRA:
    """`load_lora` for models that may have no values, by names and sizes alone.

    What a file gives whole is then counted as if the base had zeros in its place.

    Raises:
        LoRAError: As `load_lora`.
    """
    return _Reader(read_source(source), components, sizes_only=True).lora(None)


# What a key calls a component, to the component it may be: `lora_unet_` is in front of transformers too, and FLUX.1's
# T5 is the third text encoder to kohya and the second to diffusers.
_OTHER_NAMES = {"unet": "transformer", "transformer": "unet", "text_encoder_3": "text_encoder_2"}


class _Reader:
    """One file on its way into one set of models; holds what every message names."""

    def __init__(self, file: LoRAFile, components: Mapping[str, nn.Module], sizes_only: bool = False) -> None:
        self.file = file
        self.sizes_only = sizes_only
        self.layout, self.pieces = find_pieces(file)
        self.models = {key: unwrapped(model) for key, model in components.items() if isinstance(model, nn.Module)}
        self.indices = {key: ModuleIndex(model) for key, model in self.models.items()}
        self.settings = read_adapter_settings(file, self.layout)

    def lora(self, name: str | None) -> LoRA:
        homes = self._homes()
        self._check_modules(homes)
        places: dict[tuple[str, str], Piece] = {}
        for piece, component in zip(self.pieces, homes, strict=True):
            targets = self.indices[component].find(piece.module)
            self._check_shapes(piece, component, targets)
            for target in targets:
                if (component, target.module) in places:
                    self._refuse(f"two pairs for {target.module}", "Keep one adapter per file.", [piece], component)
                places[component, target.module] = piece
        found: dict[str, dict[str, LoRAFactors]] = defaultdict(dict)
        for piece, component in zip(self.pieces, homes, strict=True):  # only now are values read
            found[component].update(self._factors(piece, component))
        factors = {
            component: {module: found[component][module] for module in index.shapes if module in found[component]}
            for component, index in self.indices.items()
            if component in found
        }
        if never_read(factors, self.models):
            self._refuse(f"{UNREAD}, so it would do nothing", READ_REMEDY, self.pieces, *factors)
        if changes_nothing(factors, self.models):
            self._refuse(
                "the products of its factors are zero, or too small for the base's precision, so it would change "
                "nothing",
                "Train it, use another checkpoint, or load the base in a higher precision.",
            )
        embeddings = self._embeddings()
        return LoRA(
            name or self.file.name,
            self.file.source,
            self.layout,
            self.file.sha256,
            factors,
            read_triggers(self.file.metadata) or tuple(embeddings),
            embeddings,
        )

    def _embeddings(self) -> Embeddings:
        """Those of words of its own, checked against the text encoders."""
        found = read_embeddings(self.file)
        for word, by_component in found.items():
            for component, vectors in by_component.items():
                words: Any = getattr(self.models.get(component), "get_input_embeddings", None)
                width = None if words is None else words().weight.shape[1]
                if vectors.shape[1] != width:
                    fits = f"{component}'s have {width}" if width else f"there is no {component}"
                    self._refuse(
                        f"its textual-inversion embedding of {word!r} has vectors of width {vectors.shape[1]}, "
                        f"and {fits}",
                        f"{self._hint()}Use a LoRA for this kind of model.",
                    )
        return found

    def _homes(self) -> list[str]:
        """The component of each piece; pieces that do not say all go to the one model that has modules for all."""
        stated = {piece.component for piece in self.pieces if piece.component is not None}
        known = {name: self._component(name) for name in stated}
        if missing := sorted(name for name in stated if known[name] not in self.indices):
            pieces = [piece for piece in self.pieces if piece.component in missing]
            self._refuse(
                f"{len(pieces)} modules for {', '.join(missing)}, but the model has only {', '.join(self.indices)}",
                f"{self._hint()}Use a LoRA for this kind of model.",
                pieces,
                *missing,
            )
        silent = [piece for piece in self.pieces if piece.component is None]
        home = self._common_home(silent) if silent else ""
        return [known[piece.component] if piece.component else home for piece in self.pieces]

    def _component(self, stated: str) -> str:
        other = _OTHER_NAMES.get(stated, stated)
        return other if stated not in self.indices and other in self.indices else stated

    def _common_home(self, pieces: list[Piece]) -> str:
        lost = {
            component: [piece for piece in pieces if not index.find(piece.module)]
            for component, index in self.indices.items()
        }
        fitting = [component for component, rest in lost.items() if not rest]
        if len(fitting) == 1:
            return fitting[0]
        prefix = "Prefix the keys with the component, e.g. `unet.`, and without `base_model.model.`."
        if fitting:
            self._refuse(f"keys without a component, which would fit {' and '.join(fitting)}", prefix, pieces, *fitting)
        if not lost:
            self._refuse("no model to place it in", "Pass `components={'unet': …}`.", pieces)
        nearest = min(lost, key=lambda component: len(lost[component]))
        self._refuse(
            f"{len(lost[nearest])} of {len(pieces)} modules find no place even in the nearest model"
            f"{_beside_factors(lost[nearest])}",
            f"{self._hint()}{prefix} Or use a LoRA for this kind of model.",
            lost[nearest],
            nearest,
        )

    def _check_modules(self, homes: list[str]) -> None:
        lost = [
            (piece, component)
            for piece, component in zip(self.pieces, homes, strict=True)
            if not self.indices[component].find(piece.module)
        ]
        others = [(piece, component) for piece, component in lost if self.indices[component].other_kind(piece.module)]
        if others:
            kinds = {str(self.indices[component].other_kind(piece.module)) for piece, component in others}
            self._refuse(
                f"{len(others)} of {len(self.pieces)} modules are {' and '.join(sorted(kinds))}, of which no change is "
                f"read{_beside_factors(piece for piece, _ in others)}",
                "Merge it into its base and draw with that, or train it without these.",
                [piece for piece, _ in others],
                *{component for _, component in others},
            )
        if lost:
            self._refuse(
                f"{len(lost)} of {len(self.pieces)} modules find no place in the model"
                f"{_beside_factors(piece for piece, _ in lost)}",
                f"{self._hint()}Use a LoRA for this kind of model.",
                [piece for piece, _ in lost],
                *{component for _, component in lost},
            )

    def _check_shapes(self, piece: Piece, component: str, targets: tuple[Original, ...]) -> None:
        index = self.indices[component]
        out, *rest = shape = index.shape(targets)
        grouped = [target.module for target in targets if target.module in index.grouped]
        if grouped:
            self._refuse(f"{grouped[0]} is a grouped convolution", "Train without it.", [piece], component)
        if any(index.shapes[target.module][1:] != tuple(rest) for target in targets) or not _fits(piece, out, rest):
            if piece.form and piece.kind and {"down", "up"} == set(piece.kind.takes):
                parts = f"<down> {piece.shapes['down']} and <up> {piece.shapes['up']} do"
                what = spoken(parts, piece.keys, self.layout)
            else:
                made = (piece.out, *piece.form.inputs) if piece.form else (piece.out,)
                beside = piece.beside_factors
                what = f"{beside}, shape {made}, do" if beside else f"{piece.title} of {made} does"
            names = " and ".join(target.module for target in targets)
            self._refuse(
                f"{what} not fit {names} with weight {shape}",
                f"{self._hint()}Use a LoRA for this kind of model.",
                [piece],
                component,
            )
        if piece.magnitude:
            if not rest:
                self._refuse(
                    f"magnitudes at {targets[0].module}, a layer of normalisation",
                    "DoRA has a meaning at Linear and Conv2d modules only; train it on these.",
                    [piece],
                    component,
                )
            try:
                by_input = dora.axis(piece.magnitude, piece.shapes[piece.magnitude], out, rest[0]) == 1
            except KindError as error:
                self._refuse(f"{error} of {targets[0].module}", error.remedy, [piece], component)
            if by_input and len(targets) > 1:
                parts = ", ".join(target.module for target in targets)
                self._refuse(
                    f"magnitudes of input channels of a module that lies in parts here, {parts}: each would need the "
                    "weights of all",
                    "Merge it into a checkpoint, or train with magnitudes of rows (wd_on_out=True in LyCORIS).",
                    [piece],
                    component,
                )

    def _factors(self, piece: Piece, component: str) -> dict[str, LoRAFactors]:
        """The piece's factors by module, in the shapes of the modules."""
        index = self.indices[component]
        targets = index.find(piece.module)
        out, *rest = index.shape(targets)
        settings = self.settings.get(component, self.settings.get(piece.component, self.settings.get(None)))
        own = read_alpha(self.file, self.layout, piece)
        _, scaling = strength(self.file, self.layout, piece, own, settings)
        parts = read_parts(self.file, self.layout, piece)
        for part in piece.whole:
            parts[part] = parts[part] - self._base(piece, component, targets, part)
        whole = _whole(piece, parts, out, tuple(rest), scaling)
        found = {}
        for target in targets:
            factors = whole if target.rows is None else _rows(whole, target.rows)
            if factors is None:  # a factor of a fused module that is zero in this part of it
                continue
            if overflows(factors, self.models[component].get_submodule(target.module)):
                self._refuse(
                    "factors too large for the base's precision, so that pictures would be black",
                    "Training diverged, or alpha is wrong; use another checkpoint.",
                    [piece],
                    component,
                )
            found[target.module] = factors
        return found

    def _base(self, piece: Piece, component: str, targets: tuple[Original, ...], part: str) -> Tensor:
        """What the base has where a file says what is to be there, in fp32 on the CPU."""
        name = targets[0].module
        module: Any = self.models[component].get_submodule(name)
        values = module.weight if part == "diff" else module.bias
        what, setting = ("weight", "modules_to_save") if part == "diff" else ("bias", "`bias`")
        like = torch.zeros(piece.shapes[part])
        if values is None or len(targets) > 1 or targets[0].rows is not None:
            self._refuse(
                f"a whole {what} (PEFT's {setting}), for which {name} is not the one place",
                f"{self._hint()}Use a LoRA for this kind of model.",
                [piece],
                component,
            )
        if values.is_meta and self.sizes_only:
            return like
        if values.is_meta or not values.is_floating_point() or values.numel() != like.numel():
            self._refuse(
                f"a whole {what} (PEFT's {setting}), of which the difference to the base's counts, and "
                f"{component}.{name} has no plain values just now",
                "Load the base's weights before the LoRA, unquantised and before `enable_sequential_cpu_offload()`; or "
                "merge the adapter into its base with PEFT and draw with that.",
                [piece],
                component,
            )
        return values.detach().to(device="cpu", dtype=torch.float32).reshape(like.shape)

    def _hint(self) -> str:
        written = trainer_of(self.file.metadata, self.file.entries)
        by = f"It was written by {written}. " if written else ""
        file_width = text_width(
            (piece.module, piece.form.inputs[0]) for piece in self.pieces if piece.form and piece.form.inputs
        )
        model_width = text_width(width for index in self.indices.values() for width in index.widths())
        hint = family_hint(file_width, model_width)
        named = None if hint else names_of(piece.module for piece in self.pieces)
        if by_authors(piece.module for piece in self.pieces):
            hint += f"Its names are the original ones of the published checkpoint{f' of {named}' if named else ''}. "
        elif named:
            hint += f"Its names are those of {named}. "
        return by + hint

    def _refuse(self, problem: str, remedy: str, pieces: list[Piece] | None = None, *components: str) -> NoReturn:
        keys = [piece.key for piece in pieces or []]
        raise refusal(self.file.source, problem, remedy, layout=self.layout, components=components, keys=keys)


def _beside_factors(pieces: Iterable[Piece]) -> str:
    """What of some pieces is written out in full, for a message; empty where all are factors."""
    found = sorted({called for piece in pieces if (called := piece.beside_factors)})
    return f" (among them {' and '.join(found)})" if found else ""


def _fits(piece: Piece, out: int, rest: list[int]) -> bool:
    """Whether the change has the shape of a weight; a 1x1 convolution and a Linear hold the same numbers."""
    if piece.out != out:
        return False
    if piece.form is None:
        return True
    if not rest or not piece.form.inputs:  # of a layer of normalisation, which has no inputs to multiply
        return not rest and not piece.form.inputs
    if piece.form.flat:
        # A Kronecker product's second factor has the kernel inside, so the channels must divide among the first.
        channels = piece.shapes["lokr_w1"][1] if "lokr_w1" in piece.shapes else 1
        return piece.form.inputs == (math.prod(rest),) and rest[0] % channels == 0
    wanted = (rest[0], *(rest[1:] or (1, 1)))
    return (piece.form.inputs[0], *(*piece.form.inputs[1:], 1, 1)[:2]) == wanted


def _whole(piece: Piece, parts: dict[str, Tensor], out: int, rest: tuple[int, ...], scaling: float) -> LoRAFactors:
    """A piece's factors for what is one module in the file."""
    ones = [1] * len(rest[1:])
    down, up, kronecker, gain = torch.zeros(0, *(rest or (out,))), torch.zeros(out, 0, *ones), None, None
    change = fold(piece, parts)
    if isinstance(change, Kronecker):
        kronecker = change.shaped(rest)
    elif isinstance(change, Tensor):
        gain = scaling * change
    elif change is not None:
        down, up = change[0].reshape(-1, *rest), change[1].reshape(out, -1, *ones)
    bias = scaling * parts["up_bias"] if "up_bias" in parts else None
    if "diff_b" in parts:
        bias = parts["diff_b"] if bias is None else bias + parts["diff_b"]
    part = piece.magnitude
    magnitude = dora.magnitudes(part, parts[part], out, rest[0]) if part else None
    return LoRAFactors(down, up, scaling, kronecker, magnitude, bias, gain)


def _rows(whole: LoRAFactors, rows: Rows) -> LoRAFactors | None:
    """The part of the factors that makes some of the output rows; None where that is nothing."""

    def take(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[part] for part in rows])

    up = take(whole.up)
    used = up.flatten(2).any(dim=2).any(dim=0) if up.ndim > 2 else up.any(dim=0)  # others are other parts' ranks
    magnitude = whole.magnitude
    if magnitude is not None and magnitude.shape[1] == 1:
        magnitude = take(magnitude)
    bias = None if whole.bias is None else take(whole.bias)
    kronecker = None if whole.kronecker is None else whole.kronecker.take(rows)
    part = LoRAFactors(whole.down[used], up[:, used].contiguous(), whole.scaling, kronecker, magnitude, bias)
    return None if part.plain and not part.r else part
