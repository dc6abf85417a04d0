"""What adding the LoRAs of a module takes, with all that is the same in each pass at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from .site import Site


class AtHand:
    """The products at a module where nobody wants a gradient: `SiteGroup.project` and `ExpertStack.add_to`, at once.

    It looks at nothing that is the same in each pass, since to ask a tensor for its device takes a small model, or a
    GPU that waits, as long as half a product. Where tensors are of another device or dtype now, or lie otherwise in
    memory, an operator raises RuntimeError before anything is written to an output.

    Args:
        site: The module, with LoRAs that add nothing but products of small rank.
        like: An output of the module, contiguous and of the dtype of its input.

    Attributes:
        down: What `SiteGroup.project` needs not look for.
        dtype: Of `like`.
    """

    def __init__(self, site: Site, like: Tensor) -> None:
        stack, group = site.stack, site.group
        self._name, self._stack, self._group, self._site = site.name, stack, group, site
        self._alone, self._convolution = not group.several, stack.is_convolution
        self._plain = self._alone and not self._convolution
        self.down = group.down_of(site, like)[0]
        self._up, self._turned = stack.ups_like(like)
        self._width, self.dtype = stack.out_features, like.dtype

    def add(self, hidden_states: Tensor, output: Tensor, scaled: Tensor | float, rows: Tensor | None = None) -> Tensor:
        """`output`, to which the experts were added in place.

        Args:
            hidden_states: The input of the module.
            output: What it gave.
            scaled: What `ExpertStack.scaled` made of the weights; 1.0 where rows are weighed already.
            rows: Those of `SiteGroup.project`, where that was called.
        """
        if rows is not None:
            pass
        elif self._plain:
            rows = torch.mm(hidden_states.reshape(-1, hidden_states.shape[-1]), self.down)
        elif self._alone:
            rows = self._site.project(hidden_states, self.down)
        else:
            rows = self._group.project(self._site, hidden_states, output, self.down).rows[self._name]
        number = 1.0
        if isinstance(scaled, float):
            number = scaled
        elif scaled.ndim < 3:
            rows = (rows * scaled).to(rows.dtype)
        else:
            rows = self._stack.weighted(rows, scaled, output.shape[0], self._alone)
        if self._convolution:
            place = output.view(output.shape[0], self._width, -1)
            place.baddbmm_(self._up.expand(place.shape[0], -1, -1), rows, alpha=number)
        else:
            output.view(-1, self._width).addmm_(rows, self._turned, alpha=number)
        return output
