"""What the experts add at one module in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MoLEError
from .at_hand import AtHand
from .run import Run, Weigher
from .site import Projections, Site

ALIKE = "weights of all modules"  # the note of a pass in which one tensor weighs LoRAs everywhere
_UNKNOWN = object()


def add_experts(site: Site, hidden_states: Tensor, output: Tensor, run: Run) -> Tensor:
    """`output` of a base module plus the weighed experts for the same input.

    Args:
        site: The module.
        hidden_states: Its input, samples first.
        output: What it gave; it may be added to in place.
        run: The forward pass, in which somebody weighs.

    Raises:
        MoLEError: The weigher's answer does not broadcast to the batch, tokens and experts of this module, or what was
            chosen has rows that the batch has not.
    """
    here = site
    if run.kept is not None and not _reads_left_out(run.weigher, site):
        site = site.only(run.kept, run.orthonormal)
    elif run.orthonormal and site.group.copied:
        site = site.only(None, True)
    if site.hand is not None and not torch.is_grad_enabled():
        try:
            return _added(here, site, hidden_states, output, run, site.hand)
        except RuntimeError:  # nothing was written
            site.hand = None
    return _added(here, site, hidden_states, output, run, None)


def _added(here: Site, site: Site, hidden_states: Tensor, output: Tensor, run: Run, hand: AtHand | None) -> Tensor:
    """`add_experts`, with what is at hand if that is still so.

    Args:
        here: The module.
        site: The same with the rows that are looked at.
        hidden_states, output, run: As in `add_experts`.
        hand: That of `site`.
    """
    weigher = run.weigher
    assert weigher is not None
    stack, group = site.stack, site.group
    down = None if hand is None else hand.down
    key = ALIKE if run.alike else _place(site, output) if run.of_places else None
    weights: Any = _UNKNOWN if key is None or site.beside is not None else run.notes.get(key, _UNKNOWN)
    if weights is None:
        return output
    if weights is _UNKNOWN or (hand is None and weights.device != output.device):
        projections = group.project(site, hidden_states, output, down)
        projections.base = output
        weights = weights_at(site, projections, run, output.device)
        if key is not None and (key is not ALIKE or _fits_everywhere(weights, run)):
            run.notes[key] = weights
        if weights is None:
            return output
    elif not stack.rank:
        return output
    elif hand is not None and (key is ALIKE or not group.several):
        scaled = stack.scaled_again(weights, hand.dtype)
        if key is ALIKE:
            here.sum = weights, run.kept, hand, scaled
        return hand.add(hidden_states, output, scaled)
    else:
        projections = group.project(site, hidden_states, output, down)
    beside = None if site.beside is None else site.beside.add(hidden_states, output, weights, stack.indices)
    added = output
    if stack.rank:
        rows, weighed = projections.rows[site.name], False
        together = projections.together.get(weigher) if group.several else None
        if together is not None and together[1].get(site.name) is weights:
            rows, weighed = group.weighed(site, projections, output, together[0])
        elif group.several and (key is not None or site.name in run.of_groups):
            rows, weighed = group.weighed(site, projections, output, weights)
        if hand is not None:
            return hand.add(hidden_states, output, 1.0 if weighed else stack.scaled_again(weights, hand.dtype), rows)
        site.hand = _hand(site, hidden_states, output, weights)
        added = stack.add_to(output, rows, None if weighed else weights, not group.several)
    return added if beside is None else added + beside


def _hand(site: Site, hidden_states: Tensor, output: Tensor, weights: Tensor) -> AtHand | None:
    """What to have at hand in passes to come that want no gradient, where they can go by it."""
    if site.beside is not None or not site.stack.rank:
        return None
    last = site.stack.is_convolution and output.is_contiguous(memory_format=torch.channels_last)
    alike = output.dtype == hidden_states.dtype and output.device == weights.device
    return AtHand(site, output) if alike and (last or output.is_contiguous()) else None


def check_rows(run: Run, batch: int) -> None:
    """Raises MoLEError where what was chosen has rows that the batch has not."""
    kept, scaled = run.rows_chosen
    if (kept != 1 and kept != batch) or (scaled != 1 and scaled != batch):
        raise MoLEError(
            f"`keep` has {kept} rows and `scale` {scaled}, but {run.component} runs a batch of "
            f"{batch}. Give one row for all, or one for each (with guidance, for both halves)."
        )


def weights_at(site: Site, projections: Projections, run: Run, device: torch.device) -> Tensor | None:
    """What the weigher answers for a module, `(batch | 1, tokens | 1, N)`; `None` to add nothing.

    Raises:
        MoLEError: As `add_experts`.
    """
    rows = projections.batch
    if run.rows_chosen != (1, 1):  # which fit any batch: asked at every module
        check_rows(run, rows // run.passes)
    assert run.weigher is not None
    weights = run.weigher.weigh(site, projections, run)
    if weights is None:
        return None
    if weights.device != device:
        weights = weights.to(device)
    shape = weights.shape
    fits = len(shape) == 3 and shape[2] == site.stack.num_experts and (shape[0] == 1 or shape[0] == rows)
    if not fits or (shape[1] != 1 and shape[1] != projections.tokens):
        raise MoLEError(
            f"The weights for {site.name} must be (1 or {rows}, 1 or {projections.tokens}, {site.stack.num_experts}), "
            f"got {tuple(shape)}."
        )
    return weights


def _fits_everywhere(weights: Tensor | None, run: Run) -> bool:
    """Whether weights of a module are those of all, however many rows and tokens these have."""
    return weights is not None and weights.shape[0] == weights.shape[1] == len(run.keep) == len(run.scale) == 1


def _place(site: Site, output: Tensor) -> Any:
    """Under what notes of a pass have the weights of all modules of a place."""
    shape = output.shape
    convolution = site.stack.is_convolution
    return site.place, convolution, shape[:1] + shape[2:] if convolution else shape[:-1]


def _reads_left_out(weigher: Weigher | None, site: Site) -> bool:
    """Whether a weigher reads what LoRAs that are left out would add at a module."""
    reads = getattr(weigher, "reads_left_out", None)
    return reads is not None and bool(reads(site))
