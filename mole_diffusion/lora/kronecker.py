"""A Kronecker product as a linear map, applied factor by factor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Kronecker:
    """`w1 ⊗ (up @ down)`. With `x` as a matrix `(m, n)`, the product is `w1 x w2^T`: two small products.

    Attributes:
        w1: `(l, m)`.
        down: `(k, n)`, or `(k, n, kh, kw)` of a convolution; w2 itself where `up` is None.
        up: `(k', k)`; None where w2 is not a product.
        rows: Which of the `l * k'` outputs are kept, in order; None: all. (A part of a fused qkv.)
    """

    w1: Tensor
    down: Tensor
    up: Tensor | None = None
    rows: Rows | None = None

    @property
    def w2(self) -> Tensor:
        """The second factor, `(k', n, …)`."""
        if self.up is None:
            return self.down
        return (self.up @ self.down.flatten(1)).reshape(-1, *self.down.shape[1:])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All factors."""
        return (self.w1, self.down) if self.up is None else (self.w1, self.down, self.up)

    def take(self, rows: Rows) -> Kronecker:
        """The product with only some of its rows; rows of `w1` that reach none of them are left out."""
        size = len(self.down if self.up is None else self.up)
        first = min(part.start for part in rows) // size
        last = -(-max(part.stop for part in rows) // size)
        moved = tuple(slice(part.start - first * size, part.stop - first * size) for part in rows)
        whole = moved == (slice(0, (last - first) * size),)
        return replace(self, w1=self.w1[first:last], rows=None if whole else moved)

    def shaped(self, inputs: tuple[int, ...]) -> Kronecker:
        """The same for a module of these input sides, `(d_in,)` or `(c_in, kh, kw)`."""
        side = inputs[0] // self.w1.shape[1]
        return replace(self, down=self.down.reshape(len(self.down), side, *inputs[1:]))

    def to(self, device: torch.device, dtype: torch.dtype) -> Kronecker:
        """On another device, in another dtype."""
        up = None if self.up is None else self.up.to(device, dtype)
        return replace(self, w1=self.w1.to(device, dtype), down=self.down.to(device, dtype), up=up)

    def matrix(self) -> Tensor:
        """The product formed, `(rows, m * n, …)`: for merging and for norms, never for a forward pass."""
        w2 = self.w2
        product = torch.kron(self.w1.reshape(*self.w1.shape, *[1] * (w2.ndim - 2)), w2)
        return product if self.rows is None else torch.cat([product[part] for part in self.rows])

    def __call__(self, x: Tensor, convolution: Any = None) -> Tensor:
        """The product applied.

        Args:
            x: `(…, m * n)`, or `(batch, m * n, height, width)` for a convolution.
            convolution: The `nn.Conv2d` whose stride, padding and dilation count; None for a Linear.

        Returns:
            `(…, rows)`, or `(batch, positions, rows)` of a convolution.
        """
        m = self.w1.shape[1]
        if convolution is None:
            z = F.linear(x.unflatten(-1, (m, -1)), self.down)  # (…, m, k)
        else:
            parts = x.unflatten(1, (m, -1)).flatten(0, 1)
            conv = F.conv2d(parts, self.down, None, convolution.stride, convolution.padding, convolution.dilation)
            z = conv.flatten(2).unflatten(0, (len(x), m)).permute(0, 3, 1, 2)  # (batch, positions, m, k)
        z = self.w1 @ z  # (…, l, k)
        y = (z if self.up is None else F.linear(z, self.up)).flatten(-2)
        return y if self.rows is None else torch.cat([y[..., part] for part in self.rows], dim=-1)
