"""What the gates gave: tensors with a graph for losses, and a table to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mole_diffusion.errors import MoLEError

from ..experts import Run, in_backward
from .spec import GateSpec


class GateTable(NamedTuple):
    """Mean weights, places by LoRAs.

    Attributes:
        places: Names of the gates, in the order of a forward pass.
        loras: Names of the LoRAs.
        values: `(places, N)`, on the CPU and without graph; zero where a LoRA does not touch a place.
    """

    places: tuple[str, ...]
    loras: tuple[str, ...]
    values: Tensor


class GateRecord:
    """The gates of one forward pass, or of all while recording.

    Weights are those after masking and before the user's scale, so rows sum to `gate_sum`, less what a null expert
    took. A checkpoint's recomputation adds
    nothing: recording the same pass twice is recording it once. (With reentrant checkpointing the forward pass has no
    graph, so neither have the recorded gates; use `use_reentrant=False`, as diffusers does.)

    Args:
        specs: The gates of the model.
        lora_names: Names of the LoRAs.
        accumulate: Keep every pass (all denoising steps) instead of the latest one of each model.

    Attributes:
        gates: Gate name to `(batch, N)`, with graph, of the latest pass: means over the tokens, where these differ.
        by_pass: Gate name to the list of its weights in every recorded pass, each `(batch, N)`.
        tokens: Gate name to `(batch, tokens, N)` of the latest pass, without graph; one token where all share a gate.
    """

    def __init__(self, specs: Sequence[GateSpec], lora_names: Sequence[str], accumulate: bool = False) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.lora_names = tuple(lora_names)
        self.accumulate = accumulate
        self.by_pass: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, Tensor] = {}

    def add(self, name: str, run: Run, gates: Tensor) -> None:
        """Notes the gates `(batch, tokens | 1, N)` of one place in one pass."""
        if in_backward():
            return
        self.tokens[name] = gates.detach()
        gates = gates.mean(dim=1)
        if self.accumulate:
            self.by_pass.setdefault(name, []).append(gates)
        else:
            self.by_pass[name] = [gates]

    @property
    def gates(self) -> dict[str, Tensor]:
        return {name: self.by_pass[name][-1] for name in self.names}

    @property
    def names(self) -> tuple[str, ...]:
        """Gates that were reached, in the order of a forward pass."""
        return tuple(name for name in self._specs if name in self.by_pass)

    def mean(self) -> dict[str, Tensor]:
        """Gate name to `(N,)`: the mean over the batch and the recorded passes, with graph."""
        return {name: torch.cat(self.by_pass[name]).mean(dim=0) for name in self.names}

    def places(self) -> Tensor:
        """`(places, N)`, the means stacked, with graph: what `balance_loss` takes.

        Raises:
            MoLEError: Nothing was recorded.
        """
        means = list(self.mean().values())
        if not means:
            raise MoLEError("No gate was recorded. Run the model inside `with model.record() as record:`.")
        return torch.stack([mean.to(means[-1].device) for mean in means])

    def rows(self) -> Tensor:
        """`(batch, places, N)`, the latest pass with graph: what `balance_loss` takes, sample by sample.

        Raises:
            MoLEError: Nothing was recorded, or places saw batches of different sizes.
        """
        gates = list(self.gates.values())
        sizes = sorted({len(weights) for weights in gates})
        if len(sizes) != 1:
            raise MoLEError(
                f"Recorded batches have the sizes {sizes}. Record one pass of every model with one batch, inside "
                "`with model.record() as record:`, or use `places()`, which takes means."
            )
        return torch.stack([weights.to(gates[-1].device) for weights in gates], dim=1)

    def present(self) -> Tensor:
        """`(places, N)` bool: which LoRA touches which of the recorded places."""
        present = torch.zeros(len(self.names), len(self.lora_names), dtype=torch.bool)
        for row, name in enumerate(self.names):
            present[row, list(self._specs[name].indices)] = True
        return present

    def table(self) -> GateTable:
        """Mean weights as plain numbers, for printing and plotting."""
        return GateTable(self.names, self.lora_names, self.places().detach().cpu())
