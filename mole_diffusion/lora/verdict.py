"""What a LoRA file would do to a base model: which modules act, how loudly, or why it is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.lora.errors import LoRAError
from mole_diffusion.lora.factors import LoRA, LoRAFactors
from mole_diffusion.lora.families import family, text_width
from mole_diffusion.lora.load import fits
from mole_diffusion.lora.pieces import find_pieces
from mole_diffusion.lora.skeletons import candidates, names_of
from mole_diffusion.lora.sources import read_source

# A share of a change's energy in one direction that is rare in trained LoRAs, and burns when several are stacked.
SPIKE = 0.9
POWER_ROUNDS = 10


@dataclass(frozen=True)
class Verdict:
    """A LoRA held against a base model.

    Attributes:
        base: What it was held against.
        modules: How many modules act, by component; empty where it is refused.
        refusal: Why it is refused; None where it acts.
        energy: `|ΔW| / |W|` over all modules that act, Frobenius norms; None where the base has no weights.
        loudest: The modules where that is largest, with it.
        spikes: Modules of several ranks where one direction has more than nine tenths of `|ΔW|²`, with its share; of a
            DoRA, of the change before its magnitude.
    """

    base: str
    modules: dict[str, int]
    refusal: str | None
    energy: float | None = None
    loudest: tuple[tuple[str, float], ...] = ()
    spikes: tuple[tuple[str, float], ...] = ()


def judge(source: str | os.PathLike[str], components: Mapping[str, nn.Module], base: str) -> Verdict:
    """Hold a file against a model.

    Args:
        source: The file.
        components: Models by name; on the meta device where only names and sizes are asked.
        base: What to call the model.
    """
    try:
        lora = fits(source, components)
    except LoRAError as error:
        return Verdict(base, {}, str(error))
    counts = {component: len(modules) for component, modules in lora.factors.items()}
    energy, loudest = _energies(lora, components)
    return Verdict(base, counts, None, energy, loudest, _spikes(lora))


def fitting(source: str | os.PathLike[str]) -> list[Verdict]:
    """The published base models that a file fits, by names and sizes of their modules alone.

    Returns:
        A verdict for each model that it fits; where it fits none, the refusal of the one whose names are nearest;
        nothing where its names are those of none, or the width of the text it attends to is.

    Raises:
        LoRAError: The file cannot be read, whatever the model.
    """
    _, pieces = find_pieces(read_source(source))
    width = text_width((piece.module, piece.form.inputs[0]) for piece in pieces if piece.form and piece.form.inputs)
    known = candidates(piece.module for piece in pieces)
    if width is not None:
        known = [model for model in known if model.title == family(width)]
    found = [judge(source, model.build(), model.title) for model in known]
    named = width is not None or names_of(piece.module for piece in pieces) is not None
    return [verdict for verdict in found if verdict.refusal is None] or (found[:1] if named else [])


@torch.no_grad()
def _energies(lora: LoRA, components: Mapping[str, nn.Module]) -> tuple[float | None, tuple[tuple[str, float], ...]]:
    total, base, ratios = 0.0, 0.0, []
    for component, modules in lora.factors.items():
        for name, factors in modules.items():
            weight: Any = getattr(components[component].get_submodule(name), "weight", None)
            weight = None if weight is None else weight.detach()
            if (
                type(weight) is not Tensor or weight.is_meta or not weight.is_floating_point()
            ):  # quantised, or not there
                return None, ()
            size = float(weight.float().square().sum())
            change = _energy(factors, weight)
            total, base = total + change, base + size
            ratios.append((f"{component}.{name}", (change / size) ** 0.5 if size else float("inf")))
    loudest = sorted(ratios, key=lambda entry: -entry[1])[:3]
    return (total / base) ** 0.5 if base else None, tuple(loudest)


def _energy(factors: LoRAFactors, weight: Tensor) -> float:
    """`|ΔW|²`; of a plain product of small rank without making it."""
    if not factors.plain:
        return float(factors.delta(weight.float().cpu()).square().sum())
    up, down = factors.up.flatten(1), factors.down.flatten(1)
    return factors.scaling**2 * float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0))


@torch.no_grad()
def _spikes(lora: LoRA) -> tuple[tuple[str, float], ...]:
    found = []
    for component, modules in lora.factors.items():
        for name, factors in modules.items():
            if (share := _share_of_one_direction(factors)) > SPIKE:
                found.append((f"{component}.{name}", share))
    return tuple(sorted(found, key=lambda entry: -entry[1]))


def _share_of_one_direction(factors: LoRAFactors) -> float:
    """The share of `|ΔW|²` in its first singular direction, before a magnitude; 0 where it has no other by its rank."""
    kronecker = factors.kronecker
    if kronecker is not None and kronecker.rows is None:  # singular values of a product are products of theirs
        return _first(kronecker.w1) * _first(kronecker.w2.flatten(1))
    if kronecker is not None:
        return _first(kronecker.matrix().flatten(1))
    if factors.r < 2:
        return 0.0
    left = torch.linalg.qr(factors.up.flatten(1), mode="r").R
    right = torch.linalg.qr(factors.down.flatten(1).T, mode="r").R
    values = torch.linalg.svdvals(left @ right.T).square()
    return float(values[0] / values.sum()) if values.sum() > 0 else 0.0


def _first(matrix: Tensor) -> float:
    """The share of the first singular value in a matrix's energy, by power iteration from its largest row.

    Where it is near 1, as a spike's is, the others die out within a few rounds.
    """
    energy = float(matrix.square().sum())
    if energy == 0:
        return 0.0
    direction = matrix[matrix.square().sum(dim=1).argmax()]
    for _ in range(POWER_ROUNDS):
        direction = torch.nn.functional.normalize((matrix @ direction) @ matrix, dim=0)
    return float((matrix @ direction).square().sum()) / energy
