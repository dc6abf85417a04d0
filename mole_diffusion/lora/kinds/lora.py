"""Plain LoRA (Hu et al., https://arxiv.org/abs/2106.09685, eq. 3): the change is `up @ down`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .base import Change, Form, Kind, KindError, Parts, Shape, need


class PlainLoRA(Kind):
    """`down` `(r, d_in)` and `up` `(d_out, r)`; of a convolution `(r, c_in, kh, kw)` and `(d_out, r, 1, 1)`."""

    name = "LoRA"
    marks = frozenset({"down", "up"})
    takes = marks

    def form(self, shapes: Mapping[str, Shape]) -> Form:
        down, up = need(shapes, "down", "up")
        if len(down) not in (2, 4) or len(up) not in (2, 4) or up[1] != down[0] or math.prod(up[2:]) != 1:
            raise KindError(
                f"<down> {down} and <up> {up} are not factors of one module",
                "Expected (r, d_in) and (d_out, r), or (r, c_in, kh, kw) and (d_out, r, 1, 1); save it again.",
            )
        return Form(up[0], down[1:], down[0], down[0])

    def fold(self, parts: Parts) -> Change:
        return parts["down"], parts["up"].flatten(1)
