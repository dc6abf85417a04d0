"""What a way of writing a change of weight has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..kronecker import Kronecker

Shape = tuple[int, ...]
Parts = Mapping[str, Tensor]
Change = tuple[Tensor, Tensor] | Kronecker | Tensor
"""`(down, up)`, `(R, d_in, …)` and `(d_out, R)`, whose product is the change; a Kronecker product; or, of a
normalisation layer, the change itself, `(d,)`."""


class KindError(ValueError):
    """The parts are not those of one module. In the message they stand as `<down>`, for each file has its own words.

    Attributes:
        remedy: What was expected.
        incomplete: Whether parts are missing.
    """

    def __init__(self, problem: str, remedy: str = "Save it again.", *, incomplete: bool = False) -> None:
        super().__init__(problem)
        self.remedy = remedy
        self.incomplete = incomplete


@dataclass(frozen=True)
class Form:
    """What the shapes of the parts tell, before any value is read.

    Attributes:
        out: Rows of the weight it changes.
        inputs: The other sides of it, `(d_in,)` or `(c_in, kh, kw)`; flattened to one where `flat`; none where it is of
            a normalisation layer.
        r: The rank that alpha is divided by; None where alpha counts for nothing.
        rows: Rank of the product as it is computed.
        flat: Whether a kernel's sides are hidden in `inputs`.
    """

    out: int
    inputs: Shape
    r: int | None
    rows: int
    flat: bool = False


class Kind(ABC):
    """One way of writing a change of weight. An instance has no state.

    Attributes:
        name: The name that people know it by.
        marks: Parts by which it is known, any of them.
        takes: All parts it may have, beside `alpha`.
    """

    name: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    takes: ClassVar[frozenset[str]]

    @abstractmethod
    def form(self, shapes: Mapping[str, Shape]) -> Form:
        """What the parts' shapes tell.

        Raises:
            KindError: Parts are missing or do not belong together.
        """

    @abstractmethod
    def fold(self, parts: Parts) -> Change:
        """The change, without alpha. `(down, up)` have the sides of `Form`."""


def need(shapes: Mapping[str, Shape], *names: str) -> list[Shape]:
    """The shapes of parts that must be there.

    Raises:
        KindError: One is not.
    """
    if missing := [name for name in names if name not in shapes]:
        raise KindError("no " + " and no ".join(f"<{name}>" for name in missing), incomplete=True)
    return [shapes[name] for name in names]
