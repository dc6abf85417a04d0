"""The least that composing takes: its products with nothing around them, and with the module's own in one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..composition.norms import root_like
from ..experts import Experts, ExpertStack, Site
from ..gating import MoLEModel
from ..gating.gate import divisors


def with_products(model: Any, component: str, experts: Experts, kept: tuple[int, ...], joined: bool = False) -> Any:
    """The model with modules that add LoRAs at full weight: nobody may choose, weigh or look on.

    Args:
        model: A copy, whose forwards are exchanged.
        component: What it is among the models of `experts`.
        experts: The LoRAs, on another copy.
        kept: Indices of those that are added.
        joined: Whether the rows of a Linear and of `down` lie in one matrix, so that one product gives both.
    """
    for site in experts.sites.values():
        if site.component == component:
            module = model.get_submodule(site.module_name)
            module.forward = _forward(module, site.only(kept).stack, joined)
    return model


def with_gates(model: Any, component: str, experts: Experts, gates: MoLEModel) -> Any:
    """The model with modules that add all LoRAs as gates per token, which read hidden states, weigh them.

    The gates' products and what they need beside, and no more: nobody may choose, record or look on.

    Args:
        model: A copy, whose forwards are exchanged.
        component: What it is among the models of `experts`.
        experts: The LoRAs, on another copy.
        gates: Theirs.
    """
    null_expert = gates.gate_config.null_expert
    for spec in gates.specs:
        if spec.component != component:
            continue
        gate = gates.gate(spec)
        first, weights = spec.entry_sites[0], _Weights()
        (of_gate,) = divisors([gate], gate.weight.device)

        def ask(features: Tensor, gate: Any = gate, of_gate: Any = of_gate) -> Tensor:
            shares: Tensor = gate.shares_at_every_token(features, gate.weight, of_gate, null_expert)
            return shares

        for name in spec.sites:
            site = experts.sites[name]
            module = model.get_submodule(site.module_name)
            module.forward = _gated(module.forward, site, weights, ask if name == first else None)
    return model


def with_router(model: Any, component: str, experts: Experts) -> Any:
    """The model with modules that give each token to the LoRA whose output is largest there for its kind.

    What `NormRouter` computes of LoRAs that touch all modules, and no more: nobody may choose or look on.

    Args:
        model: A copy, whose forwards are exchanged.
        component: What it is among the models of `experts`.
        experts: The LoRAs, on another copy.
    """
    for group in dict.fromkeys(site.group for site in experts.sites.values() if site.component == component):
        members = [site.only(None, orthonormal=True) for site in group.sites]
        for sites in [members] if members[0].group.alike else [[site] for site in members]:
            routed = _Routed(sites)
            for site in sites:
                module = model.get_submodule(site.module_name)
                module.forward = routed.forward(module.forward, site)
    return model


class _Routed:
    """Modules that read one tensor: with the first of them, the rows of all are made, looked at and weighed."""

    def __init__(self, sites: list[Site]) -> None:
        stack, weight = sites[0].stack, sites[0].module.weight
        assert isinstance(weight, Tensor)
        downs = [site.stack.down_as(weight.dtype, weight.device) for site in sites]
        self._sites, self._ranks = sites, [len(down) for down in downs]
        self._down = torch.cat(downs) if stack.is_convolution else torch.cat(downs).t()
        roots = None if stack.orthonormal else torch.cat([root_like(site.stack, weight) for site in sites])
        self._roots = None if roots is None else roots.transpose(1, 2) if stack.is_convolution else roots
        self._shape = len(sites), len(stack.indices), stack.rank // len(stack.indices)
        self._rows: dict[str, Tensor] = {}
        self._given: tuple[Tensor, Tensor] | None = None  # a prompt, and the weights that follow from it in all steps

    def forward(self, forward: Callable[[Tensor], Tensor], site: Site) -> Callable[[Tensor], Tensor]:
        """The module's, with its LoRAs."""
        first, name, width = site is self._sites[0], site.name, site.stack.out_features
        up = site.stack.up_as(self._down.dtype).to(self._down.device)
        turned, convolution = up.t(), site.stack.is_convolution

        def routed(x: Tensor) -> Tensor:
            output = forward(x)
            if first:
                self._read(x)
            rows = self._rows.pop(name)
            if convolution:
                output.flatten(2).baddbmm_(up.expand(output.shape[0], -1, -1), rows)
            else:
                output.view(-1, width).addmm_(rows, turned)
            return output

        return routed

    def _read(self, x: Tensor) -> None:
        """Make the rows of all modules, weighed."""
        site, rows = self._sites[0], self._sites[0].project(x, self._down)
        modules, number, rank = self._shape
        shape = (len(x), number, rank, -1) if site.stack.is_convolution else (len(x), -1, modules, number, rank)
        if self._given is None or self._given[0] is not x:
            won = self._won(rows, len(x))
            if site.stack.is_convolution:
                weights = won[0].transpose(0, 1).unsqueeze(2)
            else:
                weights = won.permute(2, 3, 0, 1).contiguous().unsqueeze(-1)
            weights = weights.to(rows.dtype)
            self._given = (x, weights) if site.reads == "text" else None
        else:
            weights = self._given[1]
        rows.view(shape).mul_(weights)
        parts = [rows] if modules == 1 else rows.split_with_sizes(self._ranks, dim=1)
        self._rows = {site.name: part for site, part in zip(self._sites, parts, strict=True)}

    def _won(self, rows: Tensor, batch: int) -> Tensor:
        """1 where a LoRA has a token, `(modules, n, batch, tokens)`."""
        modules, number, rank = self._shape
        if rows.ndim == 3:
            z = rows.float().view(batch * number, rank, -1)
            z = z if self._roots is None else torch.bmm(self._roots.repeat(batch, 1, 1), z)
            sizes = z.square().sum(dim=1).sqrt_().view(1, batch, number, -1).transpose(1, 2)
        elif self._roots is None:
            z = rows.view(-1, modules * number, rank)
            sizes = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32).t()
        else:
            z = rows.float().view(-1, modules * number, rank).transpose(0, 1)
            sizes = torch.linalg.vector_norm(torch.bmm(z, self._roots), dim=-1)
        sizes = sizes.view(modules, number, batch, -1)
        ratios = sizes.div_(sizes.mean(dim=-1, keepdim=True))
        return ratios.eq_(ratios.amax(dim=1, keepdim=True))


class _Weights:
    """What a gate gave, for the modules that it weighs."""

    now: Tensor


def _gated(
    forward: Callable[[Tensor], Tensor], site: Site, weights: _Weights, ask: Callable[[Tensor], Tensor] | None
) -> Callable[[Tensor], Tensor]:
    weight: Any = site.module.weight
    down = site.stack.down_as(weight.dtype, weight.device)
    down = down if site.stack.is_convolution else down.t()

    def gated(x: Tensor) -> Tensor:
        output = forward(x)
        if ask is not None:
            weights.now = ask(site.positions(x))
        return site.stack.add_to(output, site.project(x, down), weights.now, spare=True)

    return gated


def _forward(module: Any, stack: ExpertStack, joined: bool) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach(), module.bias
    down = stack.down_as(weight.dtype, weight.device)
    up = stack.up_as(weight.dtype).to(weight.device)
    turned = up.t()

    def convolution(x: Tensor) -> Tensor:
        output = F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)
        rows = F.conv2d(x, down, None, module.stride, module.padding, module.dilation)
        output.flatten(2).baddbmm_(up.expand(output.shape[0], -1, -1), rows.flatten(2))
        return output

    def two(x: Tensor) -> Tensor:
        output = F.linear(x, weight, bias)
        output.view(-1, output.shape[-1]).addmm_(torch.mm(x.reshape(-1, x.shape[-1]), down.t()), turned)
        return output

    if isinstance(module, nn.Conv2d):
        return convolution
    if not joined:
        return two
    features = weight.shape[0]
    whole = torch.cat([weight, down])
    whole_bias = None if bias is None else torch.cat([bias.detach(), bias.new_zeros(len(down))])

    def one(x: Tensor) -> Tensor:
        both = F.linear(x, whole, whole_bias)
        flat = both.view(-1, both.shape[-1])
        flat[:, :features].addmm_(flat[:, features:], turned)
        return both[..., :features]

    return one
