"""`inspect_lora`: what is in a LoRA file, without a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mole_diffusion.families import COMPONENTS
from mole_diffusion.lora.adapter import read_adapter_settings, strength
from mole_diffusion.lora.embeddings import read_embeddings
from mole_diffusion.lora.families import family, text_width
from mole_diffusion.lora.pieces import Piece, find_pieces, read_alpha, read_parts
from mole_diffusion.lora.skeletons import names_of
from mole_diffusion.lora.sources import read_source
from mole_diffusion.lora.trainers import trainer_of
from mole_diffusion.lora.triggers import read_triggers

UNSTATED = "unstated"


@dataclass(frozen=True)
class LoRAReport:
    """What a LoRA file holds.

    Attributes:
        source: Path as given.
        sha256: SHA-256 of the file's bytes.
        layout: The layout of its keys, one of `lora.layouts.LAYOUTS`, such as `"kohya"`.
        trainer: Program that wrote it, or `"unknown"`.
        modules: Number of modules by component; `"unstated"` where the keys name none.
        kinds: How many modules have which kind of adapter, by kind.
        ranks: How many modules have which rank, by rank. Those without any (LoKr of whole matrices) are not counted.
        alphas: Different alphas in the file or its config, sorted; empty where none is known.
        scalings: The numbers that the products of factors are multiplied by, as `load_lora` does, sorted.
        family: Base models it was made for, guessed from the width of its cross-attention, else from its names, or
            `"unknown"`. Which it fits, `fitting` tells.
        triggers: Phrases that call it in a prompt, as the file names them; empty where it names none.
        embeddings: How many vectors it brings for which word of its own.
    """

    source: str
    sha256: str
    layout: str
    trainer: str
    modules: dict[str, int]
    kinds: dict[str, int]
    ranks: dict[int, int]
    alphas: tuple[float, ...]
    scalings: tuple[float, ...]
    family: str
    triggers: tuple[str, ...]
    embeddings: dict[str, int]


def inspect_lora(path: str | os.PathLike[str]) -> LoRAReport:
    """Looks into a LoRA file.

    Raises:
        LoRAError: The file cannot be read, or is of a kind that is not; whether it fits a model `judge` tells.
    """
    file = read_source(path)
    layout, pieces = find_pieces(file)
    settings = read_adapter_settings(file, layout)
    embeddings = read_embeddings(file)
    counts = Counter(piece.component or UNSTATED for piece in pieces)
    ranks = Counter(piece.r for piece in pieces if piece.r is not None)
    alphas: set[float] = set()
    scalings: set[float] = set()
    for piece in pieces:
        read_parts(file, layout, piece)  # called for its check of the values alone
        config = settings.get(piece.component, settings.get(None))
        alpha, scale = strength(file, layout, piece, read_alpha(file, layout, piece), config)
        scalings.add(scale)
        if alpha is not None:
            alphas.add(alpha)
    return LoRAReport(
        source=file.source,
        sha256=file.sha256,
        layout=layout,
        trainer=trainer_of(file.metadata, file.entries) or "unknown",
        kinds=dict(Counter(piece.title for piece in pieces)),
        modules={component: counts[component] for component in (*COMPONENTS, UNSTATED) if component in counts},
        ranks=dict(sorted(ranks.items())),
        alphas=tuple(sorted(alphas)),
        scalings=tuple(sorted(scalings)),
        family=_family(pieces),
        triggers=read_triggers(file.metadata) or tuple(embeddings),
        embeddings={word: len(next(iter(found.values()))) for word, found in embeddings.items()},
    )


def _family(pieces: Sequence[Piece]) -> str:
    width = text_width((piece.module, piece.form.inputs[0]) for piece in pieces if piece.form and piece.form.inputs)
    return family(width) if width is not None else names_of(piece.module for piece in pieces) or "unknown"
