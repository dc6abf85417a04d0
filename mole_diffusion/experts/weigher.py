"""Who says how much of each LoRA a module gets."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .run import Run
from .site import Projections, Site


@runtime_checkable
class Weigher(Protocol):
    """Gives the final weights gamma of ``y = W x + up (gamma * down x)``.

    A weigher that has an attribute ``per_rank = True`` answers with one weight per row of ``site.stack.down`` instead
    of one per LoRA. A weigher that has a method ``bind(experts)`` is told which experts it weighs when it is set.
    """

    def weights(self, site: Site, projections: Projections, run: Run) -> Tensor | None:
        """Weights for one module in one pass, with ``run.keep`` and ``run.scale`` already worked in.

        Args:
            site: The module.
            projections: ``down x`` of this site and of those that read the same tensor, ``(batch, tokens, R)`` each.
            run: The forward pass: keep, scale, timestep, prompt embeddings.

        Returns:
            ``(batch | 1, tokens | 1, N)``, or ``None`` to add nothing here.
        """
        ...


@runtime_checkable
class WidensBatch(Weigher, Protocol):
    """A weigher that asks the denoiser for several predictions of one sample and makes one of them.

    The batch runs several times over in one forward pass: all its rows for the first pass, then all for the second.
    ``weights`` then answers for the widened batch.
    """

    def passes(self, run: Run) -> int:
        """How many, at least 1. Asked once, when the denoiser's forward pass begins; text encoders run once."""
        ...

    def combine(self, predictions: Tensor, run: Run) -> Tensor:
        """Predictions ``(passes, batch, ...)`` to what the caller of the denoiser gets, ``(batch, ...)``."""
        ...


class ConstantWeights:
    """The same numbers in every layer, as plain and normalised sums of LoRAs have them (eqs. 1 and 2).

    Args:
        values: ``(N,)`` or ``(rows, N)``.
        renormalize: Divide by the sum over the kept LoRAs, so that weights sum to one whichever are masked out.

    Raises:
        ValueError: If ``values`` has another shape or is not finite.
    """

    def __init__(self, values: Tensor, renormalize: bool = False) -> None:
        values = torch.as_tensor(values, dtype=torch.float32)
        if values.ndim not in (1, 2) or not values.isfinite().all():
            raise ValueError(
                f"`values` must be finite, of shape (N,) or (rows, N), got shape {tuple(values.shape)}: {values}."
            )
        self.values = values if values.ndim == 2 else values[None]
        self.renormalize = renormalize

    def weights(self, site: Site, projections: Projections, run: Run) -> Tensor:
        weights = self.values.to(run.keep.device) * run.keep
        if self.renormalize:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / torch.where(total == 0, torch.ones_like(total), total)  # rows that keep none stay zero
        return (weights * run.scale)[:, None]  # (rows, 1, N)
