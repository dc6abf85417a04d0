"""A sum at constant weights, with all that it needs at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .site import Site


def sum_at(site: Site, weights: Tensor, like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What adds the LoRAs of a module to what it gives, as `ExpertStack.add_to` does, where nobody wants a gradient.

    It looks at nothing that is the same in each pass, since to ask a tensor for its device takes a small model, or a
    GPU that waits, as long as half a product. Where outputs are of another device or dtype now, or lie otherwise in
    memory, an operator raises RuntimeError before anything is written.

    Args:
        site: The module.
        weights: The same at all modules, `(1, 1, N)`.
        like: An output of the module.

    Returns:
        Input and output of the module to that output, to which was added in place.
    """
    stack, group, name, alone = site.stack, site.group, site.name, not site.group.several
    down, width = group.down_of(site, like)[0], stack.out_features
    (up, turned), scaled = stack.ups_like(like), stack.scaled(weights, like.dtype)
    number, numbers = (scaled, None) if isinstance(scaled, float) else (1.0, scaled)

    def linear(x: Tensor, output: Tensor) -> Tensor:
        rows = torch.mm(x.reshape(-1, x.shape[-1]), down) if alone else group.project(site, x, output).rows[name]
        if numbers is not None:
            rows = (rows * numbers).to(rows.dtype)
        output.view(-1, width).addmm_(rows, turned, alpha=number)
        return output

    def convolution(x: Tensor, output: Tensor) -> Tensor:
        rows = site.project(x, down) if alone else group.project(site, x, output).rows[name]
        if numbers is not None:
            rows = (rows * numbers).to(rows.dtype)
        output.view(output.shape[0], width, -1).baddbmm_(up.expand(rows.shape[0], -1, -1), rows, alpha=number)
        return output

    return convolution if stack.is_convolution else linear
