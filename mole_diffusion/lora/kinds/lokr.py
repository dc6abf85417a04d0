"""LoKr (LyCORIS, Yeh et al., https://arxiv.org/abs/2309.14859, sec. 3.3): the Kronecker product of two matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kronecker import Kronecker
from .base import Change, Form, Kind, KindError, Parts, Shape, need


class LoKr(Kind):
    """`w1 ⊗ w2`, either whole or as `a @ b`; `w2` of a convolution has its kernel, or a core `t2` `(r, r, kh, kw)`.

    Alpha is divided by the rank of `w2`, else of `w1`; where both are whole it counts for nothing.
    """

    name = "LoKr"
    marks = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    takes = marks

    def form(self, shapes: Mapping[str, Shape]) -> Form:
        w1 = _whole(shapes, 1)
        r = None if "lokr_w1" in shapes else need(shapes, "lokr_w1_b")[0][0]
        if "lokr_t2" in shapes:
            core, a, b = need(shapes, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
            if len(core) != 4 or len(a) != 2 or len(b) != 2 or core[:2] != (a[0], b[0]):
                raise KindError(f"Kronecker factors {a} and {b} with core {core} are not those of one module")
            return Form(w1[0] * a[1], (w1[1] * b[1], *core[2:]), b[0], 0)
        w2 = _whole(shapes, 2)
        r = r if "lokr_w2" in shapes else need(shapes, "lokr_w2_b")[0][0]
        return Form(w1[0] * w2[0], (w1[1] * w2[1], *w2[2:]), r, 0, flat=len(w2) == 2)

    def fold(self, parts: Parts) -> Change:
        w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_w2" in parts:
            return Kronecker(w1, parts["lokr_w2"])
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        if "lokr_t2" in parts:
            return Kronecker(w1, torch.einsum("rskl,si->rikl", parts["lokr_t2"], b), a.T)
        return Kronecker(w1, b, a)


def _whole(shapes: Mapping[str, Shape], index: int) -> Shape:
    """The shape of `w1` or `w2`, whole or as a product."""
    if f"lokr_w{index}" in shapes:
        whole = shapes[f"lokr_w{index}"]
        if len(whole) not in ((2,) if index == 1 else (2, 4)):
            raise KindError(f"Kronecker factor lokr_w{index} {whole} is no matrix")
        return whole
    a, b = need(shapes, f"lokr_w{index}_a", f"lokr_w{index}_b")
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise KindError(f"Kronecker factors {a} and {b} are not factors of one matrix")
    return a[0], b[1]
