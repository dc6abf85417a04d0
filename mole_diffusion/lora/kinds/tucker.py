"""A convolution in three factors (LyCORIS' LoCon with `use_tucker`): `up`, a core over the kernel, `down`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .base import Change, Form, Kind, KindError, Parts, Shape, need


class Tucker(Kind):
    """`down` `(r, c_in, 1, 1)`, `mid` `(r, r, kh, kw)` and `up` `(d_out, r, 1, 1)`; core and `down` fold into one."""

    name = "Tucker LoRA"
    marks = frozenset({"mid"})
    takes = frozenset({"down", "mid", "up"})

    def form(self, shapes: Mapping[str, Shape]) -> Form:
        down, mid, up = need(shapes, "down", "mid", "up")
        kernels = math.prod(down[2:]) == math.prod(up[2:]) == 1 and len(mid) == 4
        if not kernels or len(down) < 2 or len(up) < 2 or mid[1] != down[0] or up[1] != mid[0]:
            raise KindError(
                f"<down> {down}, <mid> {mid} and <up> {up} are not factors of one module",
                "Expected (r, c_in, 1, 1), (r, r, kh, kw) and (d_out, r, 1, 1); save it again.",
            )
        return Form(up[0], (down[1], *mid[2:]), down[0], mid[0])

    def fold(self, parts: Parts) -> Change:
        return torch.einsum("rskl,si->rikl", parts["mid"], parts["down"].flatten(1)), parts["up"].flatten(1)
