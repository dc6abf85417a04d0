"""Each token goes to the LoRA whose output there is largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..errors import MoLEError
from ..experts import Projections, Run, Site
from ..experts.rules import Ruled
from ..experts.uncast import uncast
from ..methods import RouterOptions
from .base import Composition
from .norms import sizes_at
from .roles import roles
from .routing_in_graphs import LATER, rule_of

FILLED = "text", "both"  # what modules read in which some tokens may only fill up a prompt


@dataclass(frozen=True, eq=False)
class _Parts:
    """Weights at the modules that the same n of N LoRAs touch, before tokens are given away.

    Attributes:
        made_of: What they were worked out from.
        lost: The weight of a LoRA at a token that is not its own, `(rows, 1, N)`; `None` where that is 0.
        gains: What winning a token adds to it, for the n that may win one, `(rows, n, N)`; `None` where all of N may,
            and their weight is 1.
        shared: The weight where there are no tokens, `(rows, 1, N)`.
        idle: Whether a LoRA does not compete: no subject, or left out; `(n, rows, 1)`. `None` where all compete in
            every row.
        order: What means are divided by, so that no two LoRAs are equally large, `(n, 1, 1)`.
        least: What keeps a quotient by a LoRA's mean finite, `(1,)`.
        shares: What makes of the sum of a LoRA's sizes their mean over its place in the order, by tokens, `(n, 1, 1)`.
    """

    made_of: tuple[Tensor, Tensor]
    lost: Tensor | None
    gains: Tensor | None
    shared: Tensor
    idle: Tensor | None
    order: Tensor
    least: Tensor
    shares: dict[int, Tensor] = field(default_factory=dict)


# Weights of all modules that were looked at together, and those of each by its name.
_Together = tuple[Tensor, dict[str, Tensor]]


class NormRouter(RouterOptions, Composition):
    """At every module, each token goes to the LoRA whose output there is largest for its kind.

    With `E_i(x_p) = s_i B_i A_i x_p` the output of LoRA i at token p, LoRAs are compared by
    `rho_i(p) = |E_i(x_p)| / mean_p |E_i(x_p)|`: a LoRA that is strong everywhere wins nothing by it. Needs no words,
    no masks and no evaluation more. Norms are those of full outputs, as SpectR takes them
    (https://arxiv.org/abs/2504.03454), but no output is made: sizes are read off products of rank by rank, or off
    rows alone where these are as long as outputs are large (`orthonormal`). Modules without tokens share one unit.

    Styles and utilities take no part and act in full.

    Args:
        temperature: 0, the default: the largest takes all. Otherwise weights are `softmax(rho_i / temperature)`.

    Raises:
        MoLEError: `temperature` is negative, not finite, or so near to 0 that quotients by it are not finite.
    """

    _in_graphs: float | None = None
    name = "norm_router"
    source = "norms of the LoRAs' outputs; after SpectR (arXiv 2504.03454)"

    @property
    def has_rules(self) -> bool:
        """Whether a compiled graph can weigh as the router does, without asking it."""
        return type(self).weigh is NormRouter.weigh

    def rules(self, parts: Mapping[Site, str]) -> dict[str, Ruled]:
        """What a compiled graph has of the router, by module: not where some tokens may only fill up a prompt.

        Args:
            parts: The modules that can be in a graph with their LoRAs, and the compiled part that each lies in.
        """
        self._in_graphs = self.temperature
        sites = (site for site in parts if site.reads not in FILLED and site.stack.rank)
        return {site.name: rule_of(site, self.temperature) for site in sites}

    def rules_now(self, run: Run) -> Tensor:
        """What the rules are given in a pass beside `keep` and `scale`: 1 for subjects, `(1, N)`.

        Raises:
            MoLEError: The temperature is another one than when the graph was made.
        """
        if self._in_graphs != self.temperature:
            raise MoLEError(
                f"the compiled graph routes with temperature {self._in_graphs:g}, but {self.temperature:g} was set on "
                f"the router since. Pass a new one: `set_composition(NormRouter(temperature={self.temperature:g}))`."
            )
        return roles(run, "subject")[None]

    @property
    def orthonormal(self) -> bool:
        return True

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        if projections.tokens == 1 or not site.stack.indices:
            return self._parts(site, run).shared
        together = projections.together.get(self)
        if together is None:
            together = self._together(site, projections, run)
            if len(together[1]) > 1:
                projections.together[self] = together
        return together[1][site.name]

    def _together(self, site: Site, projections: Projections, run: Run) -> _Together:
        known = run.notes if run.call is None else run.call.state
        here = known.get((self, site))
        if here is None or here[0].made_of[0] is not run.keep or here[0].made_of[1] is not run.scale:
            known[self, site] = here = self._parts(site, run), sizes_at(site, projections.rows[site.name])
        parts, sizes_of = here
        if site.reads != "text" or run.call is None or projections.hidden_states.requires_grad:
            there = run.told.there(site.reads, projections.tokens) if site.reads in FILLED else None
            return self._weights(parts, sizes_of(projections), there, site)
        # The prompt is the same in all steps of a picture: what was worked out for it holds for all of them.
        given = projections.hidden_states
        kept: dict[Any, Any] = run.call.state.setdefault((self, "text"), {})
        version = None if given.is_inference() else given._version
        found = kept.get(site.name)
        if found is None or found[0]() is not given or found[1:3] != (version, parts):
            there = run.told.there(site.reads, projections.tokens)
            found = ref(given), version, parts, self._weights(parts, sizes_of(projections), there, site)
            kept.update(dict.fromkeys(found[3][1], found))
        together: _Together = found[3]
        return together

    def _weights(self, parts: _Parts, sizes: Tensor, there: Tensor | None, site: Site) -> _Together:
        """Weights `(batch, tokens, modules, N)` and each module's."""
        several = sizes.ndim == 4
        shares = self._shares(parts, sizes, there)
        weights = shares.permute(2, 3, 0, 1) if several else shares.permute(1, 2, 0)
        if parts.gains is not None:
            with uncast(weights.device.type):
                weights = torch.einsum("bt...n,bni->bt...i", weights, parts.gains.expand(weights.shape[0], -1, -1))
        if parts.lost is not None:
            weights = (parts.lost[:, :, None] if several else parts.lost) + weights
        if not several:
            return weights, {site.name: weights}
        return weights, dict(zip(site.group.names, weights.unbind(2), strict=True))

    def _shares(self, parts: _Parts, sizes: Tensor, there: Tensor | None) -> Tensor:
        """What each LoRA gets of each token, 1 in all, laid out as `sizes` are.

        Where two are equally large to the last digit, as where nobody adds anything, the token is of both.

        Args:
            parts: The weights.
            sizes: Of outputs, `(n, batch, tokens)` or `(modules, n, batch, tokens)`; they may be overwritten.
            there: `(batch, tokens)`, 0 for what fills up a prompt, which says nothing; `None` where all tokens count.
        """
        hard = self.temperature == 0
        if hard and sizes.requires_grad:
            sizes = sizes.detach()  # who has a token does not follow from it smoothly
        batch, tokens = sizes.shape[-2:]
        if there is not None and there.shape[0] == batch:
            counted = there.to(sizes)
            sums = (sizes * counted).sum(dim=-1, keepdim=True)
            share = 1 / (counted.sum(dim=-1, keepdim=True) * parts.order)
        else:
            if tokens not in parts.shares:
                parts.shares[tokens] = 1 / (tokens * parts.order)
            sums, share = sizes.sum(dim=-1, keepdim=True), parts.shares[tokens]
        means = torch.addcmul(parts.least, sums, share)
        ratios = sizes / means if sizes.requires_grad else sizes.div_(means)
        if parts.idle is not None:
            ratios = ratios.masked_fill(parts.idle, float("-inf"))
        if hard:
            return ratios.eq_(ratios.amax(dim=-3, keepdim=True))
        return torch.softmax(ratios / self.temperature, dim=-3).nan_to_num()  # of nobody, where nobody competes

    def _parts(self, site: Site, run: Run) -> _Parts:
        """Kept until the call ends or the choice of LoRAs changes: asked at every module, they cost more than norms."""
        known = run.notes if run.call is None else run.call.state
        key = (self, run.component, site.stack.indices)
        parts: _Parts | None = known.get(key)
        if parts is None or parts.made_of[0] is not run.keep or parts.made_of[1] is not run.scale:
            subject, scale = roles(run, "subject"), run.scale[:, None]
            here = torch.tensor(site.stack.indices, dtype=torch.long, device=subject.device)
            there = torch.zeros_like(subject).index_fill(0, here, 1)
            competing = (run.keep * subject * there)[:, None]
            lost = (run.keep * (1 - subject))[:, None] * scale
            gain = competing * scale
            everyone = torch.eye(len(subject), device=subject.device)[here]
            gains = gain * everyone
            shared = lost + gain / competing.sum(dim=-1, keepdim=True).clamp(min=1)
            idle = competing[..., here] == 0
            order = 1 - LATER * torch.arange(len(here), device=subject.device)[:, None, None]
            known[key] = parts = _Parts(
                (run.keep, run.scale),
                lost if bool(lost.any()) else None,
                None if torch.equal(gains, everyone.expand_as(gains)) and len(here) == len(subject) else gains,
                shared,
                idle.permute(2, 0, 1) if bool(idle.any()) else None,
                order,
                order.new_full((1,), torch.finfo(order.dtype).tiny),
            )
        return parts
