"""From keys to pieces: all tensors of a file for one module, brought together and checked. Needs no model.

Pieces are found in the header alone, so that a file that does not fit is refused before its tensors are read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from mole_diffusion.lora.embeddings import find_embeddings, is_embedding
from mole_diffusion.lora.errors import LoRAError, refusal
from mole_diffusion.lora.kinds import Change, Form, Kind, KindError, Shape, dora, kind_of
from mole_diffusion.lora.layouts import LAYOUTS, read_layout
from mole_diffusion.lora.layouts.peft import is_whole
from mole_diffusion.lora.sources import LoRAFile
from mole_diffusion.lora.spoken import spoken
from mole_diffusion.lora.unsupported import explain_unplaced, find_unsupported

# More rank than twice the larger side adds nothing, and a gate keeps r x r numbers of a module. Small modules get some
# more, since trainers use one rank for all.
SMALL_MODULE_RANK = 512
# A key that says that the file has numbers with scales of their own, and nothing else.
SCALES_MARKER = "scaled_fp8"


@dataclass(frozen=True)
class Piece:
    """What a file has for one module, as the header tells it; names not yet looked up in a model.

    Attributes:
        component: Model it belongs to; None where the keys do not say.
        module: Name as the file spells it.
        kind: How its change of weight is written; None where only a bias changes.
        form: What the shapes tell of that change.
        keys: Key of every part.
        shapes: Shape of every part.
    """

    component: str | None
    module: str
    kind: Kind | None
    form: Form | None
    keys: Mapping[str, str]
    shapes: Mapping[str, Shape]

    @property
    def r(self) -> int | None:
        """The rank that alpha is divided by."""
        return self.form.r if self.form else None

    @property
    def out(self) -> int:
        """Rows of the weight, or of the bias where there is nothing else."""
        return self.form.out if self.form else math.prod(self.shapes["diff_b"])

    @property
    def magnitude(self) -> str | None:
        """The part that holds DoRA's magnitudes."""
        return next((part for part in dora.PARTS if part in self.keys), None)

    @property
    def whole(self) -> frozenset[str]:
        """Of `diff` and `diff_b`, those that say what the weight or bias is to be, and not by how much it changes."""
        return frozenset(part for part in ("diff", "diff_b") if part in self.keys and is_whole(self.keys[part]))

    @property
    def key(self) -> str:
        """One of its keys, for messages."""
        return next(self.keys[part] for part in ("down", *sorted(self.keys)) if part in self.keys and part != "alpha")

    @property
    def beside_factors(self) -> str | None:
        """What it is where it is no factors, as people call several of them; None of factors."""
        if "diff" in self.keys:
            of_norms = self.form and not self.form.inputs and not self.whole
            return _called("diff", self.keys) + (" of normalisation layers" if of_norms else "")
        return None if self.form else _called("diff_b", self.keys)

    @property
    def title(self) -> str:
        """Its kind, as people call it."""
        kind = self.kind.name if self.kind else "bias"
        if self.form and not self.form.inputs:
            kind = "normalisation"
        return f"{dora.NAME} over {kind}" if self.magnitude else kind


def find_pieces(file: LoRAFile) -> tuple[str, list[Piece]]:
    """Layout of the file and its pieces, in the order of their keys.

    Raises:
        LoRAError: A kind of adapter is not read, a key has no place, a piece is incomplete, its ranks disagree
            or are larger than any LoRA's, or it holds no floating-point numbers.
    """
    if found := find_unsupported(file.entries):
        kind, keys, remedy = found
        raise refusal(file.source, f"{kind} is not supported, {len(keys)} keys", remedy, keys=keys)
    find_embeddings(file)  # called for its checks alone
    factors = {k: entry for k, entry in file.entries.items() if k != SCALES_MARKER and not is_embedding(k)}
    layout, placed, unplaced = read_layout(factors)
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
    parts: dict[tuple[str | None, str], dict[str, str]] = defaultdict(dict)
    for slot, key, _ in placed:
        owner = parts[slot.component, slot.module]
        if slot.part in owner:
            raise refusal(
                file.source,
                spoken(f"two keys for the <{slot.part}> of one module", {"": key}, layout),
                "Keep one adapter per file.",
                layout=layout,
                components=_said(slot.component),
                keys=[owner[slot.part], key],
            )
        owner[slot.part] = key
    if SCALES_MARKER in file.entries and not any(slot.part.startswith("scale_of_") for slot, _, _ in placed):
        raise refusal(
            file.source,
            "its values are float8 with scales of their own, and the scales are missing",
            "Save it in floating point, such as bfloat16, with the program that wrote it.",
            layout=layout,
            keys=[SCALES_MARKER],
        )
    return layout, [_Checker(file, layout, *owner, keys).piece() for owner, keys in parts.items()]


def read_alpha(file: LoRAFile, layout: str, piece: Piece) -> float | None:
    """The piece's own alpha; None where the file has none.

    Raises:
        LoRAError: It is not finite.
    """
    return float(_values(file, layout, piece, "alpha")) if "alpha" in piece.keys else None


def read_parts(file: LoRAFile, layout: str, piece: Piece) -> dict[str, Tensor]:
    """Its tensors by part but for alpha, in fp32 on the CPU, with scales of their own worked in.

    Raises:
        LoRAError: A value is not finite.
    """
    parts = {part: _values(file, layout, piece, part) for part in piece.keys if part != "alpha"}
    for name in [part for part in parts if part.startswith("scale_of_")]:
        part, scale = name.removeprefix("scale_of_"), parts.pop(name)
        ones = [1] * (parts[part].ndim - 1)
        parts[part] = parts[part] * scale.reshape(-1, *ones)
    return parts


def fold(piece: Piece, parts: Mapping[str, Tensor]) -> Change | None:
    """The change of weight that the parts tell of, without alpha; None where only a bias changes."""
    return piece.kind.fold(parts) if piece.kind else None


def largest_rank(inputs: int, outputs: int) -> int:
    """More rank than this no LoRA has for a module of so many inputs (with its kernel) and outputs."""
    return max(SMALL_MODULE_RANK, 2 * max(inputs, outputs))


class _Checker:
    """One piece on its way through the checks; holds what every message names."""

    def __init__(self, file: LoRAFile, layout: str, component: str | None, module: str, keys: dict[str, str]) -> None:
        self.file, self.layout, self.component, self.module, self.keys = file, layout, component, module, keys

    def piece(self) -> Piece:
        shapes = {part: self._shape(part, key) for part, key in self.keys.items()}
        kind, form = self._form(shapes)
        piece = Piece(self.component, self.module, kind, form, self.keys, shapes)
        self._check_scales(shapes)
        if math.prod(shapes.get("alpha", ())) != 1:
            self._refuse(f"alpha has shape {shapes['alpha']}, expected one number", "Save the LoRA again.", "alpha")
        for part in ("up_bias", "diff_b"):
            if part in shapes and shapes[part] != (piece.out,):
                problem = f"the biases <{part}> have shape {shapes[part]}, expected ({piece.out},)"
                self._refuse(problem, "Save the LoRA again.", part)
        if form is None:
            return piece
        side = math.prod(form.inputs)
        if form.rows > largest_rank(side, form.out):
            self._refuse(
                f"rank {form.rows} for a module of {side} by {form.out} numbers, more than any LoRA has",
                "The file is damaged, or made to fill the memory; get another.",
                *self.keys,
            )
        return piece

    def _form(self, shapes: dict[str, Shape]) -> tuple[Kind | None, Form | None]:
        try:
            kind = kind_of(self.keys)
            if kind is None and "diff_b" not in self.keys:
                raise KindError("no <down> and no <up>", incomplete=True)
            if kind is None and (beside := sorted(set(self.keys) - {"diff_b", "alpha"})):
                raise KindError(f"a bias beside {', '.join(f'<{part}>' for part in beside)}")
            return kind, kind.form(shapes) if kind else None
        except KindError as error:
            if error.incomplete:
                problem = f"{error} for {self.module}, only"
                remedy = "The file is incomplete; download or save it again."
                raise self._refusal(problem, remedy, *self.keys) from None
            used = [part for part in self.keys if _is_factor(part)]
            called = f" ({_called('diff', self.keys)})" if "diff" in self.keys else ""
            raise self._refusal(f"{error}{called}", error.remedy, *used) from None

    def _check_scales(self, shapes: dict[str, Shape]) -> None:
        for name, shape in shapes.items():
            part = name.removeprefix("scale_of_")
            if part == name:
                continue
            if part not in shapes or math.prod(shape) not in (1, shapes[part][0]):
                self._refuse(f"scales {shape} of <{part}> {shapes.get(part, '')}", "Save the LoRA again.", name)

    def _shape(self, part: str, key: str) -> Shape:
        entry, problem = self.file.entries[key], None
        if math.prod(entry.shape) == 0:
            problem = f"an empty tensor {entry.shape}"
        elif entry.dtype.is_complex or entry.dtype == torch.bool:
            problem = f"values of type {entry.dtype}, not floating point"
        elif not entry.dtype.is_floating_point and part != "alpha":
            problem = f"values of type {entry.dtype}, not floating point"
        if problem:
            self._refuse(problem, "The file is damaged or quantised; save it in floating point, or use another.", part)
        return entry.shape

    def _refusal(self, problem: str, remedy: str, *parts: str) -> LoRAError:
        keys = sorted(self.keys[part] for part in parts)
        components = _said(self.component)
        problem = spoken(problem, self.keys, self.layout)
        return refusal(self.file.source, problem, remedy, layout=self.layout, components=components, keys=keys)

    def _refuse(self, problem: str, remedy: str, *parts: str) -> NoReturn:
        raise self._refusal(problem, remedy, *parts)


def _called(part: str, keys: Mapping[str, str]) -> str:
    """What a change written out in full is, `diff` or `diff_b`, as people call several of them."""
    if is_whole(keys[part]):
        return "whole weights (PEFT's modules_to_save)" if part == "diff" else "whole biases (PEFT's `bias`)"
    return "full weight differences" if part == "diff" else "full differences of the biases"


def _is_factor(part: str) -> bool:
    """Whether a part is a factor of some kind."""
    return part not in ("alpha", "up_bias", "diff_b", *dora.PARTS) and not part.startswith("scale_of_")


def _values(file: LoRAFile, layout: str, piece: Piece, part: str) -> Tensor:
    # Cast first: float8 has no isfinite.
    key = piece.keys[part]
    tensor = file.tensors[key].detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    if torch.isfinite(tensor).all():
        return tensor
    raise refusal(
        file.source,
        "NaN or infinity",
        "Training diverged, or the file is damaged; use another checkpoint.",
        layout=layout,
        components=_said(piece.component),
        keys=[key],
    )


def _said(component: str | None) -> list[str]:
    return [component] if component else []
