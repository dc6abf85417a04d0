"""A change of weight written out in full (LyCORIS' "full", extracted LoRAs that kept some modules whole)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kronecker import Kronecker
from .base import Change, Form, Kind, KindError, Parts, Shape, need


class Full(Kind):
    """`diff`, in the shape of the weight. Run as the Kronecker product of 1 and itself."""

    name = "full difference"
    marks = frozenset({"diff"})
    takes = marks

    def form(self, shapes: Mapping[str, Shape]) -> Form:
        (diff,) = need(shapes, "diff")
        if len(diff) not in (2, 4):
            raise KindError(
                f"diff {diff} is not the weight of a Linear or Conv2d, but of a normalisation layer or the like",
                "Merge it into its base and draw with that, or train it on Linear and Conv2d modules only.",
            )
        return Form(diff[0], diff[1:], None, 0)

    def fold(self, parts: Parts) -> Change:
        return Kronecker(torch.ones(1, 1), parts["diff"])
