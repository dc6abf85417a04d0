"""What calls spend on LoRAs, looked at inside of them: a small time, measured by itself and not as a difference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..experts import Site
from ..experts.forward_passes import ForwardPasses


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """A `with` block; experts that are attached in it tell what they spend for as long as they stay attached.

    Yields:
        Seconds by the name of a module, of the latest call: from what the module gave to the same with its LoRAs.
    """
    spent: dict[str, float] = {}
    add = ForwardPasses.add

    def timed(self: ForwardPasses, site: Site, hidden_states: Tensor, output: Tensor) -> Tensor:
        begin = time.perf_counter()
        added = add(self, site, hidden_states, output)
        spent[site.name] = time.perf_counter() - begin
        return added

    ForwardPasses.add = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        ForwardPasses.add = add  # type: ignore[method-assign]
