"""`inspect_lora`: what is in a LoRA file, without a model."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from mole_diffusion.families import COMPONENTS
from mole_diffusion.lora.adapter import read_settings, strength
from mole_diffusion.lora.families import family, text_width
from mole_diffusion.lora.pieces import find_pieces, read_alpha, read_parts
from mole_diffusion.lora.sources import read_source
from mole_diffusion.lora.triggers import read_triggers

UNSTATED = "unstated"


@dataclass(frozen=True)
class LoRAReport:
    """What a LoRA file holds.

    Attributes:
        source: Path as given.
        sha256: Of the file's bytes.
        layout: `"diffusers"`, `"diffusers-old"`, `"peft"` or `"kohya"`.
        modules: Number of modules by component; `"unstated"` where the keys name none.
        ranks: How many modules have which rank, by rank.
        alphas: Different alphas in the file or its config, sorted; empty where none is known.
        scalings: By which the products of factors are multiplied, as `load_lora` does, sorted.
        family: Base models it was made for, guessed from the width of its cross-attention, or `"unknown"`.
        triggers: Phrases that call it in a prompt, as the file names them; empty where it names none.
    """

    source: str
    sha256: str
    layout: str
    modules: dict[str, int]
    ranks: dict[int, int]
    alphas: tuple[float, ...]
    scalings: tuple[float, ...]
    family: str
    triggers: tuple[str, ...]


def inspect_lora(path: str | os.PathLike[str]) -> LoRAReport:
    """Look into a LoRA file.

    Raises:
        LoRAError: If the file cannot be read or is not plain LoRA; whether it fits a model only `load_lora` can tell.
    """
    file = read_source(path)
    layout, pieces = find_pieces(file)
    settings = read_settings(file, layout)
    counts = Counter(pair.component or UNSTATED for pair in pieces)
    ranks = Counter(pair.r for pair in pieces if pair.r is not None)
    alphas: set[float] = set()
    scalings: set[float] = set()
    for pair in pieces:
        read_parts(file, layout, pair)  # for its check of the values
        config = settings.get(pair.component, settings.get(None))
        alpha, scale = strength(file, layout, pair, read_alpha(file, layout, pair), config)
        scalings.add(scale)
        if alpha is not None:
            alphas.add(alpha)
    return LoRAReport(
        source=file.source,
        sha256=file.sha256,
        layout=layout,
        modules={component: counts[component] for component in (*COMPONENTS, UNSTATED) if component in counts},
        ranks=dict(sorted(ranks.items())),
        alphas=tuple(sorted(alphas)),
        scalings=tuple(sorted(scalings)),
        family=family(text_width((pair.module, pair.form.inputs[0]) for pair in pieces if pair.form)),
        triggers=read_triggers(file.metadata),
    )
