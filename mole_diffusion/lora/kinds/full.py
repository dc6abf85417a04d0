"""A change of weight written out in full (LyCORIS' "full" and "norm", extracted LoRAs that kept modules whole)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kronecker import Kronecker
from .base import Change, Form, Kind, KindError, Parts, Shape, need


class Full(Kind):
    """`diff`, in the shape of the weight; LyCORIS calls that of a normalisation layer `w_norm`.

    Of a Linear or Conv2d it is run as the Kronecker product of 1 and itself.
    """

    name = "full difference"
    marks = frozenset({"diff"})
    takes = marks

    def form(self, shapes: Mapping[str, Shape]) -> Form:
        (diff,) = need(shapes, "diff")
        if len(diff) not in (1, 2, 4):
            raise KindError(
                f"<diff> {diff} is the weight of neither a Linear, nor a Conv2d, nor a normalisation layer",
                "Merge it into its base and draw with that, or train it on such modules only.",
            )
        return Form(diff[0], diff[1:], None, 0)

    def fold(self, parts: Parts) -> Change:
        if parts["diff"].ndim == 1:
            return parts["diff"]
        return Kronecker(torch.ones(1, 1), parts["diff"])
