"""LoHa (FedPara, Nam-Wuk et al., https://arxiv.org/abs/2108.06098, prop. 1): the elementwise product of two LoRAs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kronecker import Kronecker
from .base import Change, Form, Kind, KindError, Parts, Shape, need


class LoHa(Kind):
    """`(w1_a @ w1_b) * (w2_a @ w2_b)`, which is a LoRA of rank `r1 * r2`: every pair of ranks is one.

    Where that is more than the module's own rank, the product is formed instead: the smaller of the two is run.
    With cores `t1`, `t2` `(r, r, kh, kw)` a factor `a` is stored as `(r, d_out)`, and each core folds into its `b`.
    """

    name = "LoHa"
    marks = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
    takes = marks

    def form(self, shapes: Mapping[str, Shape]) -> Form:
        a1, b1, a2, b2 = need(shapes, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        wrong = KindError(f"Hadamard factors {a1}, {b1}, {a2} and {b2} are not those of one module")
        if not all(len(shape) == 2 for shape in (a1, b1, a2, b2)) or b1[1] != b2[1]:
            raise wrong
        if "hada_t1" in shapes or "hada_t2" in shapes:
            t1, t2 = need(shapes, "hada_t1", "hada_t2")
            if t1[:2] != (a1[0], b1[0]) or t2[:2] != (a2[0], b2[0]) or a1[1] != a2[1] or t1[2:] != t2[2:]:
                raise KindError(f"{wrong}; cores are {t1} and {t2}")
            if len(t1) != 4:
                raise KindError(f"{wrong}; cores are {t1} and {t2}, not of a convolution")
            return _form(a1[1], (b1[1], *t1[2:]), b1[0], a1[0] * a2[0])
        if a1[0] != a2[0] or a1[1] != b1[0] or a2[1] != b2[0]:
            raise wrong
        return _form(a1[0], (b1[1],), b1[0], b1[0] * b2[0])

    def fold(self, parts: Parts) -> Change:
        down1, up1 = _factors(parts, 1)
        down2, up2 = _factors(parts, 2)
        if len(down1) * len(down2) > min(len(up1), down1[0].numel()):
            whole = (up1 @ down1.flatten(1)) * (up2 @ down2.flatten(1))
            return Kronecker(torch.ones(1, 1), whole.reshape(-1, *down1.shape[1:]))
        down = down1.unsqueeze(1) * down2.unsqueeze(0)  # (r1, r2, d_in, …)
        up = up1.unsqueeze(2) * up2.unsqueeze(1)  # (d_out, r1, r2)
        return down.flatten(0, 1), up.flatten(1)


def _form(out: int, inputs: Shape, r: int, rows: int) -> Form:
    return Form(out, inputs, r, min(rows, out, math.prod(inputs)), flat=len(inputs) == 1)


def _factors(parts: Parts, index: int) -> tuple[Tensor, Tensor]:
    a, b = parts[f"hada_w{index}_a"], parts[f"hada_w{index}_b"]
    if f"hada_t{index}" not in parts:
        return b, a
    return torch.einsum("rskl,si->rikl", parts[f"hada_t{index}"], b), a.T
