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
from .norms import group_norms, whole_norms
from .roles import roles
from .routing_in_graphs import LATER, rule_of


@dataclass(frozen=True, eq=False)
class _Parts:
    """Weights at the modules that the same n of N LoRAs touch, before tokens are given away.

    Attributes:
        made_of: What they were worked out from.
        lost: The weight of a LoRA at a token that is not its own, `(rows, 1, N)`.
        gains: What winning a token adds to it, for the n that may win one, `(rows, n, N)`.
        shared: The weight where there are no tokens, `(rows, 1, N)`.
        idle: Whether a LoRA does not compete: no subject, or left out; `(n, rows, 1)`. `None` where all compete in
            every row.
        order: What ratios are multiplied by, so that no two are equal, `(n, 1, 1)`.
        won: All weights at a token for each LoRA that may win it, one row's below the other's, `(rows * n, N)`.
        first: Where those of a row begin, `(rows, 1)`; `None` where there is one row.
        least: What keeps a quotient by a LoRA's mean finite, `(1, 1, 1)`.
        shares: What sums a LoRA's norms up to its mean over its place in the order, by modules and tokens.
    """

    made_of: tuple[Tensor, Tensor]
    lost: Tensor
    gains: Tensor
    shared: Tensor
    idle: Tensor | None
    order: Tensor
    won: Tensor
    first: Tensor | None
    least: Tensor
    shares: dict[tuple[int, int], Tensor] = field(default_factory=dict)


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
        filled = "text", "both"
        sites = (site for site in parts if site.reads not in filled and site.stack.rank)
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

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        parts = self._parts(site, run)
        if projections.tokens == 1 or not site.stack.indices:
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
        made = projections.weights.pop((self, site.name), None)
        if made is not None:
            return made
        with uncast(projections.hidden_states.device):
            norms = group_norms(site, projections)
            if norms is None:
                return self._of_norms(parts, whole_norms(site, projections)[None], site, projections, run)[0]
            of_all = self._of_norms(parts, norms, site, projections, run).unbind()
        for member, its in zip(site.group.sites, of_all, strict=True):
            projections.weights[self, member.name] = its
        return projections.weights.pop((self, site.name))

    def _of_norms(self, parts: _Parts, norms: Tensor, site: Site, projections: Projections, run: Run) -> Tensor:
        """Weights `(modules, rows, tokens, N)` from norms `(modules, n, rows, tokens)`."""
        ratios = norms / self._means(parts, norms, run.told.there(site.reads, projections.tokens))
        if parts.idle is not None:
            ratios = ratios.masked_fill(parts.idle, float("-inf"))
        if self.temperature > 0:
            shares = torch.softmax(ratios / self.temperature, dim=1).nan_to_num()  # of nobody, where nobody competes
            return parts.lost + torch.einsum("mnrt,rni->mrti", shares, parts.gains.expand(shares.shape[2], -1, -1))
        winner = ratios.max(dim=1).indices  # `argmax` takes many times longer
        return torch.embedding(parts.won, winner if parts.first is None else winner + parts.first)

    def _means(self, parts: _Parts, norms: Tensor, there: Tensor | None) -> Tensor:
        """What norms are divided by, `(modules, n, rows, 1)`: each LoRA's mean, above 0, over its place in the order.

        Args:
            parts: The weights.
            norms: `(modules, n, rows, tokens)`.
            there: `(rows, tokens)`, 0 for what fills up a prompt, which says nothing; `None` where all tokens count.
        """
        modules, number, rows, tokens = norms.shape
        if there is not None and there.shape[0] == rows:
            counted = there.to(norms)
            means = (norms * counted).sum(dim=-1, keepdim=True) / counted.sum(dim=1)[:, None]
            return means.clamp_min_(parts.least) / parts.order
        share = parts.shares.get((modules, tokens))
        if share is None:
            share = 1 / (tokens * parts.order).expand(modules, number, tokens, 1)
            parts.shares[modules, tokens] = share = share.flatten(0, 1).contiguous()
        means = torch.baddbmm(parts.least, norms.view(-1, rows, tokens), share)
        return means.view(modules, number, rows, 1)

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
            gains = gain * torch.eye(len(subject), device=subject.device)[here]
            shared = lost + gain / competing.sum(dim=-1, keepdim=True).clamp(min=1)
            may_win = competing[:, 0, here]
            idle = None if bool(may_win.all()) else (may_win == 0).t()[..., None]
            order = 1 - LATER * torch.arange(len(here), device=subject.device)[:, None, None]
            least = order.new_full((1, 1, 1), torch.finfo(order.dtype).tiny)
            won = lost + gains
            rows = torch.arange(len(won), device=subject.device)[:, None] * len(here) if len(won) > 1 else None
            made_of = run.keep, run.scale
            known[key] = parts = _Parts(made_of, lost, gains, shared, idle, order, won.flatten(0, 1), rows, least)
        return parts
