"""Each token goes to the LoRA whose output there is largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from ..experts import ExpertStack, Projections, Run, Site
from ..methods import RouterOptions
from .base import Composition
from .roles import roles

# Of two LoRAs that are equally large, the first wins: others count for so much less, a few digits of the last place.
_LATER = 2.0**-21
_ROOTS: WeakKeyDictionary[ExpertStack, Tensor] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Parts:
    """Weights at the modules that the same LoRAs touch, before tokens are given away; each `(rows, 1, N)`.

    Attributes:
        made_of: What they were worked out from.
        lost: The weight of a LoRA at a token that is not its own.
        gain: What winning a token adds to it.
        plain: Whether these are 0 and 1 throughout.
        shared: The weight where there are no tokens.
        idle: Whether a LoRA does not compete: no subject, left out, or not touching the module; `(N, rows, 1)`.
            `None` where all compete in every row.
        order: What ratios are multiplied by, so that no two are equal, `(N, 1, 1)`.
    """

    made_of: tuple[Tensor, Tensor]
    lost: Tensor
    gain: Tensor
    plain: bool
    shared: Tensor
    idle: Tensor | None
    order: Tensor


class NormRouter(RouterOptions, Composition):
    """At every module, each token goes to the LoRA whose output there is largest for its kind.

    With `E_i(x_p) = s_i B_i A_i x_p` the output of LoRA i at token p, LoRAs are compared by
    `rho_i(p) = |E_i(x_p)| / mean_p |E_i(x_p)|`: a LoRA that is strong everywhere wins nothing by it. Needs no words,
    no masks and no evaluation more. Norms of the full outputs, as SpectR takes them (https://arxiv.org/abs/2504.03454),
    come from the factors' r x r products, so that no output is ever made. Modules without tokens share one unit.

    Styles and utilities take no part and act in full.

    Args:
        temperature: 0, the default: the largest takes all. Otherwise weights are `softmax(rho_i / temperature)`.

    Raises:
        MoLEError: `temperature` is negative, not finite, or so near to 0 that quotients by it are not finite.
    """

    name = "norm_router"
    source = "norms of the LoRAs' outputs; after SpectR (arXiv 2504.03454)"

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        parts = self._parts(site, run)
        if projections.tokens == 1:
            return parts.shared
        given = projections.hidden_states
        if site.reads != "text" or run.call is None or given.requires_grad:
            return self._weights(parts, site, projections, run)
        # The prompt is the same in all steps of a picture: what was worked out for it holds for all of them.
        known: dict[Any, Any] = run.call.state.setdefault((self, "text"), {})
        version = None if given.is_inference() else given._version
        found = known.get(site)
        if found is None or found[0]() is not given or found[1:3] != (version, parts):
            known[site] = found = ref(given), version, parts, self._weights(parts, site, projections, run)
        weights: Tensor = found[3]
        return weights

    def _weights(self, parts: _Parts, site: Site, projections: Projections, run: Run) -> Tensor:
        norms = whole_norms(site, projections)  # (N, batch, tokens): what follows runs along the longer axis
        there = run.told.there(site.reads, projections.tokens)
        if there is None or len(there) != projections.batch:
            means = norms.mean(dim=2, keepdim=True)
        else:  # what fills up a prompt says nothing
            counted = there.to(norms)
            means = (norms * counted).sum(dim=2, keepdim=True) / counted.sum(dim=1)[:, None]
        ratios = norms * (parts.order / means.clamp_min_(torch.finfo(norms.dtype).tiny))
        if parts.idle is not None:
            ratios = ratios.masked_fill(parts.idle, float("-inf"))
        if self.temperature > 0:
            shares = torch.softmax(ratios / self.temperature, dim=0).nan_to_num()  # of nobody, where nobody competes
            return torch.addcmul(parts.lost, shares.movedim(0, 2), parts.gain)
        wins = ratios == ratios.amax(dim=0)  # an index of the largest takes many times longer to find
        won = wins.movedim(0, 2).contiguous().to(parts.gain.dtype)  # turned while it is a byte a number
        return won if parts.plain else torch.addcmul(parts.lost, won, parts.gain)

    def _parts(self, site: Site, run: Run) -> _Parts:
        """Kept until the call ends or the choice of LoRAs changes: asked at every module, they cost more than norms."""
        known = run.notes if run.call is None else run.call.state
        key = (self, run.component, site.stack.indices)
        parts: _Parts | None = known.get(key)
        if parts is None or parts.made_of[0] is not run.keep or parts.made_of[1] is not run.scale:
            subject, scale = roles(run, "subject"), run.scale[:, None]
            there = torch.zeros_like(subject)
            there[list(site.stack.indices)] = 1
            competing = (run.keep * subject * there)[:, None]
            lost = (run.keep * (1 - subject))[:, None] * scale
            gain = competing * scale
            shared = lost + gain / competing.sum(dim=-1, keepdim=True).clamp(min=1)
            idle = None if bool(competing.all()) else (competing == 0).movedim(2, 0)
            order = 1 - _LATER * torch.arange(len(subject), device=subject.device)
            plain = not lost.any() and bool((gain == 1).all())
            parts = _Parts((run.keep, run.scale), lost, gain, plain, shared, idle, order[:, None, None])
            known[key] = parts
        return parts


def output_norms(stack: ExpertStack, projected: Tensor) -> Tensor:
    """Size of every LoRA's output at every token, `|E_i(x)|`, from its r coordinates.

    With `s_i B_i = Q_i R_i` and orthonormal columns of Q, `|s_i B_i z| = |R_i z|`, so the outputs are never made.

    Args:
        stack: The LoRAs at a module.
        projected: z = down x, `(batch * tokens, R)`, or `(batch, R, tokens)` of a convolution.

    Returns:
        `(N, batch * tokens)`, or `(N, batch, tokens)`, float32; 0 for a LoRA that does not touch the module.
    """
    root = _ROOTS.get(stack)
    if root is None or root.device != projected.device:
        _ROOTS[stack] = root = _root(stack).to(projected.device)
    rows = (projected if stack.is_convolution else projected.t()).float()
    if root.ndim == 3:  # one product for each LoRA instead of a large one that is mostly zeros
        rows = rows.unflatten(-2, (stack.num_experts, -1))
    coordinates = torch.bmm(root, rows) if root.ndim == rows.ndim == 3 else root @ rows
    if root.ndim == 2:
        coordinates = coordinates.unflatten(-2, (stack.num_experts, -1))
    norms = coordinates.square_().sum(dim=-2).sqrt_()
    return norms.movedim(1, 0) if stack.is_convolution else norms


def whole_norms(site: Site, projections: Projections) -> Tensor:
    """`output_norms` also of LoRAs that add more than a product of small rank, whose outputs are made.

    Returns:
        `(N, batch, tokens)`.
    """
    norms = output_norms(site.stack, projections.rows[site.name])
    norms = norms.reshape(len(norms), projections.batch, projections.tokens)
    if site.beside is None or projections.base is None:
        return norms
    projected = projections.tensors[site.name].float()
    up, owner = (x.to(projected.device) for x in (site.stack.up_as(torch.float32), site.stack.expert_of_rank))
    terms = site.beside.outputs(projections.hidden_states, projections.base, site.stack.indices)
    for index, term in terms.items():
        if not site.stack.rank:  # a norm, which gives more features than its weight has where it is one for all heads
            norms[index] = term.float().norm(dim=-1)
            continue
        its = owner == index
        norms[index] = (projected[..., its] @ up[:, its].T + term.float()).norm(dim=-1)
    return norms


def _root(stack: ExpertStack) -> Tensor:
    """R of each LoRA: `(N, r, r)` where all touch the module with one rank.

    Else R of each in rows of its own, all as many, `(N * rows, sum of the ranks)`, zero elsewhere.
    """
    ups = stack.up_as(torch.float32).split([stack.ranks[expert] for expert in stack.indices], dim=1)
    triangles = [torch.linalg.qr(up, mode="r").R for up in ups]
    if len({triangle.shape for triangle in triangles}) == 1 and len(triangles) == stack.num_experts:
        return torch.stack(triangles)
    rows = max([1, *map(len, triangles)])
    root, column = torch.zeros(stack.num_experts, rows, sum(stack.ranks)), 0
    for expert, triangle in zip(stack.indices, triangles, strict=True):
        root[expert, : len(triangle), column : column + triangle.shape[1]] = triangle
        column += triangle.shape[1]
    return root.flatten(0, 1)
