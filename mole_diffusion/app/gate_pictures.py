"""What gates gave, as pictures: by layer, and by layer and step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..files import atomic_path
from ..sheets import as_they_are


def by_layer_and_step(
    weights: Tensor, places: Sequence[str], loras: Sequence[str], path: str | os.PathLike[str]
) -> Path:
    """Draws a panel for each LoRA: places down, steps across, on one scale.

    Args:
        weights: `(places, N, steps)`; NaN where a LoRA has nothing.
        places: Names of the places.
        loras: Names of the LoRAs.
        path: The file to write.
    """
    from matplotlib.figure import Figure

    table = weights.float().cpu().numpy()
    largest = max(1.0, float(table[table == table].max(initial=0)))
    figure = Figure(figsize=(4 + 2.6 * len(loras), 1.4 + 0.22 * len(places)), layout="constrained")
    panels = figure.subplots(1, len(loras), sharey=True, squeeze=False)[0]
    for index, (axes, name) in enumerate(zip(panels, loras, strict=True)):
        image = axes.imshow(table[:, index], aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_yticks(range(len(places)), places, fontsize=7)
    figure.colorbar(image, ax=list(panels), label="gate weight")
    as_they_are(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return Path(path)
