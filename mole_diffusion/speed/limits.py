"""The least that a plain sum takes: its products with nothing around them, and with the module's own in one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..experts import Experts, ExpertStack


def with_products(model: Any, experts: Experts, kept: tuple[int, ...], joined: bool) -> Any:
    """The model with modules that add LoRAs at full weight: nobody may choose, weigh or look on.

    Args:
        model: A copy, whose forwards are exchanged.
        experts: The LoRAs, on another copy.
        kept: Indices of those that are added.
        joined: Whether the rows of a Linear and of `down` lie in one matrix, so that one product gives both.
    """
    for site in experts.sites.values():
        module = model.get_submodule(site.module_name)
        module.forward = _forward(module, site.only(kept).stack, joined)
    return model


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
